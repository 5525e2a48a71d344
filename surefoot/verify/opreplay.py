"""Inside a guilty module of Surefoot's own engine: which op does not compute what its declaration says.

The path is run once more. Every op that the module calls is called a second time, with the same arguments, through its
`OpSpec` reference; the first whose result leaves the declared tolerance is the faulty one. An op that is right but was
given wrong arguments (another eps, another scale) is found by the cause search instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surefoot.backends.base import Backend
from surefoot.backends.native import NativeBackend
from surefoot.ops.spec import REGISTRY, Implementation, OpSpec, Tolerance, chosen, dispatch
from surefoot.verify.pathcapture import captures, module_at


@dataclass(frozen=True)
class Mismatch:
    """An op call that left its tolerance. excess: largest error in units of the tolerance."""

    op: str
    implementation: str
    shapes: list[list[int]]
    excess: float


def guilty_op(target: Backend, module: str, on_path: str, token_ids: Sequence[int]) -> Mismatch | None:
    """The first op call inside `module` that differs from its reference; None if all agree or none can be replayed."""
    part = module_at(target.engine.model, module) if isinstance(target, NativeBackend) else None
    if part is None:
        return None
    with replaying(part) as found:
        for _ in captures(target, token_ids, [on_path]):
            pass
    return found[0] if found else None


@contextlib.contextmanager
def replaying(part: nn.Module) -> Iterator[list[Mismatch]]:
    """Within the block, ops called inside the module are checked; the list fills with those that mismatch."""
    found: list[Mismatch] = []
    inside = [False]
    handles = [
        part.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True)),
        part.register_forward_hook(lambda *_: inside.__setitem__(0, False), always_call=True),
    ]
    checkers = {name: _checker(spec, inside, found) for name, spec in REGISTRY.items()}
    for name, checker in checkers.items():
        REGISTRY[name].implementations.insert(0, checker)
    try:
        yield found
    finally:
        for name, checker in checkers.items():
            REGISTRY[name].implementations.remove(checker)
        for handle in handles:
            handle.remove()


def _checker(spec: OpSpec, inside: list[bool], found: list[Mismatch]) -> Implementation:
    def check(*args: Any, **kwargs: Any) -> Any:
        device = next(a for a in args if isinstance(a, torch.Tensor)).device.type
        position = spec.implementations.index(checker)
        del spec.implementations[position]
        try:
            kept = [_copy(a) for a in args] if inside[0] else []
            result = dispatch(spec, device, args, kwargs)
            if inside[0]:
                wanted = spec.reference(*kept, **kwargs)
                excess = max(_excess(a, b, spec) for a, b in zip([result, *args], [wanted, *kept]))
                if excess > 1:
                    name = chosen().get(f"{spec.name}/{device}", "?")
                    shapes = [list(a.shape) for a in args if isinstance(a, torch.Tensor)]
                    found.append(Mismatch(spec.name, name, shapes, excess))
        finally:
            spec.implementations.insert(position, checker)
        return result

    checker = Implementation("checked", "any", check, priority=1 << 30)
    return checker


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _excess(got: Any, wanted: Any, spec: OpSpec) -> float:
    """Largest |got - wanted| / (atol + rtol |wanted|), over all tensors of an output."""
    if isinstance(got, (tuple, list)) and got and isinstance(got[0], torch.Tensor):
        return max(_excess(a, b, spec) for a, b in zip(got, wanted))
    if not isinstance(got, torch.Tensor) or not got.is_floating_point() or not got.numel():
        return 0.0
    allowed = spec.tolerance.get(got.dtype, Tolerance(1e-4, 1e-4))
    a, b = got.float(), wanted.float()
    same = (a == b) | (torch.isnan(a) & torch.isnan(b))
    ratio = torch.where(same, torch.zeros_like(a), (a - b).abs() / (allowed.atol + allowed.rtol * b.abs()))
    worst = torch.nan_to_num(ratio, nan=float("inf")).max()
    return float(worst)
