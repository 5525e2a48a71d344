"""Paged causal attention and the write into its pages."""

from __future__ import annotations

import torch

from surefoot.ops.samples import ELEMENTWISE, REDUCTION, nbytes, randn, starts
from surefoot.ops.spec import Cost, OpSpec, Sample, define, dispatch


def kv_write(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Store this step's keys and values in their slots, in place.

    k, v: [T, Hk, D]; k_cache, v_cache: [num_blocks, block_size, Hk, D]; slot_mapping: [T] flat slots, all distinct.
    """
    dispatch(KV_WRITE, k.device.type, (k, v, k_cache, v_cache, slot_mapping), {})


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    query_lens_host: list[int],
    seq_lens_host: list[int],
    scale: float,
) -> torch.Tensor:
    """Causal attention of each request's new tokens over all of its cached tokens (the new ones already written).

    q: [T, H, D] packed; k_cache, v_cache: [num_blocks, block_size, Hk, D] with H a multiple of Hk (head h reads KV
    head h // (H / Hk)); block_table: [N, max_blocks]; query_start_loc: [N + 1]; seq_lens: [N]; the lists: host copies.
    The last query of request i sits at position seq_lens[i] - 1. Returns [T, H, D].
    """
    args = (q, k_cache, v_cache, block_table, query_start_loc, seq_lens, query_lens_host, seq_lens_host, scale)
    return dispatch(PAGED_ATTENTION, q.device.type, args, {})


def _kv_write(k, v, k_cache, v_cache, slot_mapping):
    k_cache.view(-1, *k_cache.shape[2:]).index_copy_(0, slot_mapping, k)
    v_cache.view(-1, *v_cache.shape[2:]).index_copy_(0, slot_mapping, v)


def gather_pages(cache: torch.Tensor, block_row: torch.Tensor, length: int) -> torch.Tensor:
    """Keys or values of one request in order: [length, Hk, D]."""
    blocks = -(-length // cache.shape[1])
    return cache.index_select(0, block_row[:blocks]).flatten(0, 1)[:length]


def _paged_attention(
    q, k_cache, v_cache, block_table, query_start_loc, seq_lens, query_lens_host, seq_lens_host, scale
):
    out = torch.empty_like(q)
    group = q.shape[1] // k_cache.shape[2]
    row = 0
    for i, (n, length) in enumerate(zip(query_lens_host, seq_lens_host)):
        keys = gather_pages(k_cache, block_table[i], length).float().repeat_interleave(group, dim=1)
        values = gather_pages(v_cache, block_table[i], length).float().repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[row : row + n].float(), keys) * scale
        future = torch.ones(n, length, dtype=torch.bool, device=q.device).triu(length - n + 1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        out[row : row + n] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
        row += n
    return out


def _attention_cost(q, k_cache, v_cache, block_table, query_start_loc, seq_lens, query_lens_host, seq_lens_host, scale):
    heads, dim = q.shape[1:]
    # Query j of n sees length - n + j + 1 keys.
    pairs = sum(n * length - n * (n - 1) / 2 for n, length in zip(query_lens_host, seq_lens_host))
    kv = 2 * sum(seq_lens_host) * k_cache.shape[2] * dim * k_cache.element_size()
    return Cost(4.0 * pairs * heads * dim, kv + 2 * nbytes(q))


def paged_sample(dtype, device, gen, query_lens, seq_lens, heads, kv_heads, head_dim, block_size, scale=1.0):
    """Arguments of `paged_attention` with pages given out in a scrambled order and garbage in unused slots."""
    blocks = [-(-s // block_size) for s in seq_lens]
    order = (torch.randperm(sum(blocks) + 2, generator=gen) + 1).tolist()
    table = torch.zeros(len(seq_lens), max(blocks), dtype=torch.int32)
    for i, n in enumerate(blocks):
        table[i, :n] = torch.tensor([order.pop() for _ in range(n)], dtype=torch.int32)
    shape = (sum(blocks) + 3, block_size, kv_heads, head_dim)
    return {
        "q": randn((sum(query_lens), heads, head_dim), dtype, device, gen, scale),
        "k_cache": randn(shape, dtype, device, gen, scale),
        "v_cache": randn(shape, dtype, device, gen),
        "block_table": table.to(device),
        "query_start_loc": torch.tensor(starts(query_lens), dtype=torch.int32, device=device),
        "seq_lens": torch.tensor(seq_lens, dtype=torch.int32, device=device),
        "query_lens_host": list(query_lens),
        "seq_lens_host": list(seq_lens),
        "scale": head_dim**-0.5,
    }


def _attention_samples():
    def sample(name, query_lens, seq_lens, heads, kv_heads, head_dim, block_size=16, scale=1.0):
        return Sample(
            name,
            lambda dtype, device, gen: paged_sample(
                dtype, device, gen, query_lens, seq_lens, heads, kv_heads, head_dim, block_size, scale
            ),
        )

    return [
        sample("llama-1b decode, ragged", [1] * 8, [1, 2, 15, 16, 17, 64, 129, 500], 32, 8, 64),
        sample("llama-3b mixed", [1, 1, 5, 33], [40, 1, 5, 100], 24, 8, 128),
        sample("qwen3.5 decode", [1, 1, 1], [1, 300, 47], 8, 2, 256),
        sample("qwen3.5 prefill", [65, 7], [65, 71], 8, 2, 256),
        sample("whole prefill 129", [129], [129], 32, 8, 64),
        sample("chunk at a page edge", [16, 1, 17], [32, 33, 17], 8, 4, 8),
        sample("one KV head", [3, 1], [9, 1], 4, 1, 32, 4),
        sample("large scores", [4], [40], 4, 2, 64, 16, 6.0),
        sample("page of 128", [1, 130], [129, 300], 4, 4, 64, 128),
    ]


def _write_samples():
    def sample(name, tokens, kv_heads, head_dim, block_size):
        def make(dtype, device, gen):
            blocks = tokens // block_size + 2
            slots = torch.randperm(blocks * block_size, generator=gen)[:tokens]
            return {
                "k": randn((tokens, kv_heads, head_dim), dtype, device, gen),
                "v": randn((tokens, kv_heads, head_dim), dtype, device, gen),
                "k_cache": torch.zeros(blocks, block_size, kv_heads, head_dim, dtype=dtype, device=device),
                "v_cache": torch.zeros(blocks, block_size, kv_heads, head_dim, dtype=dtype, device=device),
                "slot_mapping": slots.to(device),
            }

        return Sample(name, make)

    return [sample("llama-1b", 8, 8, 64, 16), sample("qwen3.5", 65, 2, 256, 16), sample("one token", 1, 1, 8, 4)]


PAGED_ATTENTION = define(
    OpSpec("paged_attention", _paged_attention, cost=_attention_cost, samples=_attention_samples, tolerance=REDUCTION)
)
KV_WRITE = define(
    OpSpec(
        "kv_write",
        _kv_write,
        cost=lambda k, v, k_cache, v_cache, slot_mapping: Cost(0.0, 2 * nbytes(k, v) + nbytes(slot_mapping)),
        samples=_write_samples,
        tolerance=ELEMENTWISE,
        mutates=("k_cache", "v_cache"),
    )
)
