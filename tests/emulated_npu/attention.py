"""`npu_fused_infer_attention_score` as op-plugin's document has it (A2, A3), for paged keys without rope parts."""

from __future__ import annotations

import torch

from emulated_npu.kernels import KERNELS, kernel, need

# Sparse modes: causal with the first query at the first key, or with the last query at the last key.
NO_MASK, LEFT_UP, RIGHT_DOWN = 0, 2, 3
HALF = (torch.float16, torch.bfloat16)


@kernel
def npu_fused_infer_attention_score(query, key, value, **options):
    return _attend(query, key, value, **options), torch.zeros(0, dtype=torch.float32)


@kernel
def _npu_fused_infer_attention_score_get_max_workspace(query, key, value, **options):
    _requests(query, key, value, **options)
    return torch.empty(1 << 10, dtype=torch.uint8)


def fused_out(query, key, value, *, workspace=None, out=(), **options):
    """The `.out` overload: results go into `out`, [attention, log-sum-exp]."""
    need(workspace is not None and len(out) == 2, "fused_infer_attention_score.out: a workspace and two outputs")
    out[0].copy_(_attend(query, key, value, **options))
    return tuple(out)


KERNELS["npu_fused_infer_attention_score.out"] = fused_out


def _attend(query, key, value, **options):
    heads, kv_heads = options["num_heads"], options["num_key_value_heads"]
    out = torch.zeros_like(query)
    for rows, pages, length, mode in _requests(query, key, value, **options):
        k, v = (c[pages].flatten(0, 1)[:length].unflatten(-1, (kv_heads, -1)).float() for c in (key, value))
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        q = query[rows].float()
        scores = torch.einsum("qhd,khd->hqk", q, k) * options["scale"]
        if mode != NO_MASK:
            shift = length - len(q) if mode == RIGHT_DOWN else 0
            hidden = torch.arange(length)[None] > torch.arange(len(q))[:, None] + shift
            scores = scores.masked_fill(hidden, -torch.inf)
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(out.dtype)
    return out


def _requests(query, key, value, *, block_table, actual_seq_lengths_kv, block_size, input_layout, **options):
    """(rows of the query, its pages, its length, the mask's mode) of each request, after what the document demands."""
    heads, kv_heads = options["num_heads"], options["num_key_value_heads"]
    need(query.dtype in HALF and query.dtype == key.dtype == value.dtype, f"attention in {query.dtype}, {key.dtype}")
    need(all(t.is_contiguous() for t in (query, key, value, block_table)), "attention: contiguous tensors only")
    need(block_table.dtype == torch.int32 and block_table.dim() == 2, "attention: block_table is int32 [B, blocks]")
    need(heads % kv_heads == 0 and heads // kv_heads <= 64, f"attention: {heads} heads on {kv_heads}")
    need(key.shape == value.shape and key.shape[1] == block_size, "attention: pages [blocks, block_size, H]")
    lengths, table = list(actual_seq_lengths_kv), block_table.tolist()
    if input_layout == "TND":
        need(query.dim() == 3 and query.shape[1:] == (heads, 128), f"attention: TND of {tuple(query.shape)}")
        ends = list(options["actual_seq_lengths"])
        need(len(ends) == len(lengths) <= 4096, "attention: TND wants a cumulative end for each request")
        need(ends == sorted(ends) and ends[-1] == len(query), f"attention: ends {ends} for {len(query)} queries")
        spans = [slice(a, b) for a, b in zip([0, *ends], ends)]
    else:
        need(input_layout == "BSND" and query.dim() == 4 and query.shape[2] == heads, f"attention: {input_layout}")
        spans = [(i, slice(None)) for i in range(len(query))]
    width = query.shape[-1]
    need(key.shape[2] == kv_heads * width, f"attention: {kv_heads} heads of {width} in pages {tuple(key.shape)}")
    need(width <= 512 and width % (8 if width <= 128 else 16) == 0, f"attention: head dim {width}")
    need(len(spans) == len(lengths) == len(table), f"attention: {len(spans)} queries, {len(lengths)} lengths")
    counts = [len(query[s]) for s in spans]
    longest = max(counts)
    need(longest == 1 or (block_size % 128 == 0 and 128 <= block_size <= 512), f"attention: block_size {block_size}")
    mode = _mask_mode(**options)
    for span, row, count, length in zip(spans, table, counts, lengths):
        need(0 < count <= length <= len(row) * block_size, f"attention: {count} queries, {length} keys")
        pages = row[: -(-length // block_size)]
        need(all(0 <= p < len(key) for p in pages), f"attention: a page outside the cache, {pages}")
        yield span, pages, length, mode


def _mask_mode(*, sparse_mode=0, atten_mask=None, **options) -> int:
    if sparse_mode == NO_MASK:
        need(atten_mask is None, "attention: mode 0 with a mask is not emulated")
        return sparse_mode
    need(sparse_mode in (LEFT_UP, RIGHT_DOWN), f"attention: sparse mode {sparse_mode} is not emulated")
    need(atten_mask is not None, f"attention: sparse mode {sparse_mode} wants its mask")
    need(atten_mask.dtype in (torch.int8, torch.uint8, torch.bool), f"attention: mask of {atten_mask.dtype}")
    expected = torch.ones(2048, 2048, dtype=torch.int8).triu(1)
    need(torch.equal(atten_mask.to(torch.int8), expected), "attention: the mask is 2048 x 2048, 1 above the diagonal")
    return sparse_mode
