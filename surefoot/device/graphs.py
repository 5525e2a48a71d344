"""Captured graphs behind the device seam: a sequence of device calls, recorded once, replayed at the same addresses.

    graph = device.capture(fn, pool)     # runs fn on the device once to warm up, then records it
    graph.replay()                       # the recorded calls again; results appear in graph.output

A graph bakes in whatever its calls got from the host. Tensors are read at replay, so inputs live in static buffers. A
call that takes host values which change from step to step (sequence lengths as a list of ints, which the fused
attention of NPUs wants) goes through `host_call`; the list must be one that is changed in place:

    host_call(lambda: npu_attention.out(q, k, v, actual_seq_lengths_kv=seq_lens_host, ..., out=[out, lse]))

Outside a capture that is just the call. Within one, a device that can update a recorded call keeps it and updates it
before every replay; a device that cannot refuses.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

from surefoot.core.errors import DeviceError


class Graph:
    """One captured sequence. `output` is what the function returned: the same tensors at every replay."""

    output: Any = None

    def replay(self) -> None:
        raise NotImplementedError

    def host_call(self, call: Callable[[], None]) -> None:
        """Record a call that reads host values, so that it is updated before every replay."""
        raise DeviceError("this device cannot update host values inside a graph: use --graph off")

    def kernel_call(self, fn: Callable[..., Any], args: tuple) -> None:
        """A kernel is being called past PyTorch. Devices that record at their stream see it there."""


# NOTE: a context variable, not a plain global: another thread may run eagerly while this one captures.
_capturing: contextvars.ContextVar[Graph | None] = contextvars.ContextVar("capturing", default=None)


@contextlib.contextmanager
def capturing(graph: Graph) -> Iterator[None]:
    """For devices: within the block, calls are being recorded into `graph`."""
    token = _capturing.set(graph)
    try:
        yield
    finally:
        _capturing.reset(token)


def is_capturing() -> bool:
    """Whether this thread is recording a graph right now."""
    return _capturing.get() is not None


def recorded(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that PyTorch does not dispatch, made known to the graph that is being captured, if one is."""

    def call(*args: Any) -> Any:
        graph = _capturing.get()
        if graph is not None:
            graph.kernel_call(fn, args)
        return fn(*args)

    return call


def host_call(call: Callable[[], None]) -> None:
    """Make a call whose arguments contain host values that change from step to step."""
    graph = _capturing.get()
    if graph is None:
        call()
    else:
        graph.host_call(call)
