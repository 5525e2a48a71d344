"""Linear layers by the C++ kernels: float weights row by row as checkpoints hold them, int8 and int4 ones in panels.

Weights are packed where they lie (`pack_`); from rows the kernels work as well, but pack them anew in every call. A
token's result is bitwise the same in every batch and from both layouts.
"""

from __future__ import annotations

import torch

from surefoot.ops.cpu.common import CODE, KERNELS, PRIORITY, address, code
from surefoot.ops.quant import PANEL
from surefoot.ops.spec import register

_FLOAT, _INT8, _INT4 = 0, 1, 2
_NAME = KERNELS.isa()


def _plain(x, bias) -> bool:
    return (
        x.dtype in CODE
        and x.numel() > 0
        and x.stride(-1) == 1
        and x.dim() == 2
        and (bias is None or (bias.dtype in CODE and bias.is_contiguous()))
    )


def _float_ok(x, weight, bias=None):
    return x.dtype == weight.dtype and weight.is_contiguous() and _plain(x, bias)


@register("linear", "cpu", _NAME, supports=_float_ok, priority=PRIORITY)
def linear(x, weight, bias=None):
    return _call(x, weight, bias, _FLOAT, weight.shape[0])


def _w8_ok(x, qweight, scale, bias=None, act="float", layout="rows"):
    return (
        qweight.dtype == torch.int8
        and qweight.is_contiguous()
        and scale.dtype == torch.float32
        and scale.is_contiguous()
        and _plain(x, bias)
    )


@register("linear_w8", "cpu", _NAME, supports=_w8_ok, priority=PRIORITY)
def linear_w8(x, qweight, scale, bias=None, act="float", layout="rows"):
    return _call(x, qweight, bias, _INT8, qweight.shape[0], scale, 0, act, layout)


def _w4_ok(x, qweight, scale, group_size, bias=None, act="float", layout="rows"):
    return (
        group_size % 8 == 0
        and x.shape[-1] % group_size == 0
        and scale.dtype in CODE
        and qweight.is_contiguous()
        and scale.is_contiguous()
        and _plain(x, bias)
    )


@register("linear_w4", "cpu", _NAME, supports=_w4_ok, priority=PRIORITY)
def linear_w4(x, qweight, scale, group_size, bias=None, act="float", layout="rows"):
    return _call(x, qweight, bias, _INT4, qweight.shape[0], scale, group_size, act, layout)


def pack_(qweight: torch.Tensor, scale: torch.Tensor) -> bool:
    """Rows to panels in place, with the scales of groups; False, and nothing done, where they do not divide so.

    qweight: [out, in] int8 or [out, in / 8] int32.
    """
    tensors = [qweight.view(torch.int32)] if qweight.shape[1] % 4 == 0 and qweight.dtype == torch.int8 else []
    if qweight.dtype == torch.int32:
        tensors = [qweight, scale]
    rows = qweight.shape[0]
    if not tensors or rows % PANEL or not all(t.is_contiguous() for t in tensors):
        return False
    for t in tensors:
        KERNELS.pack(t.data_ptr(), rows, t.shape[1], t.element_size())
    return True


def _call(x, weight, bias, kind, outer, scale=None, group_size=0, act="float", layout="rows"):
    rows, inner = x.shape
    y = torch.empty(rows, outer, dtype=x.dtype)
    KERNELS.linear(
        x.data_ptr(),
        x.stride(0),
        CODE[x.dtype],
        y.data_ptr(),
        outer,
        address(bias),
        code(bias),
        weight.data_ptr(),
        address(scale),
        code(scale),
        rows,
        outer,
        inner,
        group_size,
        kind,
        8 if act == "int8" else 16,
        layout == "panels",
    )
    return y
