"""`torch.npu`'s graphs on the emulated device: calls are recorded and replayed by `capture.Recorder`, which fails on
any call or address that changes and on a task group whose host values were not updated before a replay."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

from emulated_npu.capture import CaptureError, Recorder


def _numbers(tensor: Any) -> Any:
    return getattr(tensor, "numbers", tensor)


class Stream:
    def synchronize(self) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass


class NPUGraph:
    """`captured` counts the graphs of this process, for tests."""

    captured = 0

    def __init__(self) -> None:
        self.recorder = Recorder(unwrap=_numbers)
        self.events: list[ExternalEvent] = []

    def replay(self) -> None:
        for event in self.events:
            event.pass_by()
        self.recorder.replay()


class ExternalEvent:
    """Recorded once on the update stream for each time that the graph waits for it."""

    def __init__(self) -> None:
        self.recorded = False

    def wait(self, stream: Stream) -> None:
        Torch.capturing().events.append(self)

    def reset(self, stream: Stream) -> None:
        pass

    def record(self, stream: Stream) -> None:
        self.recorded = True

    def pass_by(self) -> None:
        if not self.recorded:
            raise CaptureError("a graph waits for an event that nobody records: a device would hang")
        self.recorded = False


class Torch:
    """The functions; one capture and one update at a time."""

    _graph: NPUGraph | None = None
    _update: contextlib.ExitStack | None = None

    @classmethod
    def capturing(cls) -> NPUGraph:
        if cls._graph is None:
            raise CaptureError("outside a capture")
        return cls._graph

    @classmethod
    @contextlib.contextmanager
    def graph(cls, graph: NPUGraph, pool: Any = None, stream: Any = None, **options: Any) -> Iterator[None]:
        cls._graph = graph
        NPUGraph.captured += 1
        try:
            with graph.recorder:
                yield
        finally:
            cls._graph = None

    @classmethod
    def group_begin(cls, stream: Stream) -> None:
        cls.capturing().recorder.group_begin()

    @classmethod
    def group_end(cls, stream: Stream) -> tuple[Recorder, Any]:
        recorder = cls.capturing().recorder
        return recorder, recorder.group_end()

    @classmethod
    def update_begin(cls, stream: Stream, handle: tuple[Recorder, Any]) -> None:
        recorder, group = handle
        cls._update = contextlib.ExitStack()
        cls._update.enter_context(recorder.updating(group))

    @classmethod
    def update_end(cls, stream: Stream) -> None:
        assert cls._update is not None
        cls._update.close()


@contextlib.contextmanager
def _stream(stream: Stream) -> Iterator[None]:
    yield


def add_to(npu: types.SimpleNamespace) -> None:
    """Give a `torch.npu` stand-in its graphs."""
    npu.Stream, npu.NPUGraph, npu.ExternalEvent, npu.graph = Stream, NPUGraph, ExternalEvent, Torch.graph
    npu.current_stream, npu.stream = Stream, _stream
    npu.graph_pool_handle = lambda: (0, 1)
    npu.graph_task_group_begin, npu.graph_task_group_end = Torch.group_begin, Torch.group_end
    npu.graph_task_update_begin, npu.graph_task_update_end = Torch.update_begin, Torch.update_end
