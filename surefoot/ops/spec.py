"""An op is declared once (`OpSpec`) and used five times.

The declaration holds a readable reference, the cost, sample shapes and a tolerance per dtype. From it come the engine's
dispatch, one parametrised test of every implementation against its reference, operator coverage, the roofline
estimate, and the replay that names the faulty op when a proof fails.

    y = ops.rms_norm(x, weight, eps)             # picks the best implementation registered for x's device
    with ops.use("reference"): ...               # forces the readable one
    ops.chosen()                                 # {"rms_norm/cpu": "avx512", ...}: what has been picked so far
    with ops.intercept(handler): ...             # each call passes through handler: counted, timed, or only shaped
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Cost:
    """Floating-point (or integer multiply-add x 2) operations, bytes read and written, for one call."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Tolerance:
    """Largest error allowed against the fp32 reference, as |a - b| <= atol + rtol * |b|, elementwise."""

    atol: float
    rtol: float


@dataclass(frozen=True)
class Sample:
    """One call of an op: keyword arguments made by `make(dtype, device, generator)`, and what is special about it."""

    name: str
    make: Callable[[torch.dtype, torch.device, torch.Generator], dict[str, Any]]


@dataclass(frozen=True)
class Implementation:
    """A device's way to compute an op: same signature as the reference.

    `supports(**kwargs)` says whether these arguments (dtype, head_dim, ...) can be taken; None means always.
    Higher priority is tried first.
    """

    name: str
    device: str
    fn: Callable[..., Any]
    supports: Callable[..., bool] | None = None
    priority: int = 0


@dataclass
class OpSpec:
    """Declaration of one op. `mutates` names the arguments that are written in place."""

    name: str
    reference: Callable[..., Any]
    cost: Callable[..., Cost]
    samples: Callable[[], Iterable[Sample]]
    tolerance: dict[torch.dtype, Tolerance]
    mutates: tuple[str, ...] = ()
    implementations: list[Implementation] = field(default_factory=list)

    def register(self, implementation: Implementation) -> None:
        self.implementations.append(implementation)
        self.implementations.sort(key=lambda i: -i.priority)

    def candidates(self, device_type: str) -> list[Implementation]:
        return [i for i in self.implementations if i.device in (device_type, "any")]


# handler(spec, args, kwargs, run) returns the call's result; run() computes it.
Handler = Callable[[OpSpec, tuple, dict, Callable[[], Any]], Any]

REGISTRY: dict[str, OpSpec] = {}
# NOTE: a context variable, not a plain global: two threads may dispatch by different policies at once.
_policy: contextvars.ContextVar[str] = contextvars.ContextVar("op_policy", default="auto")
_handler: contextvars.ContextVar[Handler | None] = contextvars.ContextVar("op_handler", default=None)
_meta_as: contextvars.ContextVar[str] = contextvars.ContextVar("op_meta_as", default="meta")
_chosen: dict[str, str] = {}


def define(spec: OpSpec) -> OpSpec:
    """Enter an op into the registry; names are unique."""
    if spec.name in REGISTRY:
        raise ValueError(f"op {spec.name} is declared twice")
    REGISTRY[spec.name] = spec
    return spec


def register(op: str, device: str, name: str, *, supports: Callable[..., bool] | None = None, priority: int = 0):
    """Decorator: register a function as an implementation of `op` on `device` ("cpu", "cuda", "npu", or "any")."""

    def wrap(fn: Callable[..., Any]) -> Callable[..., Any]:
        REGISTRY[op].register(Implementation(name, device, fn, supports, priority))
        return fn

    return wrap


@contextlib.contextmanager
def use(policy: str) -> Iterator[None]:
    """Within the block, dispatch by `policy`: "auto" or "reference"."""
    token = _policy.set(policy)
    try:
        yield
    finally:
        _policy.reset(token)


@contextlib.contextmanager
def meta_as(device_type: str) -> Iterator[None]:
    """Within the block, meta tensors stand for tensors of this device: its implementations are chosen for them."""
    token = _meta_as.set(device_type)
    try:
        yield
    finally:
        _meta_as.reset(token)


@contextlib.contextmanager
def intercept(handler: Handler) -> Iterator[None]:
    """Within the block, every op call is handed to `handler` instead of being computed; it calls `run` if it wants."""
    token = _handler.set(handler)
    try:
        yield
    finally:
        _handler.reset(token)


def intercepted() -> bool:
    """Whether op calls go through a handler here; a captured graph would pass it by."""
    return _handler.get() is not None


def chosen() -> dict[str, str]:
    """Which implementation each op took last, by "op/device"."""
    return dict(_chosen)


def forget_chosen() -> None:
    _chosen.clear()


def dispatch(spec: OpSpec, device_type: str, args: tuple, kwargs: dict) -> Any:
    """Run the first implementation that takes these arguments, else the reference."""
    if device_type == "meta":
        device_type = _meta_as.get()
    handler = _handler.get()
    if handler is None:
        return _compute(spec, device_type, args, kwargs)
    return handler(spec, args, kwargs, lambda: _compute(spec, device_type, args, kwargs))


def _compute(spec: OpSpec, device_type: str, args: tuple, kwargs: dict) -> Any:
    if _policy.get() == "auto":
        for impl in spec.implementations:
            if impl.device in (device_type, "any") and (impl.supports is None or impl.supports(*args, **kwargs)):
                _chosen[f"{spec.name}/{device_type}"] = impl.name
                return impl.fn(*args, **kwargs)
    _chosen[f"{spec.name}/{device_type}"] = "reference"
    return spec.reference(*args, **kwargs)
