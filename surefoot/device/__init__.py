"""Devices behind one seam: `get_device("cuda:1")`, then ask it; nothing else in Surefoot names a device library.

Only `device/`, `ops/cuda` and `ops/npu` may use `torch.cuda`, `torch.npu`, `torch_npu` or `.cuda(`.
"""

from __future__ import annotations

import re

from surefoot.core.errors import DeviceError, InputError
from surefoot.device.base import Device, Timer
from surefoot.device.chips import Capabilities

__all__ = ["Capabilities", "Device", "Timer", "available", "get_device"]


def get_device(spec: str) -> Device:
    """The device for "cpu", "cuda", "cuda:1", "npu:0", ...; without an index the first one."""
    match = re.fullmatch(r"(cpu|cuda|npu)(?::(\d+))?", spec.strip().lower())
    if match is None:
        raise InputError(f"unknown device {spec!r}: write cpu, cuda, cuda:1, npu or npu:0")
    kind, index = match.group(1), int(match.group(2) or 0)
    try:
        return _create(kind, index)
    except DeviceError as error:
        here = ", ".join(available())
        raise DeviceError(f"no device {spec!r} here: {error}. Devices on this machine: {here}") from error


def _create(kind: str, index: int) -> Device:
    if kind == "cuda":
        from surefoot.device.cuda import CudaDevice

        return CudaDevice(index)
    if kind == "npu":
        from surefoot.device.npu import NpuDevice

        return NpuDevice(index)
    from surefoot.device.cpu import CpuDevice

    if index != 0:
        raise DeviceError("a machine has one CPU device, called cpu")
    return CpuDevice()


def available() -> list[str]:
    """The devices of this machine that can be used now."""
    from surefoot.device import cuda, npu

    return ["cpu", *(f"cuda:{i}" for i in range(cuda.count())), *(f"npu:{i}" for i in range(npu.count()))]
