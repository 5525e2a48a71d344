"""Tensors on `npu:0` whose numbers are on the CPU: a wrapper subclass, with real sizes, strides and views."""

from __future__ import annotations

from typing import Any

import torch


class NpuTensor(torch.Tensor):
    """`numbers` holds the data. A view of an NpuTensor wraps a view of its numbers, so aliases stay aliases."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device="npu:0",
        )

    def __init__(self, numbers: torch.Tensor):
        self.numbers = numbers

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def tolist(self) -> list:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: tuple, kwargs: dict) -> Any:
    """Run an operator on the numbers. What is made on "npu" is wrapped; a copy to the CPU comes out bare."""
    wanted = kwargs.get("device")
    to_host = wanted is not None and torch.device(wanted).type == "cpu"
    if wanted is not None:
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"} | {"device": torch.device("cpu")}
    inputs: list[NpuTensor] = []

    def wrap(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return type(x)(*map(wrap, x)) if hasattr(x, "_fields") else type(x)(map(wrap, x))
        if not isinstance(x, torch.Tensor) or isinstance(x, NpuTensor) or to_host:
            return x
        # An operator that writes in place returns its argument: the same tensor, not a new one.
        same = [i for i in inputs if i.numbers is x]
        return same[0] if same else NpuTensor(x)

    return wrap(func(*bare(args, inputs), **{key: bare(value, inputs) for key, value in kwargs.items()}))


def bare(x: Any, seen: list[NpuTensor] | None = None) -> Any:
    """The numbers in place of NpuTensors, also in lists; `seen` collects those that were there."""
    # NOTE: by hand and not by tree_map, which would take most of the time of an emulated step.
    if isinstance(x, NpuTensor):
        if seen is not None:
            seen.append(x)
        return x.numbers
    if isinstance(x, (list, tuple)):
        return [bare(item, seen) for item in x]
    return x
