"""The capture calls that each device library gets, in order, with fakes in the libraries' place."""

from __future__ import annotations

import contextlib
import sys
import types

import pytest
import torch
from fake_torch_npu import FakeNpu

from surefoot.core.errors import DeviceError
from surefoot.device import get_device, npu
from surefoot.device.cuda import CudaGraph
from surefoot.device.graphs import host_call, is_capturing
from surefoot.device.npu_graphs import NpuGraph, takes_graphs


class FakeLibrary:
    """The graph part of torch.cuda or torch.npu: `calls` is what happened, in order."""

    def __init__(self):
        self.calls: list[str] = []
        outer, record = self, self.calls.append

        class Stream:
            def __init__(self, name="side"):
                self.name = name

            def wait_stream(self, other):
                record(f"{self.name} waits for {other.name}")

            def synchronize(self):
                record(f"{self.name} synchronises")

        class Captured:
            def replay(self):
                record("replay")

        class ExternalEvent:
            def wait(self, stream):
                record(f"event wait on {stream.name}")

            def reset(self, stream):
                record(f"event reset on {stream.name}")

            def record(self, stream):
                record(f"event record on {stream.name}")

        @contextlib.contextmanager
        def within(name):
            record(f"{name} begins")
            yield
            record(f"{name} ends")

        main = Stream("main")
        self.Stream, self.ExternalEvent = Stream, ExternalEvent
        self.CUDAGraph = self.NPUGraph = Captured
        self.current_stream = lambda: main
        self.stream = lambda stream: within(f"on {stream.name}")
        self.graph = lambda graph, pool=None: within(f"capture into {pool}")
        self.graph_task_group_begin = lambda stream: record(f"group begins on {stream.name}")
        self.graph_task_group_end = lambda stream: outer.calls.append("group ends") or len(outer.calls)
        self.graph_task_update_begin = lambda stream, handle: record(f"update of {handle} begins on {stream.name}")
        self.graph_task_update_end = lambda stream: record("update ends")


def test_cuda_warms_up_on_a_side_stream_and_captures_once(monkeypatch):
    fake = FakeLibrary()
    for name in ("Stream", "CUDAGraph", "current_stream", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    seen = []

    def step():
        seen.append(is_capturing())
        fake.calls.append("step")
        return "output"

    graph = CudaGraph(step, "pool")
    graph.replay()
    assert graph.output == "output" and seen == [False, True] and not is_capturing()
    assert fake.calls == [
        *("side waits for main", "on side begins", "step", "on side ends", "main waits for side"),
        *("capture into pool begins", "step", "capture into pool ends", "replay"),
    ]
    with pytest.raises(DeviceError, match="cannot update host values"):
        CudaGraph(lambda: host_call(lambda: None), None)


def test_npu_updates_each_group_on_a_second_stream_before_every_replay():
    fake, lengths = FakeLibrary(), [1]
    graph = NpuGraph(fake, lambda: host_call(lambda: fake.calls.append(f"attention of {lengths}")), "pool")
    assert fake.calls == [
        *("attention of [1]", "main synchronises", "capture into pool begins", "event wait on main"),
        *("event reset on main", "group begins on main", "attention of [1]", "group ends", "capture into pool ends"),
    ]
    fake.calls.clear()
    lengths[0] = 9
    graph.replay()
    assert fake.calls == [
        *("main synchronises", "on side begins", "update of 8 begins on side", "attention of [9]", "update ends"),
        *("event record on side", "on side ends", "replay"),
    ]


def test_a_step_that_cannot_be_captured_leaves_no_capture_behind():
    with pytest.raises(ZeroDivisionError):
        NpuGraph(FakeLibrary(), lambda: 1 // (not is_capturing()), None)
    assert not is_capturing()


@pytest.mark.parametrize("soc, can", [(100, False), (203, False), (220, True), (225, True), (240, False), (250, True)])
def test_which_chips_take_graphs(soc, can):
    assert takes_graphs(soc) is can


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setenv(npu.FALLBACK, "")  # restored after the test, whatever the seam sets
    monkeypatch.delenv(npu.FALLBACK)
    monkeypatch.delenv("ASCEND_LAUNCH_BLOCKING", raising=False)

    def make(soc: int = 223):
        fake = FakeNpu(soc=soc)
        fake.npu = types.SimpleNamespace(**vars(fake.npu), **dict.fromkeys(npu.NEEDED))
        monkeypatch.setitem(sys.modules, "torch_npu", fake)
        return get_device("npu")

    return make


def test_why_an_npu_has_no_graphs(device, monkeypatch):
    able = device()
    assert able.no_graphs() is None
    assert (able.capabilities.graph, able.capabilities.graph_streams) == ("npu", 1800)
    old = device(soc=203)
    assert "none of the chips that torch_npu lists for graphs" in old.no_graphs() and old.capabilities.graph is None
    monkeypatch.setenv("ASCEND_LAUNCH_BLOCKING", "1")
    assert "exclude each other" in device().no_graphs()
    monkeypatch.delenv("ASCEND_LAUNCH_BLOCKING")
    stale = device()
    del stale._npu.graph_task_update_begin
    assert stale.no_graphs() == "this torch_npu has no torch.npu.graph_task_update_begin: update it"
