"""Which operators a forward pass needs on a device, seen without the device, by dispatching as the device would.

Under `torch.inference_mode()` every operator reaches the tracer whole, before PyTorch takes it apart. The registry then
decides as the dispatcher does for NPU tensors: an operator with an NPU kernel is a leaf, a composite is taken apart by
the same C++ kernel that would take it apart there, and the rest is a CPU fallback or missing. On the meta device no
data is needed, so neither weights nor memory are. Operators on host tensors alone are host work and not counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from surefoot.analyze.registry import Registry, Status

_KEY = torch._C.DispatchKey
_COMPOSITE_KEYS = (
    _KEY.CompositeImplicitAutograd,
    _KEY.CompositeExplicitAutograd,
    _KEY.CompositeExplicitAutogradNonFunctional,
)
# Composites that read values on their way, and what that costs. Taken as one operator, because meta has no values.
READS_VALUES = {"aten::_grouped_mm": "copies the group offsets to the host, then one matrix product per group"}
TO_HOST = ("aten::_to_copy", "aten::_local_scalar_dense")

Shape = list[tuple[int, int]]  # (least, largest) of each dimension


@dataclass
class OpUse:
    """One operator with one combination of dtypes and ranks, over all passes of a phase.

    shapes: range of each tensor argument.  nbytes: in and out, all calls.  parts_of: the composites that called it.
    """

    name: str
    dtypes: tuple[str, ...]
    status: Status
    shapes: list[Shape]
    calls: int = 0
    nbytes: int = 0
    parts_of: set[str] = field(default_factory=set)

    def saw(self, tensors: list[torch.Tensor], nbytes: int, parent: str | None) -> None:
        for shape, tensor in zip(self.shapes, tensors):
            for i, n in enumerate(tensor.shape):
                shape[i] = (min(shape[i][0], n), max(shape[i][1], n))
        self.calls += 1
        self.nbytes += nbytes
        if parent:
            self.parts_of.add(parent)


class HostData(TorchFunctionMode):
    """`torch.tensor([1, 2], device=d)` as a device has it: made on the host, then copied. On meta it is no copy."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.new_tensor and args[0].device.type == self.device:
            source = args[0]
            return torch.tensor(*args[1:], **{"dtype": source.dtype} | kwargs | {"device": "cpu"}).to(source.device)
        wanted = kwargs.get("device")
        made = func is torch.tensor or (func is torch.as_tensor and not isinstance(args[0], torch.Tensor))
        if made and wanted is not None and torch.device(wanted).type == self.device:
            return func(*args, **kwargs | {"device": "cpu"}).to(wanted)
        return func(*args, **kwargs)


class Tracer(TorchDispatchMode):
    """`with Tracer(registry) as tracer: model(...)`; then `tracer.uses`, and `tracer.passes` as the caller counts them.

    answer_host: a copy to the host is answered with zeros instead of an error, for code that only passes values on.
    """

    def __init__(self, registry: Registry, device: str = "meta", answer_host: bool = False):
        super().__init__()
        self.registry, self.device, self.answer_host = registry, device, answer_host
        self.found: dict[tuple, OpUse] = {}
        self.passes = 0
        self.host_copies = 0
        self._parents: list[str] = []
        self._host_data = HostData(device)

    def __enter__(self) -> Tracer:
        self._host_data.__enter__()
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._host_data.__exit__(*exc)

    @property
    def uses(self) -> list[OpUse]:
        return list(self.found.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors(args) + _tensors(tuple(kwargs.values()))
        if not self._concerns(tensors, args, kwargs):
            return func(*args, **kwargs)
        name = func.name()
        status = self.registry.status(name, torch.__version__)
        key = _composite_key(name) if status in (Status.COMPOSITE, Status.UNKNOWN) else None
        if key is None or name in READS_VALUES:
            result = self.execute(func, args, kwargs)
            moved = sum(t.nbytes for t in tensors) + sum(t.nbytes for t in _tensors((result,)))
            self._record(name, status, tensors, moved)
            return result
        self._record(name, Status.COMPOSITE, tensors, 0)
        return self.take_apart(func, key, args, kwargs)

    def take_apart(self, func: Any, key: Any, args: tuple, kwargs: dict) -> Any:
        """Run a composite's own kernel and trace what it calls."""
        with self._inside(func.name()):
            return func._op_dk(key, *args, **kwargs)

    def execute(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Run a leaf. On meta there is nothing to run but the shapes."""
        if func.name() in TO_HOST and _leaves_device(func, kwargs):
            self.host_copies += 1
            if self.answer_host and func.name() == "aten::_to_copy":
                source = args[0]
                return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype, device="cpu")
        return func(*args, **kwargs)

    def _concerns(self, tensors: list[torch.Tensor], args: tuple, kwargs: dict) -> bool:
        """Whether the operator works on the traced device, not between host tensors."""
        wanted = [kwargs.get("device"), *(a for a in args if isinstance(a, torch.device))]  # `to` has it among its args
        made_there = any(d is not None and torch.device(d).type == self.device for d in wanted)
        return made_there or any(t.device.type == self.device for t in tensors)

    @contextlib.contextmanager
    def _inside(self, name: str) -> Iterator[None]:
        """Trace what a composite's kernel calls. PyTorch turns a mode off while it handles an operator."""
        self._parents.append(name)
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)
            self._parents.pop()

    def _record(self, name: str, status: Status, tensors: list[torch.Tensor], nbytes: int) -> None:
        # Tensors of a list (cat, stack, index) may be many: three show what there is to see.
        tensors = tensors[:3]
        dtypes = tuple(str(t.dtype).removeprefix("torch.") for t in tensors)
        key = (name, dtypes, tuple(t.dim() for t in tensors))
        if key not in self.found:
            self.found[key] = OpUse(name, dtypes, status, [[(n, n) for n in t.shape] for t in tensors])
        self.found[key].saw(tensors, nbytes, self._parents[0] if self._parents else None)


def _composite_key(name: str) -> Any:
    """The key under which this PyTorch holds the kernel that takes the operator apart, or None."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return next((key for key in _COMPOSITE_KEYS if has(name, key)), None)


def _leaves_device(func: Any, kwargs: dict) -> bool:
    wanted = kwargs.get("device")
    return func.name() == "aten::_local_scalar_dense" or (wanted is not None and torch.device(wanted).type == "cpu")


def _tensors(values: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found
