"""What each `npu::` operator computes, in plain PyTorch from op-plugin's documents, and what CANN asks of its arguments.

The numbers are computed in fp32 and rounded once, as the kernels' own documents have it. Independent of Surefoot's
references: a wrong reference does not make a wrong call look right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

KERNELS: dict[str, Callable[..., Any]] = {}
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class RefusedByCann(AssertionError):
    """Arguments that op-plugin's documents exclude."""


def need(condition: bool, why: str) -> None:
    if not condition:
        raise RefusedByCann(why)


def kernel(fn: Callable[..., Any]) -> Callable[..., Any]:
    KERNELS[fn.__name__] = fn
    return fn


@kernel
def npu_rms_norm(x, gamma, epsilon=1e-6):
    need(x.dtype in FLOATS, f"rms_norm of {x.dtype}")
    need(gamma.dtype in (x.dtype, torch.float32), f"rms_norm: gamma {gamma.dtype} for {x.dtype}")
    need(gamma.shape == x.shape[x.dim() - gamma.dim() :], f"rms_norm: gamma {gamma.shape} for {x.shape}")
    dims = tuple(range(x.dim() - gamma.dim(), x.dim()))
    rstd = torch.rsqrt(x.float().square().mean(dims, keepdim=True) + epsilon)
    return (x.float() * rstd * gamma.float()).to(x.dtype), rstd


@kernel
def npu_add_rms_norm(x1, x2, gamma, epsilon=1e-6):
    need(x1.dtype == x2.dtype == gamma.dtype, f"add_rms_norm of {x1.dtype}, {x2.dtype}, gamma {gamma.dtype}")
    need(x1.shape == x2.shape, f"add_rms_norm of {x1.shape} and {x2.shape}")
    total = x1 + x2
    y, rstd = npu_rms_norm(total, gamma, epsilon)
    return y, rstd, total


@kernel
def npu_swiglu(x, dim=-1):
    need(x.dtype in FLOATS and x.shape[dim] % 2 == 0, f"swiglu of {x.dtype} {tuple(x.shape)}")
    gate, up = x.float().chunk(2, dim)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


@kernel
def npu_rotary_mul(x, r1, r2, rotary_mode="half", rotate=None):
    need(rotary_mode == "half" and rotate is None, f"rotary_mul in mode {rotary_mode}")
    need(x.dim() == r1.dim() == r2.dim() == 4, "rotary_mul: three or four dimensions, and the same for all")
    need(x.dtype == r1.dtype == r2.dtype, f"rotary_mul of {x.dtype} by {r1.dtype}, {r2.dtype}")
    b, s, n, d = x.shape
    need(d % 2 == 0 and d < 896 and b < 1000 and n < 1000, f"rotary_mul of {tuple(x.shape)}")
    for r in (r1, r2):
        need(tuple(r.shape) in ((1, s, 1, d), (b, s, 1, d), (b, s, n, d)), f"rotary_mul by {tuple(r.shape)}")
        need(bool((r.float().abs() <= 1).all()), "rotary_mul: a factor outside [-1, 1]")
    left, right = x.float().chunk(2, -1)
    return (x.float() * r1.float() + torch.cat((-right, left), -1) * r2.float()).to(x.dtype)


@kernel
def npu_scatter_nd_update_(x, indices, updates):
    need(indices.dtype in (torch.int32, torch.int64) and indices.dim() == 2 and indices.shape[1] == 1, "scatter_nd")
    need(x.dtype == updates.dtype, f"scatter_nd_update_ of {updates.dtype} into {x.dtype}")
    need(updates.shape == (len(indices), *x.shape[1:]), f"scatter_nd_update_ of {updates.shape} into {x.shape}")
    need(x.is_contiguous() and len(indices.unique()) == len(indices), "scatter_nd_update_: each row once")
    need(bool((indices >= 0).all() and (indices < len(x)).all()), "scatter_nd_update_: index out of range")
    x[indices[:, 0].long()] = updates
    return x
