"""An emulated graph capture: records the calls that a function dispatches and replays them at the same addresses.

As in a real graph, host values (numbers, lists) are baked in when they are recorded, tensors are read and written where
they lay, and nothing may ask the device for a value. Unlike a real graph it tells what is wrong: `replay` fails when an
address that it uses has moved or a call group that needs new host values did not get them; `same_calls` compares two
recordings of one function and names the first call, shape, host value or address that differs.

    recorder = Recorder()
    with recorder:
        out = fn()
    recorder.replay()                          # out holds the new result

With `by_op=True` (a CPU, whose C++ kernels PyTorch does not dispatch) a call of an `OpSpec` is one recorded call;
otherwise only what PyTorch dispatches is recorded (an emulated device). `unwrap` turns a tensor into the one whose
memory counts, for wrapper subclasses.

A part of a graph whose host values change, as `graph_task_group_begin/end` and `graph_task_update_begin/end` mark it:

    handle = recorder.group_begin(); call(old); recorder.group_end()
    with recorder.updating(handle): call(new)   # before every replay; only host values may differ
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from surefoot import ops
from surefoot.device.cpu import CpuDevice
from surefoot.device.graphs import Graph, capturing
from surefoot.ops.spec import OpSpec, dispatch

# What a capturing stream refuses: reading a value on the host, or a shape that depends on values.
FORBIDDEN = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_consecutive")
UNINITIALISED = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class CaptureError(AssertionError):
    """What would be an error, or silently wrong numbers, with a real graph."""


@dataclass
class Call:
    """One recorded call. `signature`: name, host values, and shape, dtype and address of every tensor."""

    name: str
    run: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    result: Any
    rerun: bool
    signature: tuple
    tensors: tuple[tuple[torch.Tensor, int], ...] = ()

    @property
    def outputs(self) -> list[torch.Tensor]:
        return [t for t in tree_flatten(self.result)[0] if isinstance(t, torch.Tensor)]


@dataclass
class Group:
    """Calls [start, stop) whose host values are updated before each replay."""

    start: int
    stop: int = -1
    fresh: bool = False


@dataclass
class _Update:
    group: Group
    at: int = field(init=False)

    def __post_init__(self) -> None:
        self.at = self.group.start


class Recorder(TorchDispatchMode):
    """Records within `with recorder:`; `calls` is what was recorded."""

    def __init__(self, *, by_op: bool = False, unwrap: Callable[[torch.Tensor], torch.Tensor] | None = None):
        super().__init__()
        self.by_op, self.unwrap = by_op, unwrap or (lambda t: t)
        self.calls: list[Call] = []
        self.groups: list[Group] = []
        self.num_replays = 0
        self._storages: dict[int, int] = {}  # address of a storage that was made here -> its number
        self._inside = False  # of an op that is one call
        self._open: Group | None = None
        self._update: _Update | None = None
        self._intercept: contextlib.ExitStack | None = None

    def __enter__(self) -> Recorder:
        if self.by_op:
            self._intercept = contextlib.ExitStack()
            self._intercept.enter_context(ops.intercept(self._on_op))
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        if self._intercept is not None:
            self._intercept.close()

    # ---- recording

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        packet = func.overloadpacket.__name__
        if packet in FORBIDDEN:
            raise CaptureError(f"{func} in a capture: a graph cannot wait for the host (call {len(self.calls)})")
        if self._update is not None:
            return self._replace(str(func), func, args, kwargs)
        result = func(*args, **kwargs)
        if len({t.device.type for t in tree_flatten((args, kwargs, result))[0] if isinstance(t, torch.Tensor)}) > 1:
            raise CaptureError(f"{func} in a capture copies between host and device (call {len(self.calls)})")
        # NOTE: the schema does not say it: `to` or `reshape` may return a view, which is nothing at replay, or a copy.
        inputs = {self._base(t) for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)}
        fresh = any(self._base(t) not in inputs for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor))
        # NOTE: torch_npu's `.out` overloads do not mark the list that they write into.
        writes = func._schema.is_mutable or func._overloadname == "out"
        rerun = writes or (fresh and packet not in UNINITIALISED)
        return self._add(str(func), func, args, kwargs, result, rerun=rerun)

    def _on_op(self, spec: OpSpec, args: tuple, kwargs: dict, run: Callable[[], Any]) -> Any:
        def again(*baked: Any, **named: Any) -> Any:
            device = next(t for t in tree_flatten((baked, named))[0] if isinstance(t, torch.Tensor)).device
            with capturing(Graph()):  # the implementation that the capture took
                return dispatch(spec, device.type, baked, named)

        if self._inside:
            return run()
        if self._update is not None:
            return self._replace(spec.name, again, args, kwargs)
        self._inside = True
        try:
            result = run()
        finally:
            self._inside = False
        return self._add(spec.name, again, args, kwargs, result, rerun=True)

    def on_kernel(self, fn: Callable[..., Any], args: tuple) -> None:
        """A call of addresses and numbers that is no op's. Addresses of what was made here may differ next time."""
        if self._inside:
            return
        places = tuple(("inside", self._storages[x]) if x in self._storages else ("host", _plain(x)) for x in args)
        self.calls.append(Call(fn.__name__, fn, args, {}, None, True, (fn.__name__, str(len(args)), places), ()))

    def _add(self, name: str, run: Callable[..., Any], args: tuple, kwargs: dict, result: Any, *, rerun: bool) -> Any:
        baked = tree_map(lambda x: x, (args, kwargs))  # lists are copied: a graph keeps what they hold now
        signature, tensors = self._signature(name, *baked)
        known = {self._base(t) for t, _ in tensors}
        for out in (t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)):
            if self._base(out) not in known:
                self._storages.setdefault(self._base(out), len(self._storages))
        self.calls.append(Call(name, run, *baked, result, rerun, signature, tensors))
        return result

    def _signature(self, name: str, args: tuple, kwargs: dict) -> tuple[tuple, tuple]:
        leaves, spec = tree_flatten((args, kwargs))
        tensors = tuple((t, self.address(t)) for t in leaves if isinstance(t, torch.Tensor))
        described = tuple(self._describe(x) if isinstance(x, torch.Tensor) else ("host", _plain(x)) for x in leaves)
        return (name, str(spec), described), tensors

    def _describe(self, t: torch.Tensor) -> tuple:
        """A tensor made by an earlier call goes by that storage's number, one from outside by its address."""
        number = self._storages.get(self._base(t))
        offset = self.address(t) - self._base(t)
        place = ("outside", self.address(t)) if number is None else ("inside", number, offset)
        return ("tensor", tuple(t.shape), tuple(t.stride()), str(t.dtype), *place)

    def address(self, t: torch.Tensor) -> int:
        return self.unwrap(t).data_ptr()

    def _base(self, t: torch.Tensor) -> int:
        return self.unwrap(t).untyped_storage().data_ptr()

    # ---- groups with host values that change

    def group_begin(self) -> Group:
        if self._open is not None:
            raise CaptureError("a task group begins inside another one")
        self._open = Group(len(self.calls))
        return self._open

    def group_end(self) -> Group:
        if self._open is None:
            raise CaptureError("a task group ends that has not begun")
        group, self._open = self._open, None
        group.stop = len(self.calls)
        self.groups.append(group)
        return group

    @contextlib.contextmanager
    def updating(self, group: Group) -> Iterator[None]:
        """The calls in the block take the place of the group's; nothing is computed."""
        self._update = _Update(group)
        try:
            with self:
                yield
            if self._update.at != group.stop:
                made, wanted = self._update.at - group.start, group.stop - group.start
                raise CaptureError(f"an update made {made} calls of {wanted}")
            group.fresh = True
        finally:
            self._update = None

    def _replace(self, name: str, run: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        assert self._update is not None
        at = self._update.at
        if at >= self._update.group.stop:
            raise CaptureError(f"an update makes more calls than its group has: {name}")
        old = self.calls[at]
        baked = tree_map(lambda x: x, (args, kwargs))
        signature, tensors = self._signature(name, *baked)
        if difference := _difference(old.signature, signature, host=False):
            raise CaptureError(f"update of call {at}, {old.name}: {difference}")
        self.calls[at] = Call(name, run, *baked, old.result, old.rerun, signature, tensors)
        self._update.at += 1
        return old.result

    # ---- replay

    @torch.inference_mode()
    def replay(self) -> None:
        """The recorded calls again, with baked host values; results are written where they were."""
        for i, group in enumerate(self.groups):
            if not group.fresh:
                raise CaptureError(f"task group {i}: replayed without new host values, a device would wait forever")
            group.fresh = False
        for i, call in enumerate(self.calls):
            for tensor, address in call.tensors:
                if self.address(tensor) != address:
                    raise CaptureError(f"call {i}, {call.name}: a tensor has moved since the capture")
            if call.rerun:
                self._rerun(call)
        self.num_replays += 1

    def _rerun(self, call: Call) -> None:
        result = call.run(*call.args, **call.kwargs)
        for old, new in zip(call.outputs, (t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor))):
            if self.address(old) != self.address(new):  # else it was written in place
                self.unwrap(old).copy_(self.unwrap(new))


def same_calls(first: Recorder, second: Recorder) -> None:
    """CaptureError naming the first call in which two recordings of one function differ (host values of groups may)."""
    may_change = {i for group in first.groups for i in range(group.start, group.stop)}
    for i, (a, b) in enumerate(zip(first.calls, second.calls)):
        if difference := _difference(a.signature, b.signature, host=i not in may_change):
            raise CaptureError(f"call {i}, {a.name}: {difference}")
    if len(first.calls) != len(second.calls):
        raise CaptureError(f"{len(first.calls)} calls when captured, {len(second.calls)} now")


def _difference(old: tuple, new: tuple, host: bool = True) -> str | None:
    """What differs between two signatures; host values count only if `host`."""
    if old[0] != new[0]:
        return f"is now {new[0]}"
    before, after = (side[2] if host else [x for x in side[2] if x[0] == "tensor"] for side in (old, new))
    for i, (a, b) in enumerate(zip(before, after)):
        if a != b:
            return f"argument {i} was {a}, is {b}"
    if len(before) != len(after) or (host and old[1] != new[1]):
        return f"arguments were {old[1]}, are {new[1]}"
    return None


def _plain(value: Any) -> Any:
    """Something that compares by value."""
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


class EmulatedGraph(Graph):
    """A graph of the emulation; `fn` is kept so that `recheck` can record it once more."""

    def __init__(self, fn: Callable[[], Any], recorder: Recorder, again: Callable[[], Recorder]):
        self.fn, self.recorder, self._again = fn, recorder, again
        self._calls: list[tuple[Callable[[], None], Group]] = []
        with capturing(self), torch.inference_mode(), recorder:
            self.output = fn()

    def kernel_call(self, fn: Callable[..., Any], args: tuple) -> None:
        self.recorder.on_kernel(fn, args)

    def host_call(self, call: Callable[[], None]) -> None:
        handle = self.recorder.group_begin()
        call()
        self.recorder.group_end()
        self._calls.append((call, handle))

    def replay(self) -> None:
        for call, handle in self._calls:
            with self.recorder.updating(handle):
                call()
        self.recorder.replay()

    def recheck(self) -> None:
        """Record again: every call and address must be what it was. Runs `fn` on whatever its static inputs hold."""
        now = EmulatedGraph(self.fn, self._again(), self._again)
        same_calls(self.recorder, now.recorder)


class GraphCpu(CpuDevice):
    """The CPU with an emulated capture; `graphs` is every graph that was captured, `warmups` the runs before."""

    captures_on_use = False  # as an NPU: before the first step

    def __init__(self, stream_limit: int | None = None) -> None:
        super().__init__()
        self.capabilities = replace(self.capabilities, graph="emulated", graph_streams=stream_limit)
        self.graphs: list[EmulatedGraph] = []
        self.warmups = 0

    def capture(self, fn: Callable[[], Any], pool: Any = None) -> EmulatedGraph:
        fn()
        self.warmups += 1
        self.graphs.append(EmulatedGraph(fn, Recorder(by_op=True), lambda: Recorder(by_op=True)))
        return self.graphs[-1]
