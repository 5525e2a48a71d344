"""What each `npu::` operator computes, in plain PyTorch from op-plugin's documents, and what CANN asks of its
arguments.

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
    need(bool((indices >= 0).all() and (indices < len(x)).all()), "scatter_nd_update_: index out of range")
    x[indices[:, 0].long()] = updates
    return x


@kernel
def npu_dynamic_quant(x, smooth_scales=None, group_index=None, dst_type=None, quant_mode="pertoken", dst_type_max=0.0):
    need(x.dtype in (torch.float16, torch.bfloat16) and x.dim() > 1, f"dynamic_quant of {x.dtype}")
    need(
        smooth_scales is None and dst_type in (None, torch.int8) and quant_mode == "pertoken", "dynamic_quant: options"
    )
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    q = torch.where(scale > 0, x.float() / scale, 0.0).round()
    return q.to(torch.int8), scale.squeeze(-1)


@kernel
def npu_quant_matmul(x1, x2, scale, *, pertoken_scale=None, bias=None, output_dtype=None, **others):
    need(not others, f"quant_matmul: {list(others)}")
    need(x1.dtype == x2.dtype == torch.int8, f"quant_matmul of {x1.dtype} and {x2.dtype}")
    dtype = {5: torch.float16, 15: torch.bfloat16}.get(output_dtype, output_dtype)
    scales = (torch.float32, torch.bfloat16) if dtype == torch.bfloat16 else (torch.float32,)
    need(dtype in (torch.float16, torch.bfloat16) and scale.dtype in scales, f"quant_matmul to {dtype}")
    need(pertoken_scale is not None and pertoken_scale.dtype == torch.float32, "quant_matmul: pertoken_scale in fp32")
    need(pertoken_scale.shape == (len(x1),) and max(x1.shape[-1], x2.shape[-1]) <= 65535, "quant_matmul: sizes")
    need(x2.is_contiguous() or x2.t().is_contiguous(), "quant_matmul: x2 is plain or transposed")
    total = x1.double() @ x2.double()
    out = total * scale.double() * pertoken_scale.double().unsqueeze(-1)
    return (out if bias is None else out + bias.double()).to(dtype)


@kernel
def npu_convert_weight_to_int4pack(weight, inner_k_tiles=0):
    need(weight.dtype == torch.int32 and weight.dim() == 2 and weight.shape[1] % 8 == 0, "int4pack: int32 [n, 8 k]")
    need(weight.is_contiguous() and bool((weight.abs() <= 8).all() and (weight < 8).all()), "int4pack: -8 ... 7")
    nibbles = (weight & 15).unflatten(-1, (-1, 8))
    return (nibbles << torch.arange(0, 32, 4, dtype=torch.int32)).sum(-1, dtype=torch.int64).to(torch.int32)


@kernel
def npu_weight_quant_batchmatmul(
    x, weight, antiquant_scale, antiquant_offset=None, quant_scale=None, quant_offset=None, bias=None,
    antiquant_group_size=0, inner_precise=0, weight_dtype=None,
):  # fmt: skip
    need(x.dtype in (torch.float16, torch.bfloat16), f"weight_quant_batchmatmul of {x.dtype}")
    need(antiquant_scale.dtype == x.dtype, f"weight_quant_batchmatmul: scale {antiquant_scale.dtype} for {x.dtype}")
    need(all(o is None for o in (antiquant_offset, quant_scale, quant_offset)), "weight_quant_batchmatmul: options")
    wanted = torch.float32 if x.dtype == torch.bfloat16 else torch.float16
    need(bias is None or bias.dtype == wanted, f"weight_quant_batchmatmul: bias beside {x.dtype} is {wanted}")
    if weight.dtype == torch.int32:
        need(not weight.is_contiguous() and weight.t().is_contiguous(), "weight_quant_batchmatmul: int4 transposed")
        nibbles = (weight.t().unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
        weight = ((nibbles ^ 8) - 8).flatten(-2).t()
    need(weight.dtype in (torch.int8, torch.int32) and len(weight) == x.shape[1], "weight_quant_batchmatmul: K")
    k, n = weight.shape
    need(max(k, n) <= 65535, f"weight_quant_batchmatmul: {k} x {n}")
    if antiquant_group_size:
        need(32 <= antiquant_group_size < k and antiquant_group_size % 32 == 0, f"group {antiquant_group_size} of {k}")
        need(antiquant_scale.shape == (-(-k // antiquant_group_size), n), f"scales {tuple(antiquant_scale.shape)}")
        scale = antiquant_scale.float().repeat_interleave(antiquant_group_size, dim=0)[:k]
    else:
        need(tuple(antiquant_scale.shape) in ((n,), (1, n)), f"scales {tuple(antiquant_scale.shape)} for {n} outputs")
        scale = antiquant_scale.float().reshape(1, n)
    y = x.float() @ (weight.float() * scale)
    return (y if bias is None else y + bias.float()).to(x.dtype)
