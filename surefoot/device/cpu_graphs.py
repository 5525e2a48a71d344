"""Captured steps on a CPU: every kernel call with the addresses that it was given, and PyTorch's calls in between.

A CPU has no stream to record, so the calls themselves are: those of the C++ kernels, which know only addresses and
numbers, as they are; PyTorch's, without views and allocations, writing their results where the first ones lie. Whatever
the function allocated is held. A replay is then a flat list of calls: no module, no dispatch, no allocation.

NOTE: as in any graph, parameters must stay where they are, and hooks on modules see nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from surefoot.core.errors import DeviceError
from surefoot.device.graphs import Graph, capturing

UNINITIALISED = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
HOST_READS = ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_consecutive")


class CpuGraph(Graph):
    def __init__(self, fn: Callable[[], Any]):
        self._calls: list[tuple[Callable[..., Any], tuple]] = []
        self._held: list[Any] = []
        with capturing(self), torch.inference_mode(), _Watch(self):
            self.output = fn()

    def kernel_call(self, fn: Callable[..., Any], args: tuple) -> None:
        self._calls.append((fn, args))

    @torch.inference_mode()
    def replay(self) -> None:
        for fn, args in self._calls:
            fn(*args)

    def torch_call(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        """Keep what the call made; repeat it at replay if it computed something."""
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self._held += made
        if func._schema.is_mutable:
            self._calls.append((_again, (func, args, kwargs)))
            return
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        # NOTE: the schema does not say it: `to` or `reshape` may return a view, which is nothing at replay, or a copy.
        if all(_storage(t) in given for t in made) or func.overloadpacket.__name__ in UNINITIALISED:
            return
        out = getattr(func.overloadpacket, "out", None) if len(made) == 1 else None
        if out is not None and _takes(out, func):
            self._calls.append((_again, (out, args, kwargs | {"out": made[0]})))
        else:
            self._calls.append((_copy_again, (func, args, kwargs, made)))


class _Watch(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Newer torch would otherwise import its compiler at the first call, which takes a second."""
        return False

    def __init__(self, graph: CpuGraph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.overloadpacket.__name__ in HOST_READS:
            raise DeviceError(f"{func} reads a value on the host, which a graph cannot: use --graph off")
        result = func(*args, **(kwargs or {}))
        self.graph.torch_call(func, args, kwargs or {}, result)
        return result


def _takes(out: Any, func: Any) -> bool:
    """Whether the out variant has the arguments of `func` and one result."""
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments if a.name not in ("dtype", "layout", "device")]
    have = [(a.name, str(a.type)) for a in out._schema.arguments if not a.is_out]
    return wanted == have and len(out._schema.returns) == 1 and len(wanted) == len(func._schema.arguments)


def _again(func: Any, args: tuple, kwargs: dict) -> None:
    func(*args, **kwargs)


def _copy_again(func: Any, args: tuple, kwargs: dict, made: list[torch.Tensor]) -> None:
    found = (t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, torch.Tensor))
    for old, new in zip(made, found):
        old.copy_(new)


def _storage(t: torch.Tensor) -> int:
    return t.untyped_storage().data_ptr()
