"""Paged attention and the write into its pages by the C++ kernels."""

from __future__ import annotations

import torch

from surefoot.ops.cpu.common import CODE, KERNELS, PRIORITY, token_rows
from surefoot.ops.spec import register

_NAME = KERNELS.isa()


def _attention_ok(
    q, k_cache, v_cache, block_table, query_start_loc, seq_lens, query_lens_host, seq_lens_host, scale
) -> bool:
    return (
        q.dtype in CODE
        and q.dtype == k_cache.dtype == v_cache.dtype
        and q.numel() > 0
        and token_rows(q)
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and block_table.dtype == query_start_loc.dtype == seq_lens.dtype == torch.int32
        and block_table.is_contiguous()
        and query_start_loc.is_contiguous()
        and seq_lens.is_contiguous()
    )


@register("paged_attention", "cpu", _NAME, supports=_attention_ok, priority=PRIORITY)
def paged_attention(q, k_cache, v_cache, block_table, query_start_loc, seq_lens, query_lens_host, seq_lens_host, scale):
    heads, dim = q.shape[1:]
    out = torch.empty(q.shape, dtype=q.dtype)
    KERNELS.attention(
        q.data_ptr(),
        q.stride(0),
        out.data_ptr(),
        CODE[q.dtype],
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        block_table.data_ptr(),
        block_table.shape[1],
        query_start_loc.data_ptr(),
        seq_lens.data_ptr(),
        len(seq_lens_host),
        heads,
        k_cache.shape[2],
        dim,
        k_cache.shape[1],
        scale,
    )
    return out


def _write_ok(k, v, k_cache, v_cache, slot_mapping) -> bool:
    return (
        k.dtype == v.dtype == k_cache.dtype == v_cache.dtype
        and slot_mapping.dtype == torch.int64
        and k.numel() > 0
        and token_rows(k)
        and token_rows(v)
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and slot_mapping.is_contiguous()
    )


@register("kv_write", "cpu", _NAME, supports=_write_ok, priority=PRIORITY)
def kv_write(k, v, k_cache, v_cache, slot_mapping):
    size = k.element_size()
    KERNELS.kv_write(
        k.data_ptr(),
        k.stride(0) * size,
        v.data_ptr(),
        v.stride(0) * size,
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        slot_mapping.data_ptr(),
        k.shape[0],
        k.shape[1] * k.shape[2] * size,
    )
