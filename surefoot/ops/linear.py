"""Dense linear layers and the token embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from surefoot.ops.samples import ELEMENTWISE, REDUCTION, nbytes, randn
from surefoot.ops.spec import Cost, OpSpec, Sample, define, dispatch


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias. x: [T, in]; weight: [out, in]; bias: [out] or None; all of one dtype."""
    return dispatch(LINEAR, x.device.type, (x, weight, bias), {})


def embedding(input_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows of weight [vocab, D] at input_ids [T]."""
    return dispatch(EMBEDDING, weight.device.type, (input_ids, weight), {})


def _linear(x, weight, bias=None):
    return F.linear(x, weight, bias)


def _linear_cost(x, weight, bias=None):
    rows = x.numel() // x.shape[-1]
    out = rows * weight.shape[0] * x.element_size()
    return Cost(2.0 * rows * weight.numel(), nbytes(x, weight, bias) + out)


def _linear_samples():
    def sample(rows, inner, outer, bias=False):
        def make(dtype, device, gen):
            return {
                "x": randn((rows, inner), dtype, device, gen),
                "weight": randn((outer, inner), dtype, device, gen, inner**-0.5),
                "bias": randn((outer,), dtype, device, gen) if bias else None,
            }

        return Sample(f"{rows}x{inner}->{outer}{' bias' if bias else ''}", make)

    shapes = [
        (1, 2048, 512),
        (8, 2048, 2048),
        (64, 1024, 3584),
        (3, 8192, 256),
        (1, 64, 7),
        (5, 33, 17),
        (17, 1024, 16),
    ]
    return [sample(*s) for s in shapes] + [sample(4, 96, 40, bias=True)]


def _embedding_samples():
    def make(dtype, device, gen):
        ids = torch.randint(0, 512, (9,), generator=gen).to(device)
        return {"input_ids": ids, "weight": randn((512, 64), dtype, device, gen)}

    return [Sample("9 of 512x64", make)]


LINEAR = define(OpSpec("linear", _linear, cost=_linear_cost, samples=_linear_samples, tolerance=REDUCTION))
EMBEDDING = define(
    OpSpec(
        "embedding",
        lambda input_ids, weight: F.embedding(input_ids, weight),
        cost=lambda input_ids, weight: Cost(
            0.0, nbytes(input_ids) + 2 * input_ids.numel() * weight.shape[1] * weight.element_size()
        ),
        samples=_embedding_samples,
        tolerance=ELEMENTWISE,
    )
)
