"""Huawei Ascend NPUs through torch_npu, which adds `torch.npu` when it is imported."""

from __future__ import annotations

import importlib.util
from typing import Any

from surefoot.core.errors import DeviceError
from surefoot.device.base import Device, Timer
from surefoot.device.chips import NO_BF16, Capabilities, find

# The fused attention kernels take KV pages of 128..512 tokens, a multiple of 128 (op-plugin, FusedInferAttentionScore).
PAGE = 128


def _torch_npu() -> Any:
    """The torch_npu module, or a DeviceError that says which half of the installation is missing."""
    import torch

    if importlib.util.find_spec("torch_npu") is None:
        raise DeviceError(
            f"torch_npu is not installed: pip install the torch-npu release that matches torch {torch.__version__}"
        )
    try:
        import torch_npu
    except (ImportError, OSError) as error:
        reason = str(error).splitlines()[0]
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


class NpuDevice(Device):
    type = "npu"

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        if count() <= index:
            raise DeviceError(why_absent() if count() == 0 else f"there is no {self}")
        self._npu = _torch_npu().npu
        self._npu.set_device(index)
        # Kernels compiled ahead of time take any shape; the just-in-time mode would compile for each new prompt length.
        self._npu.set_compile_mode(jit_compile=False)
        chip = find("npu", self.name(), self._npu.get_soc_version())
        self.capabilities = Capabilities(
            dtypes=chip.dtypes if chip else NO_BF16,
            block_size=PAGE,
            block_alignment=PAGE,
            peak_flops=chip.peak_flops if chip else {},
            memory_bandwidth=chip.memory_bandwidth if chip else None,
            source=chip.source if chip else None,
        )

    def name(self) -> str:
        return self._npu.get_device_name(self.index)

    def memory(self) -> tuple[int, int]:
        free, total = self._npu.mem_get_info(self.index)
        cached = self._npu.memory_reserved(self.index) - self._npu.memory_allocated(self.index)
        return free + cached, total

    def synchronize(self) -> None:
        self._npu.synchronize(self.index)

    def seed(self, n: int) -> None:
        self._npu.manual_seed(n)

    def empty_cache(self) -> None:
        self._npu.empty_cache()

    def timer(self) -> Timer:
        return NpuTimer()
