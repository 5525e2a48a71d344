"""The device seam: strings, absent devices, dtype rules, memory figures."""

from __future__ import annotations

import pytest
import torch

from surefoot.core.errors import DeviceError, InputError
from surefoot.device import available, chips, get_device
from surefoot.device.chips import NO_BF16, Capabilities
from surefoot.device.cpu import cgroup_memory, parse_meminfo, parse_vm_stat


def test_cpu_device_answers_everything():
    device = get_device("cpu")
    free, total = device.memory()
    assert str(device) == "cpu" and device.torch_device == torch.device("cpu")
    assert 0 < free <= total
    assert "CPU" in device.name()
    device.synchronize()
    device.empty_cache()
    device.seed(3)
    first = torch.rand(2)
    device.seed(3)
    assert torch.equal(first, torch.rand(2))
    with device.timer() as timer:
        pass
    assert timer.seconds >= 0
    assert "cpu" in available()


@pytest.mark.parametrize("spec", ["tpu", "cuda:x", "", "cpu:-1", "cuda:1:2", "gpu"])
def test_unknown_device_is_an_input_error(spec):
    with pytest.raises(InputError, match="unknown device"):
        get_device(spec)


@pytest.mark.parametrize("spec", ["npu:63", "cuda:63", "cpu:1"])
def test_absent_device_says_what_is_here(spec):
    with pytest.raises(DeviceError, match="Devices on this machine: cpu") as error:
        get_device(spec)
    assert "\n" not in str(error.value)


def test_auto_dtype_follows_the_checkpoint_unless_the_device_cannot():
    device = get_device("cpu")
    assert device.resolve_dtype("auto", torch.bfloat16) == (torch.bfloat16, None)
    assert device.resolve_dtype("float32", torch.bfloat16) == (torch.float32, None)
    device.capabilities = Capabilities(dtypes=NO_BF16)
    dtype, note = device.resolve_dtype("auto", torch.bfloat16)
    assert dtype == torch.float16 and "using float16" in note
    with pytest.raises(DeviceError, match="does not compute in bfloat16"):
        device.resolve_dtype("bfloat16", torch.bfloat16)
    device.capabilities = Capabilities(dtypes=("float32",))
    assert device.default_dtype(torch.bfloat16) == torch.float32


def test_meminfo_and_vm_stat():
    assert parse_meminfo("MemTotal: 100 kB\nMemFree: 5 kB\nMemAvailable: 60 kB\n") == (60 * 1024, 100 * 1024)
    text = "(page size of 16384 bytes)\nPages free: 10.\nPages active: 7.\nPages inactive: 5.\n"
    assert parse_vm_stat(text) == 15 * 16384


def write_group(folder, limit, used, cached, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\ntotal_inactive_file {cached}\n")


def test_cgroup_v2_takes_the_tightest_level(tmp_path):
    names = ("memory.max", "memory.current")
    proc = tmp_path / "cgroup"
    proc.write_text("0::/a/b\n")
    write_group(tmp_path / "fs/a/b", "max", 10, 0, names)
    write_group(tmp_path / "fs/a", 1000, 900, 50, names)
    assert cgroup_memory(proc, tmp_path / "fs") == (150, 1000)


def test_cgroup_v1_path_of_the_host_falls_back_to_the_mount(tmp_path):
    proc = tmp_path / "cgroup"
    proc.write_text("9:name=systemd:/x\n4:cpu,memory:/host/only\n")
    write_group(tmp_path / "fs/memory", 500, 100, 0, ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    assert cgroup_memory(proc, tmp_path / "fs") == (400, 500)
    assert cgroup_memory(tmp_path / "absent", tmp_path / "fs") is None


def test_chip_rows():
    assert chips.find("cuda", "NVIDIA H200").memory_bandwidth == 4.8e12
    assert chips.find("npu", "", 9999) is None and chips.find("cuda", "Unheard-of") is None
    assert all(chip.source for chip in chips.CHIPS)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_cuda_device():
    device = get_device("cuda")
    free, total = device.memory()
    assert 0 < free <= total and device.name()
    with device.timer() as timer:
        torch.ones(64, 64, device=device.torch_device).sum()
    assert timer.seconds > 0
