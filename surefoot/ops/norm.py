"""RMSNorm and its two fused relatives. Statistics are always fp32; the result has x's dtype."""

from __future__ import annotations

import torch

from surefoot.ops.samples import ELEMENTWISE, nbytes, randn
from surefoot.ops.spec import Cost, OpSpec, Sample, define, dispatch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x: [..., D]; weight: [D] in fp32 or x's dtype. Models that store the weight minus one (Qwen3.5) pass 1 + weight.
    """
    return dispatch(RMS_NORM, x.device.type, (x, weight, eps), {})


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float):
    """Return (rms_norm(x + residual), x + residual); the sum is rounded to x's dtype, as when unfused."""
    return dispatch(ADD_RMS_NORM, x.device.type, (x, residual, weight, eps), {})


def gated_rms_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """y = rms_norm(x) * silu(gate), the output norm of a gated delta net. x, gate: [..., D]."""
    return dispatch(GATED_RMS_NORM, x.device.type, (x, gate, weight, eps), {})


def _normalise(x: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _rms_norm(x, weight, eps):
    return (_normalise(x, eps) * weight.float()).to(x.dtype)


def _add_rms_norm(x, residual, weight, eps):
    total = x + residual
    return _rms_norm(total, weight, eps), total


def _gated_rms_norm(x, gate, weight, eps):
    y = _normalise(x, eps) * weight.float()
    return (y * torch.nn.functional.silu(gate.float())).to(x.dtype)


# Rows x width of the real models (1B and 3B hidden, Qwen3.5 hidden, its q_norm heads and delta-net heads), one row, and
# an odd width.
SHAPES = [(1, 2048), (8, 2048), (512, 1024), (3, 3072), (40, 256), (16, 128), (1, 1), (5, 77)]


def _samples(*, residual=False, gate=False):
    def sample(rows, width):
        def make(dtype, device, gen):
            call = {"x": randn((rows, width), dtype, device, gen)}
            if residual:
                call["residual"] = randn((rows, width), dtype, device, gen)
            if gate:
                call["gate"] = randn((rows, width), dtype, device, gen)
            return call | {"weight": randn((width,), torch.float32, device, gen).abs() + 0.5, "eps": 1e-5}

        return Sample(f"{rows}x{width}", make)

    def zeros(dtype, device, gen):
        call = sample(2, 64).make(dtype, device, gen)
        return {k: v.zero_() if isinstance(v, torch.Tensor) and k != "weight" else v for k, v in call.items()}

    return lambda: [sample(*s) for s in SHAPES] + [Sample("all-zero rows", zeros)]


RMS_NORM = define(
    OpSpec(
        "rms_norm",
        _rms_norm,
        cost=lambda x, weight, eps: Cost(4 * x.numel(), 2 * nbytes(x) + nbytes(weight)),
        samples=_samples(),
        tolerance=ELEMENTWISE,
    )
)
ADD_RMS_NORM = define(
    OpSpec(
        "add_rms_norm",
        _add_rms_norm,
        cost=lambda x, residual, weight, eps: Cost(5 * x.numel(), 4 * nbytes(x) + nbytes(weight)),
        samples=_samples(residual=True),
        tolerance=ELEMENTWISE,
    )
)
GATED_RMS_NORM = define(
    OpSpec(
        "gated_rms_norm",
        _gated_rms_norm,
        cost=lambda x, gate, weight, eps: Cost(9 * x.numel(), 3 * nbytes(x) + nbytes(weight)),
        samples=_samples(gate=True),
        tolerance=ELEMENTWISE,
    )
)
