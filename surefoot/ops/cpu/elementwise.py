"""RMSNorm and relatives, gates, both embeddings and the greedy choice by the C++ kernels."""

from __future__ import annotations

import torch

from surefoot.ops.cpu.common import CODE, KERNELS, PRIORITY, row_stride, token_rows
from surefoot.ops.spec import register

_NAME = KERNELS.isa()
_SWIGLU, _SIGMOID_MUL, _ADD = 0, 1, 2


def _norm_ok(x, weight, eps) -> bool:
    return x.dtype in CODE and weight.dtype in CODE and x.numel() > 0 and row_stride(x) is not None


def _add_ok(x, residual, weight, eps) -> bool:
    return _norm_ok(x, weight, eps) and residual.dtype == x.dtype and row_stride(residual) is not None


def _gated_ok(x, gate, weight, eps) -> bool:
    return _norm_ok(x, weight, eps) and gate.dtype == x.dtype and row_stride(gate) is not None


def _norm(x, other, weight, eps, y, total=None):
    width = x.shape[-1]
    KERNELS.norm(
        x.data_ptr(),
        row_stride(x),
        None if other is None else other.data_ptr(),
        0 if other is None else row_stride(other),
        weight.data_ptr(),
        CODE[weight.dtype],
        y.data_ptr(),
        None if total is None else total.data_ptr(),
        CODE[x.dtype],
        x.numel() // width,
        width,
        eps,
    )
    return y


@register("rms_norm", "cpu", _NAME, supports=_norm_ok, priority=PRIORITY)
def rms_norm(x, weight, eps):
    return _norm(x, None, weight, eps, torch.empty(x.shape, dtype=x.dtype))


@register("add_rms_norm", "cpu", _NAME, supports=_add_ok, priority=PRIORITY)
def add_rms_norm(x, residual, weight, eps):
    total = torch.empty(x.shape, dtype=x.dtype)
    return _norm(x, residual, weight, eps, torch.empty(x.shape, dtype=x.dtype), total), total


@register("gated_rms_norm", "cpu", _NAME, supports=_gated_ok, priority=PRIORITY)
def gated_rms_norm(x, gate, weight, eps):
    return _norm(x, gate, weight, eps, torch.empty(x.shape, dtype=x.dtype))


def _gate_ok(a, b) -> bool:
    return (
        a.dtype in CODE
        and a.dtype == b.dtype
        and a.numel() > 0
        and row_stride(a) is not None
        and row_stride(b) is not None
    )


def _gate(op, a, b):
    width = a.shape[-1]
    y = torch.empty(a.shape, dtype=a.dtype)
    KERNELS.gate(
        op,
        CODE[a.dtype],
        a.data_ptr(),
        row_stride(a),
        b.data_ptr(),
        row_stride(b),
        y.data_ptr(),
        a.numel() // width,
        width,
    )
    return y


@register("swiglu", "cpu", _NAME, supports=lambda gate, up: _gate_ok(gate, up), priority=PRIORITY)
def swiglu(gate, up):
    return _gate(_SWIGLU, gate, up)


@register("sigmoid_mul", "cpu", _NAME, supports=lambda x, gate: _gate_ok(x, gate), priority=PRIORITY)
def sigmoid_mul(x, gate):
    return _gate(_SIGMOID_MUL, x, gate)


@register("add", "cpu", _NAME, supports=lambda x, y: x.shape == y.shape and _gate_ok(x, y), priority=PRIORITY)
def add(x, y):
    return _gate(_ADD, x, y)


def _ids_ok(ids) -> bool:
    return ids.dtype == torch.int64 and ids.dim() == 1 and ids.is_contiguous() and ids.numel() > 0


@register(
    "embedding",
    "cpu",
    _NAME,
    supports=lambda input_ids, weight: _ids_ok(input_ids) and weight.is_contiguous(),
    priority=PRIORITY,
)
def embedding(input_ids, weight):
    rows, width = weight.shape
    tokens = input_ids.shape[0]
    out = torch.empty(tokens, width, dtype=weight.dtype)
    KERNELS.gather(weight.data_ptr(), rows, width * weight.element_size(), input_ids.data_ptr(), out.data_ptr(), tokens)
    return out


def _angles_ok(positions, inv_freq) -> bool:
    return _ids_ok(positions) and inv_freq.dtype == torch.float32 and inv_freq.is_contiguous()


@register("rotary_angles", "cpu", _NAME, supports=_angles_ok, priority=PRIORITY)
def rotary_angles(positions, inv_freq):
    tokens, half = positions.shape[0], inv_freq.shape[-1]
    cos, sin = torch.empty(tokens, half), torch.empty(tokens, half)
    KERNELS.rotary_angles(
        positions.data_ptr(),
        inv_freq.data_ptr(),
        half if inv_freq.dim() == 2 else 0,
        cos.data_ptr(),
        sin.data_ptr(),
        tokens,
        half,
    )
    return cos, sin


def _rotary_ok(q, k, cos, sin) -> bool:
    return (
        q.dtype in CODE
        and q.dtype == k.dtype
        and cos.dtype == sin.dtype == torch.float32
        and q.numel() > 0
        and token_rows(q)
        and token_rows(k)
        and cos.is_contiguous()
        and sin.is_contiguous()
    )


@register("rotary", "cpu", _NAME, supports=_rotary_ok, priority=PRIORITY)
def rotary(q, k, cos, sin):
    q_out, k_out = torch.empty(q.shape, dtype=q.dtype), torch.empty(k.shape, dtype=k.dtype)
    tokens, heads, dim = q.shape
    KERNELS.rotary(
        CODE[q.dtype],
        q.data_ptr(),
        q.stride(0),
        k.data_ptr(),
        k.stride(0),
        cos.data_ptr(),
        sin.data_ptr(),
        q_out.data_ptr(),
        k_out.data_ptr(),
        tokens,
        heads,
        k.shape[1],
        dim,
        cos.shape[1],
    )
    return q_out, k_out


def argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.cpu.argmax`."""
    rows, width = logits.shape
    best = torch.empty(rows, dtype=logits.dtype)
    index = torch.empty(rows, dtype=torch.int64)
    KERNELS.argmax(
        CODE[logits.dtype], logits.data_ptr(), logits.stride(0), best.data_ptr(), index.data_ptr(), rows, width
    )
    return best, index


def takes_argmax(logits: torch.Tensor) -> bool:
    return logits.dtype in CODE and logits.dim() == 2 and logits.numel() > 0 and logits.stride(1) == 1
