"""Answers every operator on `npu:0`: `npu::` calls by plain PyTorch after the wheel's checks, aten calls by the CPU.

An aten operator runs only if the registry says that an NPU has a kernel for it; a composite is taken apart by PyTorch's
own kernel, as on the device. A CPU fallback, an unknown operator, float64, and a CPU tensor among NPU tensors are
errors.
"""

from __future__ import annotations

from typing import Any

import torch

from emulated_npu.attention import KERNELS
from emulated_npu.tensor import NpuTensor, bare, compute
from emulated_npu.wheel import Contract
from surefoot.analyze.registry import Registry, Status
from surefoot.analyze.trace import Tracer

REFUSED = (Status.FALLBACK, Status.UNSUPPORTED, Status.UNKNOWN)
# Operators whose purpose is to bring a host tensor to the device or back.
COPIES = ("aten::_to_copy", "aten::copy_")
# Composites whose kernel calls them again where gradients are recorded.
ALIASES = ("aten::detach", "aten::alias")


class NpuError(AssertionError):
    """What a device would refuse, do slowly on the CPU, or silently compute in another dtype."""


class Emulator(Tracer):
    """`uses`: every operator with its status, dtypes and shapes; `npu_calls`: how often each npu:: call was
    answered."""

    def __init__(self, contract: Contract, registry: Registry):
        super().__init__(registry, device="npu")
        self.contract = contract
        self.npu_calls: dict[str, int] = {}

    def _refuse_mixtures(self, name: str, args: tuple, kwargs: dict) -> None:
        tensors = _tensors((args, kwargs))
        if any(t.dtype is torch.float64 for t in tensors) or kwargs.get("dtype") is torch.float64:
            raise NpuError(f"{name} in float64: an NPU computes it in float32 without saying so")
        strays = [t for t in tensors if t.device.type == "cpu" and t.dim() > 0]
        if strays and name not in COPIES:
            raise NpuError(f"{name} mixes npu:0 and cpu tensors ({tuple(strays[0].shape)} on the CPU)")

    def execute(self, func: Any, args: tuple, kwargs: dict) -> Any:
        name = func.name()
        namespace, _, short = name.partition("::")
        status = self.registry.status(name, torch.__version__)
        if status in REFUSED:
            raise NpuError(f"{name}: {status} on torch-npu {self.registry.version}")
        self._refuse_mixtures(name, args, kwargs)
        if namespace == "npu":
            self.npu_calls[short] = self.npu_calls.get(short, 0) + 1
            return self._answer(short, func, args, kwargs)
        out = compute(func, args, kwargs)
        if any(t.dtype is torch.float64 and t.device.type == "npu" for t in _tensors(out)):
            raise NpuError(f"{name} gives float64, which an NPU does not compute")
        return out

    def take_apart(self, func: Any, key: Any, args: tuple, kwargs: dict) -> Any:
        if func.name() in ALIASES:
            return compute(func, args, kwargs)
        out = super().take_apart(func, key, args, kwargs)
        if any(t.device.type == "npu" and not isinstance(t, NpuTensor) for t in _tensors(out)):
            # A view that the kernel made by itself, without another operator: the same view of the numbers.
            return compute(func, args, kwargs)
        return out

    def _answer(self, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
        """Our numbers for an npu:: call, after the wheel's Meta kernel has seen the same shapes and dtypes."""
        if name not in KERNELS:
            raise NpuError(f"npu::{name}: the emulator has no answer for it yet")
        meta = self.contract.meta.get(name)
        expected = None
        if meta is not None:
            expected = meta(*_on_meta(args), **{key: _on_meta(value) for key, value in kwargs.items()})
        out = KERNELS[name](*bare(args), **{key: bare(value) for key, value in kwargs.items()})
        if meta is not None:
            _compare(name, expected, out)
        same = {id(t.numbers): t for t in _tensors((args, kwargs)) if isinstance(t, NpuTensor)}
        wrapped = [same[id(x)] if id(x) in same else NpuTensor(x) for x in _tensors(out)]
        return tuple(wrapped) if isinstance(out, (list, tuple)) else wrapped[0]


def _compare(name: str, expected: Any, out: Any) -> None:
    wanted = [(tuple(t.shape), t.dtype) for t in _tensors(expected)]
    given = [(tuple(t.shape), t.dtype) for t in _tensors(out)]
    if wanted != given:
        raise NpuError(f"npu::{name}: the wheel's Meta kernel says {wanted}, the emulator's answer is {given}")


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return []
    return [tensor for item in tree for tensor in _tensors(item)]


def _on_meta(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return [_on_meta(item) for item in x]
    if not isinstance(x, torch.Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
