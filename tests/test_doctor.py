"""The doctor: every known-good row with one wrong pin, machines by their files, and what is said of each."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from surefoot.bringup import doctor, versions
from surefoot.bringup import machine as machines
from surefoot.bringup.doctor import ABSENT, NOTE, OK, WRONG, examine, explain
from surefoot.bringup.machine import Machine
from surefoot.cli.main import run_cli
from surefoot.device.probe import probe

GOOD_CPU = {"torch": "2.9.0", "cuda_build": None, "threads": 2, "cpu_capability": "AVX2", "kernels": "avx2"}
FACTS = {
    "cpu": GOOD_CPU,
    "cuda": GOOD_CPU | {"cuda_build": "12.8", "cuda_devices": ["NVIDIA H200"]},
    "npu": GOOD_CPU | {"npu_devices": ["Ascend910B3"], "soc": 223},
}


def facts(**changes):
    return lambda part: FACTS[part] | changes if part in FACTS else pytest.fail(part)


def installed(row: versions.Row, **pins: str) -> dict[str, str]:
    return {name: values[0] for name, values in row.items()} | {k.replace("_", "-"): v for k, v in pins.items()}


def ascend_machine(row: versions.Row = versions.ROWS[0], **pins: str) -> Machine:
    found = installed(row, **pins)
    return Machine(
        python="3.11.9",
        packages={name: found.get(name) for name in machines.PACKAGES} | {"transformers": "4.57.1"},
        driver="25.5.0",
        firmware="7.8.0",
        cann=found["cann"],
        cann_home="/usr/local/Ascend/ascend-toolkit/latest",
        cann_active=True,
        libraries=dict.fromkeys(machines.LIBRARIES, "/usr/local/Ascend/ascend-toolkit/latest/lib64"),
        devices=["davinci0"],
        npu_smi="/usr/local/bin/npu-smi",
        cpu_count=2,
    )


def levels(report, level):
    return {f.component: f for f in report.findings if f.level == level}


@pytest.mark.parametrize("row", versions.ROWS, ids=lambda r: r["vllm-ascend"][0])
def test_every_good_row_is_ready(row):
    for i in range(max(map(len, row.values()))):
        pins = {name: values[min(i, len(values) - 1)] for name, values in row.items()}
        assert versions.diagnose(pins) == (row, [])
    report = examine(ascend_machine(row), facts())
    assert report.device == "npu" and not report.wrong, report.verdict
    assert report.verdict == "ready for npu"
    assert row["vllm-ascend"][0] in levels(report, OK)["versions"].text


CASES = [(row, name) for row in versions.ROWS for name in row]
WRONG_PINS = {
    "vllm-ascend": "0.99.0",
    "vllm": "0.99.0",
    "cann": "7.0.0",
    "torch": "2.4.0",
    "torch-npu": "2.4.0",
    "triton-ascend": "1.0.0",
}


@pytest.mark.parametrize("row,name", CASES, ids=lambda x: x if isinstance(x, str) else x["vllm-ascend"][0])
def test_one_wrong_pin_is_named_with_what_it_should_be(row, name):
    pins = installed(row) | {name: WRONG_PINS[name]}
    nearest, wrong = versions.diagnose(pins)
    assert [(w.component, w.installed) for w in wrong] == [(name, WRONG_PINS[name])]
    if name != "vllm-ascend":
        assert nearest is row and wrong[0].wanted == row[name]
    report = examine(ascend_machine(row, **{name.replace("-", "_"): WRONG_PINS[name]}), facts())
    (finding,) = report.wrong
    assert finding.component == name and WRONG_PINS[name] in finding.text
    assert wrong[0].wanted[0] in finding.mend and "nearest known-good row: vllm-ascend" in finding.mend
    assert report.verdict.startswith(f"not ready for npu: {name}: ")


@pytest.mark.parametrize("row,name", CASES, ids=lambda x: x if isinstance(x, str) else x["vllm-ascend"][0])
def test_a_pin_from_another_row_is_noticed(row, name):
    """The wrong pin is a real version, so another row may be as near: then both ways out are said."""
    for other in versions.ROWS:
        if name not in other or other[name][0] in row[name]:
            continue
        pins = installed(row) | {name: other[name][0]}
        nearest, wrong = versions.diagnose(pins)
        assert len(wrong) == 1, (pins, wrong)
        if wrong[0].component != name:
            assert name == "vllm-ascend" and fits_but(pins, nearest, wrong[0].component)


def fits_but(pins, row, component) -> bool:
    return versions.mismatches(row, pins) == [component]


def test_the_other_way_out_is_said():
    pins = installed(versions.ROWS[3], vllm="0.22.1")
    row, (wrong,) = versions.diagnose(pins)
    finding = explain(wrong, row, pins)
    assert finding.component == "vllm" and "install vllm 0.21.0" in finding.mend
    assert finding.mend.endswith("or keep it and install vllm-ascend 0.22.1rc1")


def test_without_vllm_torch_and_its_backend_have_to_match():
    assert versions.diagnose({"torch": "2.13.0", "torch-npu": "2.13.0"}) == (None, [])
    _, (wrong,) = versions.diagnose({"torch": "2.13.0+cpu", "torch-npu": "2.12.0"})
    assert wrong.component == "torch-npu" and "built for torch 2.12.0" in wrong.why
    row, wrongs = versions.diagnose({"torch": "2.9.0", "torch-npu": "2.9.0.post2", "cann": "8.5.1"})
    assert row["vllm-ascend"] == ("0.19.1rc1",) and not wrongs
    _, (wrong,) = versions.diagnose({"torch": "2.9.0", "torch-npu": "2.9.0.post2", "cann": "8.2.RC1"})
    assert (wrong.component, wrong.wanted) == ("cann", ("8.5.1",))
    assert versions.diagnose({"torch": "2.9.0+cpu", "vllm": "0.11.0"}) == (None, [])
    assert versions.diagnose({}) == (None, [])


def test_local_versions_and_case_do_not_matter():
    assert (
        versions.diagnose(installed(versions.ROWS[8], torch="2.7.1+cpu", cann="8.3.rc2", vllm="0.11.0+empty"))[1] == []
    )


def test_a_machine_with_none_of_it():
    bare = Machine(python="3.13.1", packages={"torch": "2.13.0", "transformers": "5.23.0"}, cpu_count=2)
    report = examine(bare, facts())
    assert report.device == "cpu" and not report.wrong
    assert report.verdict == "ready for cpu; this machine has nothing of Ascend"
    assert {"driver", "cann", "torch-npu", "device"} <= set(levels(report, ABSENT))
    report = examine(bare, facts(), "npu")
    assert {"driver", "cann", "torch-npu", "device"} <= set(levels(report, WRONG))
    assert report.verdict.startswith("not ready for npu: device: no /dev/davinci*")
    assert "torch-npu 2.10.0.post4" in levels(report, WRONG)["torch-npu"].mend


@pytest.mark.parametrize(
    "change,component,text",
    [
        ({"python": "3.9.1"}, "python", "3.9.1 has no torch-npu"),
        ({"driver": None}, "driver", "no Ascend driver"),
        ({"devices": []}, "device", "no /dev/davinci"),
        ({"cann": None, "cann_home": None}, "cann", "not there"),
        ({"cann": None, "cann_home": None, "cann_active": False}, "cann", "no CANN toolkit"),
        ({"libraries": {"libascendcl.so": None}}, "libascendcl.so", "not on LD_LIBRARY_PATH"),
    ],
)
def test_one_broken_part_is_named(change, component, text):
    machine = ascend_machine()
    for key, value in change.items():
        setattr(machine, key, value)
    report = examine(machine, facts())
    assert component in {f.component for f in report.wrong} and text in levels(report, WRONG)[component].text
    assert all(f.mend for f in report.wrong)


def test_what_the_probe_says():
    machine = ascend_machine()
    machine.packages["transformers"] = "4.40.0"
    report = examine(machine, lambda part: {"error": "libhccl.so: cannot open"} if part == "npu" else FACTS[part])
    assert "libhccl.so" in levels(report, WRONG)["npu"].text and "4.40.0" in levels(report, WRONG)["transformers"].text
    report = examine(ascend_machine(), lambda part: FACTS[part] | {"npu_devices": [], "soc": None})
    assert "none of 1 devices" in levels(report, WRONG)["npu"].text
    report = examine(ascend_machine(), lambda part: {"error": "no module named torch"})
    assert "cannot be imported (no module named torch)" in levels(report, WRONG)["torch"].text


def test_cuda_and_cpu_machines():
    gpu = Machine(python="3.12.0", packages={"torch": "2.9.0", "vllm": "0.11.0", "transformers": "4.57.0"}, cpu_count=8)
    gpu.nvidia_smi = "/usr/bin/nvidia-smi"
    report = examine(gpu, facts())
    assert report.device == "cuda" and not report.wrong and levels(report, OK)["cuda"].text == "NVIDIA H200"
    report = examine(gpu, facts(cuda_devices=[], cuda_build=None))
    assert "has no CUDA" in levels(report, WRONG)["cuda"].text
    assert not examine(gpu, facts(cuda_devices=[], cuda_build=None), "cpu").wrong
    report = examine(gpu, facts(cuda_devices=[]))
    assert "finds no GPU" in levels(report, WRONG)["cuda"].text
    report = examine(gpu, facts(kernels=None, threads=64), "cpu")
    assert set(levels(report, NOTE)) == {"cpu kernels", "threads"}
    assert levels(report, NOTE)["threads"].mend == "use --threads 8"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_files_of_an_ascend_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(machines.platform, "machine", lambda: "aarch64")
    write(tmp_path / "usr/local/Ascend/driver/version.info", "Version=25.5.0\nascendhal_version=7.35.23\n")
    write(tmp_path / "usr/local/Ascend/firmware/version.info", "Version=7.8.0.2.212\n")
    toolkit = tmp_path / "usr/local/Ascend/ascend-toolkit/latest"
    write(toolkit / "aarch64-linux/ascend_toolkit_install.info", "package_name=Ascend-cann-toolkit\nversion=8.5.1\n")
    write(toolkit / "lib64/libascendcl.so", "")
    write(tmp_path / "dev/davinci0", "")
    write(tmp_path / "dev/davinci_manager", "")
    found = machines.look(tmp_path, {"LD_LIBRARY_PATH": f"/nowhere:{toolkit}/lib64", "PATH": ""})
    assert (found.driver, found.firmware, found.cann, found.devices) == ("25.5.0", "7.8.0.2.212", "8.5.1", ["davinci0"])
    assert found.cann_active is False and found.npu_smi is None
    assert found.libraries == {"libascendcl.so": f"{toolkit}/lib64", "libhccl.so": None}
    found = machines.look(tmp_path, {"ASCEND_HOME_PATH": str(toolkit)})
    assert found.cann_active and found.cann == "8.5.1"
    assert machines.look(tmp_path, {"ASCEND_HOME_PATH": "/not/there"}).cann is None
    write(toolkit / "aarch64-linux/ascend_toolkit_install.info", "garbage")
    write(toolkit / "version.cfg", "# version: 1.0\nrunning_version=[x]\n")
    write(toolkit / "toolkit/version.info", "Version=8.3.RC2\n")
    assert machines.look(tmp_path, {}).cann == "8.3.RC2"


def test_on_this_machine(capsys):
    assert run_cli(["doctor", "--device", "cpu", "--json"]) in (0, 1)
    report = json.loads(capsys.readouterr().out)
    assert report["device"] == "cpu" and report["ready"] is True
    assert "vllm-ascend" in report["known_good"]["source"] and len(report["known_good"]["rows"]) == len(versions.ROWS)
    assert run_cli(["doctor", "--device", "tpu"]) == 2


def test_the_table(capsys, monkeypatch):
    bare = Machine(python="3.11.0", packages={"torch": "2.13.0", "transformers": "5.23.0"}, cpu_count=2)
    monkeypatch.setattr(machines, "look", lambda: bare)
    monkeypatch.setitem(sys.modules, "surefoot.device.probe", types.SimpleNamespace(probe=facts()))
    assert run_cli(["doctor", "--device", "npu"]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("not ready for npu: device") and "-> install the CANN toolkit" in out


def test_a_probe_that_dies_is_one_line(monkeypatch):
    from surefoot.device import probe as module

    parts = {
        "crash": "import os; os.kill(os.getpid(), 11)",
        "raise": "raise OSError('libhccl.so: no')",
        "hang": "while 1: 0",
    }
    monkeypatch.setattr(module, "CORE", "facts = {}\n")
    monkeypatch.setattr(module, "PARTS", parts)
    assert probe("crash")["error"] == "the process died of signal 11"
    assert probe("raise")["error"] == "OSError: libhccl.so: no"
    assert "no answer" in probe("hang", timeout=1)["error"]


@pytest.mark.parametrize(("kernels", "says"), [("portable", "AVX2 or NEON"), (None, "not built"), ("avx2", "avx2 on")])
def test_slow_kernels_are_named(kernels, says):
    found = doctor.cpu(Machine(python="3.11.0", packages={}, cpu_count=2), GOOD_CPU | {"kernels": kernels})
    assert says in next(f.text for f in found if f.component == "cpu kernels")
