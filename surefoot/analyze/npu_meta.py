"""The `npu::` operators that Surefoot's ops call, on the meta device: shapes and dtypes without torch_npu.

Schemas come from the registry of the torch_npu release in question. Where torch_npu is installed and imported its own
operators are used. tests/test_npu_ops.py holds each of these shape functions against the wheel's Meta kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from surefoot.analyze.registry import Registry

SHAPES: dict[str, Callable[..., Any]] = {}


def _shape(fn: Callable[..., Any]) -> Callable[..., Any]:
    SHAPES[fn.__name__.removeprefix("_shape_of_")] = fn
    return fn


@contextlib.contextmanager
def npu_operators(registry: Registry) -> Iterator[None]:
    """Within the block, `torch.ops.npu.*` of SHAPES exist and take meta tensors."""
    if hasattr(torch.ops.npu, "npu_rms_norm"):
        yield
        return
    library = torch.library.Library("npu", "FRAGMENT")
    try:
        for name, shape in SHAPES.items():
            if name in registry.schemas:
                library.define(registry.schemas[name])
                library.impl(name, shape, "Meta")
        yield
    finally:
        library._destroy()  # type: ignore[no-untyped-call]


def _rstd(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    kept = x.dim() - gamma.dim()
    return x.new_empty([*x.shape[:kept], *[1] * gamma.dim()], dtype=torch.float32)


@_shape
def _shape_of_npu_rms_norm(input, gamma, epsilon=1e-6):
    return torch.empty_like(input), _rstd(input, gamma)


@_shape
def _shape_of_npu_add_rms_norm(x1, x2, gamma, epsilon=1e-6):
    return torch.empty_like(x1), _rstd(x1, gamma), torch.empty_like(x1)


@_shape
def _shape_of_npu_swiglu(input, dim=-1):
    shape = list(input.shape)
    shape[dim] //= 2
    return input.new_empty(shape)


@_shape
def _shape_of_npu_rotary_mul(input, r1, r2, rotary_mode="half", rotate=None):
    return input.new_empty(input.shape)


@_shape
def _shape_of_npu_scatter_nd_update_(input, indices, updates):
    return input


@_shape
def _shape_of_npu_fused_infer_attention_score(query, key, value, **options):
    # The head dim of pages [blocks, block_size, H] is the query's own.
    return query.new_empty(query.shape), query.new_empty([0], dtype=torch.float32)


@_shape
def _shape_of_npu_dynamic_quant(input, **options):
    return input.new_empty(input.shape, dtype=torch.int8), input.new_empty(input.shape[:-1], dtype=torch.float32)


@_shape
def _shape_of_npu_quant_matmul(x1, x2, scale, *, output_dtype=None, **options):
    dtype = {5: torch.float16, 15: torch.bfloat16}[output_dtype]
    return x1.new_empty([len(x1), x2.shape[1]], dtype=dtype)


@_shape
def _shape_of_npu_convert_weight_to_int4pack(weight, inner_k_tiles=0):
    return weight.new_empty([len(weight), weight.shape[1] // 8])


@_shape
def _shape_of_npu_weight_quant_batchmatmul(x, weight, antiquant_scale, *rest, **options):
    return x.new_empty([len(x), weight.shape[1]])
