"""npu-smi: every format of the table, the key-value answers, garbage, and the readings built on them."""

from __future__ import annotations

import stat
import sys
import time

import npu_smi_samples as samples
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surefoot.device import npu_smi, telemetry
from surefoot.device.npu_smi import MEGABYTE


def test_a2_table():
    first, second = npu_smi.parse_table(samples.A2)
    assert (first.card, first.chip, first.device, first.name, first.health) == (0, 0, 0, "910B3", "OK")
    assert (first.power, first.temperature, first.aicore, first.bus_id) == (93.6, 40, 7, "0000:C1:00.0")
    assert (first.memory_used, first.memory_total) == (3365 * MEGABYTE, 65536 * MEGABYTE)
    assert (second.device, second.health, second.power, second.aicore) == (1, "Warning", 101.2, 100)
    assert second.memory_used == 61440 * MEGABYTE
    assert npu_smi.version(samples.A2) == "24.1.rc2"


def test_a3_table_has_two_chips_a_card():
    chips = npu_smi.parse_table(samples.A3)
    assert [(c.card, c.chip, c.device) for c in chips] == [(0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 3)]
    assert [c.power for c in chips] == [178.5, None, 186.3, None]
    assert [c.temperature for c in chips] == [36, 35, 36, 37]
    assert [c.aicore for c in chips] == [3, 0, 0, 55]


def test_wide_table_of_26():
    chips = npu_smi.parse_table(samples.WIDE_26)
    assert [(c.device, c.power, c.temperature, c.memory_used) for c in chips] == [
        (0, 162.6, 34, 3419 * MEGABYTE),
        (1, None, 34, 2874 * MEGABYTE),
    ]


def test_310p_table_has_no_power_and_no_hbm():
    chips = npu_smi.parse_table(samples.A310P)
    assert [(c.card, c.device, c.power, c.aicore) for c in chips] == [(1, 0, None, 0), (1, 1, None, 12)]
    assert [c.memory_used for c in chips] == [1576 * MEGABYTE, 1420 * MEGABYTE]


def test_key_value_answers():
    npu, mcu = npu_smi.parse_fields(samples.COMMON)
    assert npu_smi.reading(npu, "Real-time Power") == 93.6 and npu_smi.reading(npu, "Temperature") == 40
    assert mcu["Chip Name"] == "mcu" and npu_smi.reading(mcu, "Real-time Power") is None
    merged = {}
    for text in (samples.COMMON, samples.USAGES, samples.POWER, samples.TEMP):
        merged |= npu_smi.parse_fields(text)[0]
    chip = npu_smi.from_fields(merged)
    assert (chip.power, chip.temperature, chip.aicore) == (93.7, 40, 41)
    assert (chip.memory_total, chip.memory_used) == (65536 * MEGABYTE, int(65536 * MEGABYTE * 0.05))


@pytest.mark.parametrize(
    "text", ["", "\n", "command not found", "| a | b |", "|" * 99, "DrvMngGetConsoleLogLevel failed."]
)
def test_garbage_is_none_and_a_warning(text):
    with pytest.warns(UserWarning, match="no power"):
        assert npu_smi.parse_table(text) is None
    with pytest.warns(UserWarning, match="no power"):
        assert npu_smi.parse_fields(text) is None


def test_a_cut_table_gives_what_is_whole():
    (chip,) = npu_smi.parse_table(samples.A2[: samples.A2.index("| 0                         | 0000:C1") + 98])
    assert chip.device == 0 and chip.memory_total == 65536 * MEGABYTE


LINES = [line for text in vars(samples).values() if isinstance(text, str) and "|" in text for line in text.splitlines()]
WORDS = st.sampled_from(
    ["|", "-", "NA", "OK", "0000:C1:00.0", "0", "7", "910B3", "3 / 4", " / ", ":", "\x00", "9" * 40, "é", "١"]
)


@pytest.mark.filterwarnings("ignore:npu-smi")
@given(st.lists(st.one_of(st.sampled_from(LINES), st.lists(WORDS).map(" ".join), st.text(max_size=60))))
def test_no_text_crashes_the_parsers(lines):
    text = "\n".join(lines)
    for chip in npu_smi.parse_table(text) or []:
        assert chip.power is None or chip.power >= 0
    for fields in npu_smi.parse_fields(text) or []:
        npu_smi.from_fields(fields)
    npu_smi.version(text)


def fake_program(folder, name: str, body: str) -> None:
    program = folder / name
    program.write_text(f"#!{sys.executable}\nimport sys\nargs = sys.argv[1:]\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(npu_smi, "USUAL_PLACES", ())
    return tmp_path


def test_status_through_an_executable(path, monkeypatch):
    fake_program(path, "npu-smi", f"assert args == ['info']\nprint({samples.A3!r})")
    assert npu_smi.status(1).temperature == 35
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "3,2")
    assert npu_smi.status(0).aicore == 55
    reading = telemetry.read("npu:1")
    assert (reading.source, reading.power, reading.memory_total) == ("npu-smi", 186.3, 65536 * MEGABYTE)
    with pytest.warns(UserWarning, match="lists no device 7"):
        assert npu_smi.status(7) is None


def test_unreadable_table_falls_back_to_the_detailed_queries(path):
    answers = {"common": samples.COMMON, "usages": samples.USAGES, "power": samples.POWER, "temp": samples.TEMP}
    fake_program(path, "npu-smi", f"print({answers!r}[args[2]] if '-t' in args else 'new format')")
    with pytest.warns(UserWarning, match="no table"):
        chip = npu_smi.status(0)
    assert (chip.power, chip.aicore, chip.memory_total) == (93.6, 41, 65536 * MEGABYTE)


@pytest.mark.parametrize(
    "body,why", [("sys.exit('dcmi is not initialised')", "code 1: dcmi"), ("", "no table"), (None, "path")]
)
def test_a_failing_executable_is_none_and_a_warning(path, body, why):
    if body is not None:
        fake_program(path, "npu-smi", body)
    with pytest.warns(UserWarning, match=why):
        assert telemetry.read("npu:0") is None


def test_a_hanging_executable(path):
    fake_program(path, "npu-smi", "import time; time.sleep(30)")
    with pytest.warns(UserWarning, match="did not answer"):
        assert npu_smi.call("info", timeout=0.2) is None


def test_nvidia_and_cpu_readings(path):
    fake_program(path, "nvidia-smi", "assert '--id=1' in args\nprint('301.5, 61, 99, 1024, 4096')")
    reading = telemetry.read("cuda:1")
    assert (reading.power, reading.temperature, reading.utilisation) == (301.5, 61, 99)
    assert reading.memory_total == 4096 * MEGABYTE
    fake_program(path, "nvidia-smi", "print('[N/A], 61, 99, 1, 2')")
    assert telemetry.read("cuda").power is None
    fake_program(path, "nvidia-smi", "print('NVIDIA-SMI has failed')")
    with pytest.warns(UserWarning, match="nvidia-smi did not answer"):
        assert telemetry.read("cuda:0") is None
    assert telemetry.read("cpu") is None


def test_sampler_integrates_power(monkeypatch):
    readings = iter([100.0, 200.0, None, 300.0])
    monkeypatch.setattr(telemetry, "read", lambda device: telemetry.Reading("x", next(readings, 300.0)))
    with telemetry.Sampler("npu:0", interval=0.01) as sampler:
        while len(sampler.samples) < 5:
            time.sleep(0.005)
    sampler.samples = [(float(t), r) for t, (_, r) in enumerate(sampler.samples[:4])]
    assert sampler.energy() == 150 + 2 * 250 and sampler.mean_power() == 650 / 3
    sampler.samples = sampler.samples[:1]
    assert sampler.energy() is None and sampler.mean_power() == 100.0
    sampler.samples = []
    assert sampler.mean_power() is None
