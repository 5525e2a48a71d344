"""The NPU seam against a fake torch_npu: discovery, set-up, chip identity, memory, seeds, events, what is missing."""

from __future__ import annotations

import os
import sys
import types

import pytest
import torch
from fake_torch_npu import FakeNpu

from surefoot.core.errors import DeviceError
from surefoot.device import available, chips, get_device, npu
from surefoot.device.chips import ALL_DTYPES, NO_BF16


@pytest.fixture
def install(monkeypatch):
    monkeypatch.setenv(npu.FALLBACK, "")  # restored after the test, whatever the seam sets
    monkeypatch.delenv(npu.FALLBACK)

    def put(**kwargs) -> FakeNpu:
        fake = FakeNpu(**kwargs)
        monkeypatch.setitem(sys.modules, "torch_npu", fake)
        return fake

    return put


def test_discovery_and_memory(install):
    install()
    assert available()[-2:] == ["npu:0", "npu:1"]
    device = get_device("npu:1")
    assert (str(device), device.name(), device.memory()) == ("npu:1", "Ascend910B3 #1", (13, 100))
    with pytest.raises(DeviceError, match="there is no npu:2.*npu:0, npu:1"):
        get_device("npu:2")


def test_set_up(install):
    fake = install()
    device = get_device("npu:1")
    assert fake.calls == [("set_device", 1), ("jit_compile", False), ("allow_internal_format", False)]
    assert os.environ[npu.FALLBACK] == "1"
    assert device.notes == []


def test_a_fallback_that_was_asked_for_stays_and_is_noted(install, monkeypatch):
    install()
    monkeypatch.setenv(npu.FALLBACK, "0")
    assert "run on the CPU" in get_device("npu").notes[0]
    assert os.environ[npu.FALLBACK] == "0"


def test_a_machine_without_torch_npu_keeps_its_environment(monkeypatch):
    monkeypatch.delenv(npu.FALLBACK, raising=False)
    if "torch_npu" not in sys.modules:
        assert npu.count() == 0 and npu.FALLBACK not in os.environ
        assert "torch_npu is not installed" in npu.why_absent()


def test_seed_events_and_synchronisation(install):
    fake = install()
    device = get_device("npu:1")
    fake.calls.clear()
    device.seed(7)
    assert fake.calls == [("enter", 1), ("seed", 7), ("leave", 1)]
    fake.calls.clear()
    device.synchronize()
    device.empty_cache()
    with device.timer() as timer:
        pass
    assert timer.seconds == 0.25
    assert fake.calls == [("synchronize", 1), ("empty_cache",), ("record",), ("record",), ("event synchronize",)]


SOCS = {
    "Ascend 910A": [100, 104],
    "Ascend 310P": [200, 202, 205],
    "Ascend 910B1 (A2)": [220],
    "Ascend 910B2 (A2)": [221],
    "Ascend 910B2C (A2)": [222],
    "Ascend 910B3 (A2)": [223],
    "Ascend 910B4 (A2)": [224],
    "Ascend 910B4-1 (A2)": [225],
    "Ascend 310B": [240, 243],
    "Ascend 910_93 (A3)": [250, 256],
    "Ascend 950": [260],
}
WITHOUT_BF16 = {"Ascend 910A", "Ascend 310P", "Ascend 310B"}


@pytest.mark.parametrize("soc,name", [(soc, name) for name, socs in SOCS.items() for soc in socs])
def test_chip_identity(install, soc, name):
    assert chips.find("npu", "", soc).name == name
    install(soc=soc)
    capabilities = get_device("npu").capabilities
    assert capabilities.dtypes == (NO_BF16 if name in WITHOUT_BF16 else ALL_DTYPES)
    assert (capabilities.block_size, capabilities.block_alignment) == (128, 128)
    assert "torch_npu" in capabilities.source


def test_no_soc_number_has_two_rows():
    for soc in range(400):
        assert sum(chip.matches("npu", "", soc) for chip in chips.CHIPS) <= 1


@pytest.mark.parametrize("bf16", [True, False])
def test_an_unknown_chip_is_asked_and_noted(install, bf16):
    install(soc=999, name="Ascend1000", bf16=bf16)
    device = get_device("npu")
    assert device.supports(torch.bfloat16) == bf16
    assert device.capabilities.peak_flops == {} and device.capabilities.source is None
    assert "Ascend1000 #0 (SoC 999) is not in the table" in device.notes[0]


def test_310p_takes_float16_for_a_bfloat16_checkpoint(install):
    install(soc=202, name="Ascend310P3")
    dtype, note = get_device("npu").resolve_dtype("auto", torch.bfloat16)
    assert dtype == torch.float16 and "using float16" in note


def test_missing_cann_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file\\nmore')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(npu.FALLBACK, "1")
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    with pytest.raises(DeviceError, match="cannot load CANN .libhccl.so.*set_env.sh") as error:
        get_device("npu")
    assert "\n" not in str(error.value)


def test_driver_without_device(install):
    fake = install()
    fake.npu.is_available = lambda: False
    assert "check npu-smi info" in npu.why_absent()
    with pytest.raises(DeviceError, match="finds no Ascend NPU"):
        get_device("npu:0")
    assert isinstance(fake, types.ModuleType)
