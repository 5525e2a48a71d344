"""Paged attention by `npu_fused_infer_attention_score`, and the write into the pages by `npu_scatter_nd_update_`.

What the fused operator asks (op-plugin's document of it, A2 and A3): fp16 or bf16; head dim up to 512 in multiples of
16 bytes; pages [num_blocks, block_size, Hk * D] with block_size 128, 256, 384 or 512 where a request has more than one
new token; lengths as host integers. Routes by head dim:

- 128: layout TND, all requests in one call. `actual_seq_lengths` counts queries cumulatively; `actual_seq_lengths_kv`
  is, with pages, each request's own length.
- any other (64 of Llama-3.2-1B, 256 of Qwen3.5): TND is not listed for them without a rope part, so single-token
  requests go together in layout BSND, [N, 1, H, D], and each longer one alone, [1, n, H, D].

A query sees the keys up to its own position: `sparse_mode` 3 (causal, aligned at the lower right) with the compressed
2048 x 2048 mask, or no mask and mode 0 where every request has a single token.

fp32, and head dims that are no multiple of 8, take PyTorch's attention request by request (`ops/torch_native.py`).
"""

from __future__ import annotations

import functools
from itertools import accumulate
from typing import Any

import torch

from surefoot.device.graphs import host_call, is_capturing
from surefoot.ops.npu.common import FLOAT, HALF, PRIORITY, need
from surefoot.ops.spec import register

TND_HEAD_DIM = 128
MAX_HEAD_DIM = 512
MAX_GROUP = 64
MAX_BATCH = 4096
NO_MASK, CAUSAL = 0, 3


def _attention_ok(
    q, k_cache, v_cache, block_table, query_start_loc, seq_lens, query_lens_host, seq_lens_host, scale
) -> bool:
    block_size, kv_heads, dim = k_cache.shape[1:]
    return (
        q.dtype in HALF
        and q.dtype == k_cache.dtype == v_cache.dtype
        and dim <= MAX_HEAD_DIM
        and dim % (8 if dim <= 128 else 16) == 0
        and block_size % 128 == 0
        and block_size <= 512
        and q.shape[1] <= MAX_GROUP * kv_heads
        and len(query_lens_host) <= MAX_BATCH
    )


@register("paged_attention", "npu", "npu_fused_infer_attention_score", supports=_attention_ok, priority=PRIORITY)
def paged_attention(q, k_cache, v_cache, block_table, query_start_loc, seq_lens, query_lens_host, seq_lens_host, scale):
    _check(q, k_cache, v_cache, block_table, query_lens_host, seq_lens_host)
    shared = {
        "key": k_cache.flatten(2),
        "value": v_cache.flatten(2),
        "num_heads": q.shape[1],
        "num_key_value_heads": k_cache.shape[2],
        "scale": scale,
        "block_size": k_cache.shape[1],
    }
    q = q.contiguous()
    if q.shape[2] == TND_HEAD_DIM:
        ends = list(accumulate(query_lens_host))
        decode = len(q) == len(query_lens_host)
        return _attend(
            shared, q, block_table, seq_lens_host, input_layout="TND", actual_seq_lengths=ends, **_mask(q, decode)
        )
    singles = _num_leading_ones(query_lens_host)
    parts = []
    if singles:
        # NOTE: the list itself and not a copy where it is whole: a captured graph reads it again at each replay.
        lens = seq_lens_host if singles == len(seq_lens_host) else seq_lens_host[:singles]
        queries = q[:singles].unsqueeze(1)
        parts.append(_attend(shared, queries, block_table[:singles], lens, input_layout="BSND", **_mask(q, True)))
    row = singles
    for i in range(singles, len(query_lens_host)):
        queries = q[row : row + query_lens_host[i]].unsqueeze(0)
        lens = seq_lens_host[i : i + 1]
        parts.append(
            _attend(
                shared, queries, block_table[i : i + 1], lens, input_layout="BSND", **_mask(q, len(queries[0]) == 1)
            )
        )
        row += query_lens_host[i]
    rows = [part.flatten(0, 1) for part in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _attend(
    shared: dict[str, Any], query: torch.Tensor, block_table: torch.Tensor, seq_lens: list[int], **layout: Any
) -> torch.Tensor:
    """One call. While a graph is captured it writes into tensors of its own, so that its lengths can be updated."""
    call = {"query": query, "block_table": block_table, "actual_seq_lengths_kv": seq_lens, **shared, **layout}
    fused = torch.ops.npu.npu_fused_infer_attention_score
    if not is_capturing():
        return fused.default(**call)[0]
    workspace = torch.ops.npu._npu_fused_infer_attention_score_get_max_workspace.default(**call)
    out, lse = torch.empty_like(query), query.new_empty(1)
    host_call(lambda: fused.out(**call, workspace=workspace, out=[out, lse]))
    return out


def _mask(q: torch.Tensor, decode: bool) -> dict[str, Any]:
    if decode:
        return {"sparse_mode": NO_MASK}
    return {"atten_mask": _causal_mask(q.device), "sparse_mode": CAUSAL}


@functools.lru_cache(maxsize=8)
def _causal_mask(device: torch.device) -> torch.Tensor:
    """The compressed causal mask that sparse modes 2, 3 and 4 take: 1 = not seen. Made on the host, 4 MB."""
    return torch.ones(2048, 2048, dtype=torch.int8).triu(1).to(device)


def _num_leading_ones(query_lens: list[int]) -> int:
    return next((i for i, n in enumerate(query_lens) if n != 1), len(query_lens))


def _check(q, k_cache, v_cache, block_table, query_lens: list[int], seq_lens: list[int]) -> None:
    heads, dim = q.shape[1:]
    need(
        k_cache.shape == v_cache.shape and k_cache.is_contiguous() and v_cache.is_contiguous(),
        "pages of k and v differ",
    )
    need(dim == k_cache.shape[3] and heads % k_cache.shape[2] == 0, f"{heads} x {dim} heads on {tuple(k_cache.shape)}")
    need(sum(query_lens) == len(q), f"query lengths sum to {sum(query_lens)}, there are {len(q)} queries")
    need(block_table.dtype == torch.int32 and block_table.dim() == 2, "the block table is int32 [requests, blocks]")
    need(len(query_lens) == len(seq_lens) == len(block_table), "one block table row and length per request")
    room = block_table.shape[1] * k_cache.shape[1]
    need(all(n <= length <= room for n, length in zip(query_lens, seq_lens)), f"a length beyond its pages ({room})")


@register(
    "kv_write",
    "npu",
    "npu_scatter_nd_update_",
    supports=lambda k, v, k_cache, v_cache, slot_mapping: k.dtype in FLOAT and k.dtype == k_cache.dtype == v.dtype,
    priority=PRIORITY,
)
def kv_write(k, v, k_cache, v_cache, slot_mapping):
    """Two kernels. npu_scatter_pa_kv_cache would be one, but documents only NZ pages for three-dimensional keys;
    atb::_npu_reshape_and_cache needs NNAL beside CANN."""
    need(k.shape[1:] == k_cache.shape[2:] == v.shape[1:], f"keys {tuple(k.shape)} into pages {tuple(k_cache.shape)}")
    need(len(slot_mapping) == len(k) == len(v) and v_cache.dtype == v.dtype, "a slot for each key and value")
    slots = slot_mapping.unsqueeze(-1)
    torch.ops.npu.npu_scatter_nd_update_(k_cache.view(-1, *k_cache.shape[2:]), slots, k)
    torch.ops.npu.npu_scatter_nd_update_(v_cache.view(-1, *v_cache.shape[2:]), slots, v)
