"""Causal attention over the paged KV cache, as every full-attention layer does it after its projections."""

from __future__ import annotations

import torch

from surefoot import ops
from surefoot.core.batch import Batch, KVPages


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, layer_idx: int, scale: float
) -> torch.Tensor:
    """Write this step's k, v [T, Hk, D] into the layer's pages, then attend with q [T, H, D]. Returns [T, H * D]."""
    pages = batch.layers[layer_idx]
    assert isinstance(pages, KVPages)
    ops.kv_write(k, v, pages.k, pages.v, batch.slot_mapping)
    out = ops.paged_attention(
        q,
        pages.k,
        pages.v,
        batch.block_table,
        batch.query_start_loc,
        batch.seq_lens,
        batch.query_lens_host,
        batch.seq_lens_host,
        scale,
    )
    return out.flatten(1)
