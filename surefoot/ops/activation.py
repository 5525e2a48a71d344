"""Elementwise: SwiGLU of an MLP, the sigmoid output gate of Qwen3.5's attention, and the residual addition."""

from __future__ import annotations

import torch

from surefoot.ops.samples import ELEMENTWISE, nbytes, randn
from surefoot.ops.spec import Cost, OpSpec, Sample, define, dispatch


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up. gate, up: [T, I]."""
    return dispatch(SWIGLU, gate.device.type, (gate, up), {})


def sigmoid_mul(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(gate). x, gate: [T, D] or [T, H, D]."""
    return dispatch(SIGMOID_MUL, x.device.type, (x, gate), {})


def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x + y, both [T, D]: what a layer adds to its residual where no norm follows in the same layer."""
    return dispatch(ADD, x.device.type, (x, y), {})


def _swiglu(gate, up):
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)


def _sigmoid_mul(x, gate):
    return (x.float() * torch.sigmoid(gate.float())).to(x.dtype)


def _samples(first: str, second: str):
    def sample(rows, width, scale=1.0):
        def make(dtype, device, gen):
            return {
                first: randn((rows, width), dtype, device, gen, scale),
                second: randn((rows, width), dtype, device, gen),
            }

        return Sample(f"{rows}x{width} scale {scale:g}", make)

    return lambda: [sample(1, 8192), sample(8, 3584), sample(129, 512), sample(3, 7), sample(2, 64, 50.0)]


SWIGLU = define(
    OpSpec(
        "swiglu",
        _swiglu,
        cost=lambda gate, up: Cost(5 * gate.numel(), 3 * nbytes(gate)),
        samples=_samples("gate", "up"),
        tolerance=ELEMENTWISE,
    )
)
SIGMOID_MUL = define(
    OpSpec(
        "sigmoid_mul",
        _sigmoid_mul,
        cost=lambda x, gate: Cost(5 * x.numel(), 3 * nbytes(x)),
        samples=_samples("x", "gate"),
        tolerance=ELEMENTWISE,
    )
)
ADD = define(
    OpSpec(
        "add",
        lambda x, y: x + y,
        cost=lambda x, y: Cost(x.numel(), 3 * nbytes(x)),
        samples=_samples("x", "y"),
        tolerance=ELEMENTWISE,
    )
)
