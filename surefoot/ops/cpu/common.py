"""What the registrations share: dtype codes, and tests of layout that are cheap enough for every call."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from surefoot.device.graphs import recorded
from surefoot.ops.cpu import kernels

assert kernels is not None
KERNELS = SimpleNamespace(**{k: recorded(f) for k, f in vars(kernels).items() if callable(f)})
PRIORITY = 10
# As `Dtype` in csrc/types.h.
CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def row_stride(x: torch.Tensor) -> int | None:
    """Elements between the rows of x seen as [rows, last]; None if they are not evenly spaced."""
    if x.is_contiguous():
        return x.shape[-1]
    if x.stride(-1) != 1:
        return None
    for i in range(x.dim() - 2):
        if x.stride(i) != x.stride(i + 1) * x.shape[i + 1]:
            return None
    return x.stride(-2)


def token_rows(x: torch.Tensor) -> bool:
    """Whether each token of x [T, ...] is one contiguous piece."""
    return x.is_contiguous() or x[0].is_contiguous()


def address(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def code(x: torch.Tensor | None) -> int:
    return 0 if x is None else CODE[x.dtype]
