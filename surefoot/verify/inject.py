"""Tools for planting faults: an op replaced inside a module, an attribute changed, a batch altered. All undo it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from surefoot.backends.native import NativeBackend
from surefoot.core.batch import Batch
from surefoot.ops.spec import REGISTRY, Implementation

PRIORITY = 1 << 20


@contextlib.contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """owner.name = value within the block. An attribute that was the class's is the class's again afterwards."""
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own or isinstance(owner, nn.Module) and not callable(before):
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextlib.contextmanager
def weight(parameter: torch.Tensor, value: torch.Tensor) -> Iterator[None]:
    """Another content for a parameter, in place, so that tied ones change with it."""
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(before)


@contextlib.contextmanager
def op(module: nn.Module, name: str, fn: Callable[..., Any], label: str = "planted") -> Iterator[None]:
    """While `module` runs, op `name` is computed by fn(original, *args), where original computes it rightly."""
    spec = REGISTRY[name]
    entry = Implementation(label, "any", lambda *args: fn(spec.reference, *args), priority=PRIORITY)

    def enter(*_: Any) -> None:
        spec.implementations.insert(_behind_watchers(spec.implementations), entry)

    def leave(*_: Any) -> None:
        if entry in spec.implementations:
            spec.implementations.remove(entry)

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        leave()
        for handle in handles:
            handle.remove()


def _behind_watchers(implementations: list[Implementation]) -> int:
    return sum(i.priority > PRIORITY for i in implementations)


@contextlib.contextmanager
def ops(modules: list[nn.Module], name: str, fn: Callable[..., Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(op(module, name, fn))
        yield


@contextlib.contextmanager
def batch(target: NativeBackend, change: Callable[[Batch], Batch]) -> Iterator[None]:
    """The model sees an altered batch: a fault in the engine's inputs."""
    model = target.engine.model
    forward = model.forward
    with attribute(model, "forward", lambda given: forward(change(given))):
        yield


@contextlib.contextmanager
def output(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """The module's (first) output is altered before anyone, capture included, sees it."""
    forward = module.forward

    def altered(*args: Any, **kwargs: Any) -> Any:
        value = forward(*args, **kwargs)
        return (change(value[0]), *value[1:]) if isinstance(value, tuple) else change(value)

    with attribute(module, "forward", altered):
        yield


def layer_with(target: NativeBackend, part: str, index: int = 0) -> Any:
    """The index-th `part` ("self_attn", "linear_attn", "mlp", ...) of the decoder layers; -1 is the last."""
    found = [getattr(layer, part) for layer in target.engine.model.decoder_layers if hasattr(layer, part)]
    return found[index]
