"""Helpers for `OpSpec.samples`: random tensors of real and awkward shapes, and tolerances by dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from surefoot.ops.spec import Tolerance

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# One rounding of the result: 2^-8 relative for bf16 (8 bits of significand), 2^-11 for fp16; fp32 leaves room for the
# order of summation.
ELEMENTWISE = {F32: Tolerance(1e-5, 1e-5), BF16: Tolerance(1e-2, 1.6e-2), F16: Tolerance(1e-3, 2e-3)}
# Sums over thousands of products (matrix products, attention, the delta rule).
REDUCTION = {F32: Tolerance(1e-4, 1e-4), BF16: Tolerance(3e-2, 3e-2), F16: Tolerance(5e-3, 5e-3)}


def randn(shape: Sequence[int], dtype: torch.dtype, device: torch.device, generator: torch.Generator, scale=1.0):
    """Normal values drawn in fp32 on the generator's device, so that every dtype sees the same numbers, rounded."""
    x = torch.randn(*shape, generator=generator, dtype=torch.float32) * scale
    return x.to(device=device, dtype=dtype)


def starts(lengths: Sequence[int]) -> list[int]:
    """Packed row at which each request starts, plus the total: [0, l0, l0 + l1, ...]."""
    out = [0]
    for n in lengths:
        out.append(out[-1] + n)
    return out


def nbytes(*tensors: torch.Tensor | None) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors if t is not None))
