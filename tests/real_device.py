"""Tensors that say they are on the meta device and hold real numbers on the CPU.

A model runs on them as on a device of its own: every factory, copy and view goes through the tracer, none takes the
CPU's short cuts, and the numbers are real. A trace of such a run is what a trace on meta has to equal.
"""

from __future__ import annotations

from typing import Any

import torch
from emulated_npu.attention import KERNELS
from torch.utils._pytree import tree_leaves, tree_map

from surefoot.analyze.trace import Tracer


class RealTensor(torch.Tensor):
    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, real: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device="meta",
        )

    def __init__(self, real: torch.Tensor):
        self.numbers = real

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple, kwargs: dict) -> Any:
    """Compute on the numbers. What was made for "meta" is wrapped again; a copy to the CPU comes out bare."""
    wanted = kwargs.get("device")
    to_host = wanted is not None and torch.device(wanted).type == "cpu"
    if wanted is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    inputs: list[RealTensor] = []

    def unwrap(x: Any) -> Any:
        if isinstance(x, RealTensor):
            inputs.append(x)
            return x.numbers
        return x

    def wrap(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or isinstance(x, RealTensor) or to_host:
            return x
        # An operator that writes in place returns its argument: the same tensor, not a new one.
        same = [i for i in inputs if i.numbers is x]
        return same[0] if same else RealTensor(x)

    out = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    return tree_map(wrap, out)


class RealTracer(Tracer):
    """A tracer that computes."""

    def execute(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if func.name() == "aten::histc":  # the CPU counts floats only
            return RealTensor(func(args[0].numbers.float(), *args[1:], **kwargs).to(args[0].dtype))
        if func.namespace == "npu":
            return run(KERNELS[func.name().removeprefix("npu::")], args, kwargs)
        out = run(func, args, kwargs)
        if func.name() == "aten::scaled_dot_product_attention":
            # PyTorch's meta kernel gives rows of one head together, the CPU's rows of one token. What an NPU gives is
            # only known there; it decides whether a later `contiguous` copies.
            return RealTensor(out.numbers.contiguous())
        return out

    def take_apart(self, func: Any, key: Any, args: tuple, kwargs: dict) -> Any:
        out = super().take_apart(func, key, args, kwargs)
        if any(
            isinstance(x, torch.Tensor) and x.device.type == "meta" and not isinstance(x, RealTensor)
            for x in tree_leaves(out)
        ):
            # A view that the kernel made by itself, without another operator: the same view of the numbers.
            return run(func, args, kwargs)
        return out


@torch.inference_mode()
def put(module: torch.nn.Module) -> torch.nn.Module:
    """Move a model's parameters and buffers there, as inference tensors: views of others count versions."""
    moved: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for holder in (part._parameters, part._buffers):
            for key, tensor in holder.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    real = RealTensor(tensor.detach())
                    moved[id(tensor)] = (
                        torch.nn.Parameter(real, requires_grad=False) if holder is part._parameters else real
                    )
                holder[key] = moved[id(tensor)]
    return module
