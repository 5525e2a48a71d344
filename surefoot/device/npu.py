"""Huawei Ascend NPUs through torch_npu, which adds `torch.npu` when it is imported.

Set up once per process, as an Ascend user expects of an inference engine: kernels compiled ahead of time (no compile
per prompt length), tensors in plain ND layout unless an op asks otherwise, and a silent CPU fallback turned into an
error. Who wants fallbacks says so with torch_npu's own variable, TORCH_NPU_FALLBACK_CPU_DISABLE=0, and gets a note.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

from surefoot.core.errors import DeviceError, first_line
from surefoot.device.base import Device, Timer
from surefoot.device.chips import ALL_DTYPES, NO_BF16, Capabilities, find
from surefoot.device.graphs import Graph
from surefoot.device.npu_graphs import NEEDED, STREAMS, NpuGraph, takes_graphs

# The fused attention kernels take KV pages of 128..512 tokens, a multiple of 128 (op-plugin, FusedInferAttentionScore).
PAGE = 128
FALLBACK = "TORCH_NPU_FALLBACK_CPU_DISABLE"


def _torch_npu() -> Any:
    """The torch_npu module, or a DeviceError that says which half of the installation is missing."""
    import torch

    if importlib.util.find_spec("torch_npu") is None:
        raise DeviceError(
            f"torch_npu is not installed: pip install the torch-npu release that matches torch {torch.__version__}"
        )
    # NOTE: before the import and before the first op; torch_npu reads it from the process's environment.
    os.environ.setdefault(FALLBACK, "1")
    try:
        import torch_npu
    except (ImportError, OSError) as error:
        reason = first_line(error)
        raise DeviceError(f"torch_npu cannot load CANN ({reason}): source CANN's set_env.sh first") from error
    return torch_npu


def count() -> int:
    """Number of NPUs that torch_npu can use; 0 where it is absent or cannot load."""
    try:
        npu = _torch_npu().npu
    except DeviceError:
        return 0
    return npu.device_count() if npu.is_available() else 0


def why_absent() -> str:
    try:
        _torch_npu()
    except DeviceError as error:
        return str(error)
    return "torch_npu finds no Ascend NPU: check npu-smi info"


class NpuTimer(Timer):
    """Times by two events on the current stream, so that only the device's own work counts."""

    def __init__(self) -> None:
        npu = _torch_npu().npu
        self._begin_event = npu.Event(enable_timing=True)
        self._end_event = npu.Event(enable_timing=True)

    def __enter__(self) -> Timer:
        self._begin_event.record()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end_event.record()

    @property
    def seconds(self) -> float:
        self._end_event.synchronize()
        return self._begin_event.elapsed_time(self._end_event) / 1000


def set_up(npu: Any) -> None:
    """Process-wide options of torch_npu; setting them again changes nothing."""
    # Kernels compiled ahead of time take any shape; the just-in-time mode would compile for each new prompt length.
    # NOTE: it is on by default on the 310P and older chips.
    npu.set_compile_mode(jit_compile=False)
    # Internal layouts (NZ, ...) appear only where an op casts to one by itself.
    npu.config.allow_internal_format = False


class NpuDevice(Device):
    type = "npu"

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        if count() <= index:
            raise DeviceError(why_absent() if count() == 0 else f"there is no {self}")
        self._npu = _torch_npu().npu
        self._npu.set_device(index)
        set_up(self._npu)
        if os.environ.get(FALLBACK) == "0":
            self.notes.append(f"{FALLBACK}=0: operators without an NPU kernel run on the CPU, slowly")
        self.soc = int(self._npu.get_soc_version())
        self.capabilities = self._capabilities()

    def _capabilities(self) -> Capabilities:
        chip = find("npu", self.name(), self.soc)
        graph, streams = ("npu", STREAMS) if takes_graphs(self.soc) else (None, None)
        if chip is None:
            self.notes.append(f"chip {self.name()} (SoC {self.soc}) is not in the table: its peaks are unknown")
            dtypes = ALL_DTYPES if self._npu.is_bf16_supported() else NO_BF16
            return Capabilities(dtypes, block_size=PAGE, block_alignment=PAGE, graph=graph, graph_streams=streams)
        return Capabilities(
            dtypes=chip.dtypes,
            block_size=PAGE,
            block_alignment=PAGE,
            peak_flops=chip.peak_flops,
            memory_bandwidth=chip.memory_bandwidth,
            source=chip.source,
            graph=graph,
            graph_streams=streams,
        )

    def name(self) -> str:
        return self._npu.get_device_name(self.index)

    def memory(self) -> tuple[int, int]:
        free, total = self._npu.mem_get_info(self.index)
        # Memory that torch_npu keeps cached but does not use is free for us too.
        cached = self._npu.memory_reserved(self.index) - self._npu.memory_allocated(self.index)
        return free + cached, total

    def peak_memory(self) -> int | None:
        return self._npu.max_memory_allocated(self.index)

    def reset_peak_memory(self) -> bool:
        self._npu.reset_peak_memory_stats(self.index)
        return True

    def synchronize(self) -> None:
        self._npu.synchronize(self.index)

    def seed(self, n: int) -> None:
        with self._npu.device(self.index):
            self._npu.manual_seed(n)

    def empty_cache(self) -> None:
        self._npu.empty_cache()

    def timer(self) -> Timer:
        return NpuTimer()

    def no_graphs(self) -> str | None:
        if os.environ.get("ASCEND_LAUNCH_BLOCKING") == "1":
            return "ASCEND_LAUNCH_BLOCKING=1 and graphs exclude each other"
        if not takes_graphs(self.soc):
            return f"{self.name()} (SoC {self.soc}) is none of the chips that torch_npu lists for graphs (A2, A3)"
        if missing := [name for name in NEEDED if not hasattr(self._npu, name)]:
            return f"this torch_npu has no torch.npu.{missing[0]}: update it"
        return None

    def graph_pool(self) -> Any:
        return self._npu.graph_pool_handle()

    def capture(self, fn: Callable[[], Any], pool: Any = None) -> Graph:
        return NpuGraph(self._npu, fn, pool)
