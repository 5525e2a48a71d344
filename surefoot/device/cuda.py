"""NVIDIA GPUs through torch.cuda."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from surefoot.core.errors import DeviceError
from surefoot.device.base import Device, Timer
from surefoot.device.chips import ALL_DTYPES, NO_BF16, Capabilities, find
from surefoot.device.graphs import Graph, capturing


def count() -> int:
    """Number of GPUs that torch can use; 0 where torch has no CUDA or there is no driver."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def why_absent() -> str:
    import torch

    if torch.version.cuda is None:
        return f"the installed torch {torch.__version__} has no CUDA: install a CUDA build of torch"
    return "torch finds no NVIDIA GPU: check nvidia-smi"


class CudaTimer(Timer):
    """Times by two events on the current stream, so that only the device's own work counts."""

    def __init__(self) -> None:
        import torch

        self._begin_event = torch.cuda.Event(enable_timing=True)
        self._end_event = torch.cuda.Event(enable_timing=True)

    def __enter__(self) -> Timer:
        self._begin_event.record()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end_event.record()

    @property
    def seconds(self) -> float:
        self._end_event.synchronize()
        return self._begin_event.elapsed_time(self._end_event) / 1000


class CudaGraph(Graph):
    """torch.cuda.CUDAGraph, captured on a side stream after one run to warm up (libraries allocate and tune then)."""

    def __init__(self, fn: Callable[[], Any], pool: Any) -> None:
        import torch

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            fn()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with capturing(self), torch.cuda.graph(self._graph, pool=pool):
            self.output = fn()

    def replay(self) -> None:
        self._graph.replay()


class CudaDevice(Device):
    type = "cuda"

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        if count() <= index:
            raise DeviceError(why_absent() if count() == 0 else f"there is no {self}")
        self.capabilities = self._capabilities()

    def _capabilities(self) -> Capabilities:
        import torch

        chip = find("cuda", self.name())
        bf16 = torch.cuda.get_device_capability(self.index) >= (8, 0)
        return Capabilities(
            dtypes=ALL_DTYPES if bf16 else NO_BF16,
            peak_flops=chip.peak_flops if chip else {},
            memory_bandwidth=chip.memory_bandwidth if chip else None,
            source=chip.source if chip else None,
            graph="cuda",
        )

    def name(self) -> str:
        import torch

        return torch.cuda.get_device_name(self.index)

    def memory(self) -> tuple[int, int]:
        import torch

        free, total = torch.cuda.mem_get_info(self.index)
        # Memory that torch keeps cached but does not use is free for us too.
        cached = torch.cuda.memory_reserved(self.index) - torch.cuda.memory_allocated(self.index)
        return free + cached, total

    def peak_memory(self) -> int | None:
        import torch

        return torch.cuda.max_memory_allocated(self.index)

    def reset_peak_memory(self) -> bool:
        import torch

        torch.cuda.reset_peak_memory_stats(self.index)
        return True

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize(self.index)

    def seed(self, n: int) -> None:
        import torch

        with torch.cuda.device(self.index):
            torch.cuda.manual_seed(n)

    def empty_cache(self) -> None:
        import torch

        torch.cuda.empty_cache()

    def timer(self) -> Timer:
        return CudaTimer()

    def graph_pool(self) -> Any:
        import torch

        return torch.cuda.graph_pool_handle()

    def capture(self, fn: Callable[[], Any], pool: Any = None) -> Graph:
        import torch

        with torch.cuda.device(self.index):
            return CudaGraph(fn, pool)
