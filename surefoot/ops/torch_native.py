"""Faster forms of the references in plain PyTorch, for any device that has no kernel of its own.

Each computes what its reference computes, in fewer and larger calls.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from surefoot.device.graphs import is_capturing
from surefoot.ops.attention import gather_pages
from surefoot.ops.delta import prepare
from surefoot.ops.spec import register

CHUNK = 64


def _any_shape(*args, **kwargs) -> bool:
    """A graph would bake the lengths in that are read on the host here."""
    return not is_capturing()


def _single_tokens(q, k_cache, v_cache, block_table, *rest, **named) -> bool:
    return is_capturing() and q.shape[0] == block_table.shape[0]


@register("paged_attention", "any", "padded", supports=_single_tokens)
def paged_attention_padded(
    q, k_cache, v_cache, block_table, query_start_loc, seq_lens, query_lens_host, seq_lens_host, scale
):
    """For graphs of decode steps: every row reads as many pages as the table is wide, and a mask from `seq_lens` on the
    device hides the rest. Costs the longest possible sequence at every step."""
    n, heads, dim = q.shape
    kv_heads, width = k_cache.shape[2], block_table.shape[1] * k_cache.shape[1]
    held = torch.arange(width, device=q.device) < seq_lens.unsqueeze(-1)

    def gather(cache):
        # NOTE: pages that nobody wrote may hold NaN, which a mask on the scores alone would let through.
        rows = cache.index_select(0, block_table.flatten()).view(n, width, kv_heads, dim)
        return rows.masked_fill(~held[..., None, None], 0.0).transpose(1, 2)

    grouped = q.view(n, kv_heads, heads // kv_heads, dim)
    mask = held[:, None, None, :]
    out = F.scaled_dot_product_attention(grouped, gather(k_cache), gather(v_cache), attn_mask=mask, scale=scale)
    return out.view(n, heads, dim)


@register("paged_attention", "any", "sdpa", supports=_any_shape)
def paged_attention_sdpa(
    q, k_cache, v_cache, block_table, query_start_loc, seq_lens, query_lens_host, seq_lens_host, scale
):
    """PyTorch's fused attention, request by request."""
    out = torch.empty_like(q)
    heads, kv_heads, dim = q.shape[1], k_cache.shape[2], q.shape[2]
    group = heads // kv_heads
    row = 0
    for i, (n, length) in enumerate(zip(query_lens_host, seq_lens_host)):
        keys = gather_pages(k_cache, block_table[i], length).transpose(0, 1).unsqueeze(0)
        values = gather_pages(v_cache, block_table[i], length).transpose(0, 1).unsqueeze(0)
        if n == 1:
            # The heads of a group become the rows of one small matrix: each KV head is read once.
            o = F.scaled_dot_product_attention(q[row].view(1, kv_heads, group, dim), keys, values, scale=scale)
            out[row] = o.view(heads, dim)
        else:
            queries = q[row : row + n].transpose(0, 1).unsqueeze(0)
            mask = None
            if length > n:
                mask = torch.ones(n, length, dtype=torch.bool, device=q.device).tril(length - n)
            o = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, is_causal=length == n, scale=scale, enable_gqa=group > 1
            )
            out[row : row + n] = o[0].transpose(0, 1)
        row += n
    return out


@register("gated_delta_chunk", "any", "chunked")
def gated_delta_chunked(q, k, v, g, beta, state, slots, query_start_loc, query_lens_host):
    """Chunks of 64 tokens by matrix products (the WY / UT form, arXiv 2412.06464 section 3.3), requests one by one."""
    out = torch.empty_like(v)
    q, k, v = prepare(q, k, v)
    row = 0
    for i, n in enumerate(query_lens_host):
        slot = slots[i : i + 1]
        s = state.index_select(0, slot)[0]
        for t in range(row, row + n, CHUNK):
            part = slice(t, min(t + CHUNK, row + n))
            o, s = _one_chunk(q[part], k[part], v[part], g[part], beta[part], s)
            out[part] = o.to(out.dtype)
        state.index_copy_(0, slot, s.unsqueeze(0))
        row += n
    return out


def _one_chunk(q, k, v, g, beta, s):
    """Advance the state s [H, Dk, Dv] by C tokens. q, k: [C, H, Dk]; v: [C, H, Dv]; g, beta: [C, H]; all fp32.

    With G the running sum of g inside the chunk and A = tril(beta k k^T exp(G_i - G_j), -1), the corrections u solve
    (I + A) u = beta (v - exp(G) k S): every token sees the state as the tokens before it in the chunk have left it.
    """
    q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    g, beta = g.t().cumsum(-1), beta.t().unsqueeze(-1)
    causal = torch.ones(g.shape[1], g.shape[1], dtype=torch.bool, device=g.device).tril()
    # NOTE: mask before exp; above the diagonal G_i - G_j is positive and may overflow.
    decay = (g.unsqueeze(-1) - g.unsqueeze(-2)).masked_fill(~causal, float("-inf")).exp()
    system = (beta * k) @ k.transpose(-1, -2) * decay
    seen = g.exp().unsqueeze(-1)
    target = beta * (v - (k * seen) @ s)
    u = torch.linalg.solve_triangular(system, target, upper=False, unitriangular=True)
    out = (q * seen) @ s + (q @ k.transpose(-1, -2) * decay) @ u
    left = (g[:, -1:] - g).exp().unsqueeze(-1)
    s = s * g[:, -1].exp()[:, None, None] + (k * left).transpose(-1, -2) @ u
    return out.transpose(0, 1), s
