"""Linear layers with quantised weights.

- W8A16: `npu_weight_quant_batchmatmul` with an int8 weight and a scale per output channel, rounded to x's dtype as it
  demands.
- W8A8: `npu_dynamic_quant` (int8 per token), then `npu_quant_matmul` with both scales in fp32.
- W4A16: `npu_weight_quant_batchmatmul` with int4 in int32, packed by `npu_convert_weight_to_int4pack` on first use.
  The packed copy stays beside the stored one (half a byte per weight each), which the reference needs.

All three take fp16 and bf16, and at most 65,535 inputs or outputs (op-plugin's documents). Beyond that, and in fp32,
W8A8 multiplies the integers as fp32 and the others take the reference. Unlike the reference, what a token with a NaN
or an infinity gives is up to the device.
"""

from __future__ import annotations

import torch

from surefoot.ops.npu.common import HALF, PRIORITY, need
from surefoot.ops.quant import quantise_tokens, unpack_int4
from surefoot.ops.spec import register

MAX_SIDE = 65_535


def _w8_ok(x, qweight, scale, bias=None, act="float", layout="rows") -> bool:
    fits = x.dim() == 2 and max(qweight.shape) <= MAX_SIDE and x.numel() > 0
    return layout == "rows" and x.dtype in HALF and fits


@register("linear_w8", "npu", "npu_quant_matmul", supports=_w8_ok, priority=PRIORITY)
def linear_w8(x, qweight, scale, bias=None, act="float", layout="rows"):
    _check(x, qweight.shape[1], bias, len(qweight))
    need(qweight.dtype is torch.int8 and scale.shape == qweight.shape[:1], "w8: int8 weights and a scale for each row")
    if act == "int8":
        q, token_scale = torch.ops.npu.npu_dynamic_quant(x)
        return torch.ops.npu.npu_quant_matmul(
            q, qweight.t(), scale, pertoken_scale=token_scale, bias=bias, output_dtype=x.dtype
        )
    return torch.ops.npu.npu_weight_quant_batchmatmul(x, qweight.t(), scale.to(x.dtype), bias=_wide_bias(bias, x.dtype))


def _wide_ok(x, qweight, scale, bias=None, act="float", layout="rows") -> bool:
    return layout == "rows" and act == "int8"


@register("linear_w8", "npu", "fp32 integers", supports=_wide_ok)
def linear_w8_wide(x, qweight, scale, bias=None, act="int8", layout="rows"):
    """Integer products summed in fp32: exact to 2^24, beyond that to 1e-7. The reference's fp64 does not exist here."""
    q, token_scale = quantise_tokens(x)
    y = (q @ qweight.float().t()) * (token_scale * scale)
    return (y if bias is None else y + bias).to(x.dtype)


def _w4_ok(x, qweight, scale, group_size, bias=None, act="float", layout="rows") -> bool:
    inner = 8 * qweight.shape[1]
    # NOTE: the transpose of a single row or column counts as not transposed, and would be read as another shape.
    sides = max(inner, len(qweight)) <= MAX_SIDE and min(qweight.shape) > 1
    groups = group_size == inner or (group_size % 32 == 0 and 32 <= group_size < inner)
    return (
        layout == "rows" and act == "float" and x.dtype in HALF and x.dim() == 2 and sides and groups and x.numel() > 0
    )


@register("linear_w4", "npu", "npu_weight_quant_batchmatmul", supports=_w4_ok, priority=PRIORITY)
def linear_w4(x, qweight, scale, group_size, bias=None, act="float", layout="rows"):
    inner = 8 * qweight.shape[1]
    _check(x, inner, bias, len(qweight))
    need(
        scale.shape == (len(qweight), -(-inner // group_size)),
        f"w4: scales {tuple(scale.shape)} for groups of {group_size}",
    )
    group = 0 if group_size == inner else group_size
    return torch.ops.npu.npu_weight_quant_batchmatmul(
        x,
        _packed(qweight).t(),
        scale.to(x.dtype).t(),
        bias=_wide_bias(bias, x.dtype),
        antiquant_group_size=group,
    )


def _packed(qweight: torch.Tensor) -> torch.Tensor:
    """[out, in / 8] int32 as the NPU orders its int4, made from the stored form once."""
    packed = getattr(qweight, "packed_for_npu", None)
    if packed is None:
        packed = torch.ops.npu.npu_convert_weight_to_int4pack(unpack_int4(qweight).to(torch.int32))
        qweight.packed_for_npu = packed  # type: ignore[attr-defined]
    return packed


def _wide_bias(bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """The weight-only product wants its bias in fp32 beside bf16, in fp16 beside fp16."""
    return bias.float() if bias is not None and dtype is torch.bfloat16 else bias


def _check(x: torch.Tensor, inner: int, bias: torch.Tensor | None, outer: int) -> None:
    need(x.shape[1] == inner, f"{x.shape[1]} inputs for a weight of {inner}")
    need(bias is None or bias.shape == (outer,), "a bias for each output")
