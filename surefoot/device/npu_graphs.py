"""Graphs of torch_npu: a whole step captured, its attention lengths updated before each replay.

The fused attention of NPUs takes sequence lengths as host ints, which a graph bakes in. Each such call is recorded as a
task group of its own behind an event; before a replay the call is made again with the new lengths on a second stream,
between `graph_task_update_begin` and `_end`, and the event is recorded. The graph waits for that event before it runs
the group. (op-plugin, docs/context/torch_npu-npu-graph_task_group_begin.md; products there: Atlas A2 and A3.)

Streams: a device has 2,048, about 1,800 of them usable, and a captured graph holds at least one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from surefoot.device.graphs import Graph, capturing

STREAMS = 1800
NEEDED = ("NPUGraph", "graph", "ExternalEvent", "graph_task_group_begin", "graph_task_update_begin")
A2_AND_A3 = ((220, 225), (250, 256))


def takes_graphs(soc: int) -> bool:
    """Whether torch_npu documents graphs with task update for this SoC number."""
    return any(first <= soc <= last for first, last in A2_AND_A3)


class NpuGraph(Graph):
    """torch.npu.NPUGraph and the calls in it that take host values."""

    def __init__(self, npu: Any, fn: Callable[[], Any], pool: Any) -> None:
        self._npu = npu
        self._updates: list[tuple[Any, Any, Callable[[], None]]] = []  # (task group, event, call)
        self._update_stream = npu.Stream()
        fn()
        npu.current_stream().synchronize()
        self._graph = npu.NPUGraph()
        with capturing(self), npu.graph(self._graph, pool=pool):
            self.output = fn()

    def host_call(self, call: Callable[[], None]) -> None:
        stream, event = self._npu.current_stream(), self._npu.ExternalEvent()
        event.wait(stream)
        event.reset(stream)
        self._npu.graph_task_group_begin(stream)
        call()
        self._updates.append((self._npu.graph_task_group_end(stream), event, call))

    def replay(self) -> None:
        # NOTE: an update while the previous replay still runs would change or lose that replay's lengths.
        self._npu.current_stream().synchronize()
        with self._npu.stream(self._update_stream):
            for group, event, call in self._updates:
                self._npu.graph_task_update_begin(self._update_stream, group)
                call()
                self._npu.graph_task_update_end(self._update_stream)
                event.record(self._update_stream)
        self._graph.replay()
