"""What is wrong with an installation, which component it is, and what to do: `surefoot doctor`.

Checks go from the ground up (driver, CANN, libraries, packages, device), so the first thing found wrong is the first to
mend. On a machine without an NPU that is no illness, unless `npu` was asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from surefoot.bringup import versions
from surefoot.bringup.machine import Machine

OK, NOTE, WRONG, ABSENT = "ok", "note", "wrong", "absent"
MIN_TRANSFORMERS = (4, 57)
Probe = Callable[[str], dict[str, Any]]


@dataclass(frozen=True)
class Finding:
    """level: ok, note (worth knowing), wrong (mend it) or absent (not there, and not needed for what was asked)."""

    level: str
    component: str
    text: str
    mend: str = ""


@dataclass
class Report:
    device: str
    findings: list[Finding] = field(default_factory=list)
    has_ascend: bool = False

    @property
    def wrong(self) -> list[Finding]:
        return [f for f in self.findings if f.level == WRONG]

    @property
    def verdict(self) -> str:
        if self.wrong:
            first = self.wrong[0]
            more = f" ({len(self.wrong) - 1} more above)" if len(self.wrong) > 1 else ""
            return f"not ready for {self.device}: {first.component}: {first.text}; {first.mend}{more}"
        return f"ready for {self.device}" + ("" if self.has_ascend else "; this machine has nothing of Ascend")

    def as_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "ready": not self.wrong,
            "verdict": self.verdict,
            "known_good": {"source": versions.SOURCE, "rows": [dict(row) for row in versions.ROWS]},
            "findings": [asdict(f) for f in self.findings],
        }


def examine(machine: Machine, probe: Probe, device: str = "auto") -> Report:
    """device: "npu", "cuda" or "cpu" must work; "auto" is what the machine seems to be for."""
    if device == "auto":
        device = "npu" if has_ascend(machine) else "cuda" if machine.nvidia_smi else "cpu"
    report = Report(device, has_ascend=has_ascend(machine))
    report.findings += ascend(machine, wanted=device == "npu")
    report.findings += packages(machine, wanted=device == "npu")
    # What follows imports torch; where pins are wrong already, that is no news but still shows what breaks.
    report.findings += cpu(machine, probe("cpu"))
    if device == "cuda" or machine.nvidia_smi:
        report.findings += cuda(machine, probe("cuda"), wanted=device == "cuda")
    if device == "npu" and machine.packages.get("torch-npu"):
        report.findings += npu(machine, probe("npu"))
    return report


def has_ascend(machine: Machine) -> bool:
    return bool(machine.devices or machine.driver or machine.cann_home) or bool(
        {"torch-npu", "vllm-ascend", "triton-ascend"} & set(machine.installed)
    )


def ascend(machine: Machine, wanted: bool) -> list[Finding]:
    """Driver, firmware, CANN, libraries and device files, from the ground up."""
    missing = WRONG if wanted else ABSENT
    found: list[Finding] = []

    def check(component: str, value: Any, absent: str, mend: str, level: str = missing) -> None:
        found.append(Finding(OK, component, str(value)) if value else Finding(level, component, absent, mend))

    check(
        "device",
        ", ".join(machine.devices),
        "no /dev/davinci*",
        "check that the card is seated: lspci | grep -i huawei",
    )
    check("driver", machine.driver, "no Ascend driver", "install the NPU driver, then run npu-smi info")
    # Containers often have the driver mounted and the firmware not.
    firmware = NOTE if machine.driver else missing
    check("firmware", machine.firmware, "no firmware version file", "install the firmware on the host", firmware)
    check("npu-smi", machine.npu_smi, "not on the path", "add the driver's tools to PATH, or mount them", firmware)
    if machine.cann_home is None and machine.cann_active:
        mend = "source the set_env.sh of the CANN that is installed"
        found.append(Finding(WRONG, "cann", "ASCEND_HOME_PATH points to a folder that is not there", mend))
    else:
        text = f"{machine.cann} in {machine.cann_home}" if machine.cann else machine.cann_home
        check("cann", text, "no CANN toolkit", "install the CANN toolkit and kernels for your chip")
    if machine.cann_home:
        for name, folder in machine.libraries.items():
            mend = f"source {machine.cann_home}/set_env.sh (or its parent's) in this shell"
            check(name, folder, "not on LD_LIBRARY_PATH", mend, WRONG)
    return found


def packages(machine: Machine, wanted: bool = False) -> list[Finding]:
    """Python and the installed packages against the known-good rows."""
    installed = machine.installed
    row, wrong = versions.diagnose(installed)
    by_component = {w.component: w for w in wrong}
    found = [python_version(machine)]
    for name in versions.COMPONENTS:
        if name not in installed:
            found += [] if name == "cann" else [not_installed(name, wanted, row)]
        elif name in by_component:
            found.append(explain(by_component[name], row, installed))
        elif name != "cann":
            found.append(Finding(OK, name, installed[name]))
    if row and not wrong and len(set(installed) & set(versions.COMPONENTS)) > 1:
        found.append(Finding(OK, "versions", f"agree with the row {versions.describe(row)}"))
    if row is None and "torch-npu" in installed and not wrong:
        text = f"no vllm-ascend release uses torch {installed.get('torch')}: Surefoot's own engine only"
        found.append(Finding(NOTE, "versions", text))
    return [*found, transformers(installed.get("transformers"))]


def not_installed(name: str, wanted: bool, row: versions.Row | None) -> Finding:
    """Only torch-npu is needed by Surefoot's own engine."""
    if not wanted or name != "torch-npu":
        return Finding(ABSENT, name, "not installed")
    row = row or versions.ROWS[0]
    mend = f"install torch {row['torch'][0]} and torch-npu {row['torch-npu'][-1]} (row: {versions.describe(row)})"
    return Finding(WRONG, name, "not installed", mend)


def explain(wrong: versions.Wrong, row: versions.Row | None, installed: dict[str, str]) -> Finding:
    """One wrong pin in words: what it is, what it has to be, and the other way out."""
    wanted = " or ".join(wrong.wanted)
    text = wrong.why or f"{wrong.installed} does not go with the rest, which wants {wanted}"
    mend = f"install {wrong.component} {wanted}"
    if row:
        mend += f" (nearest known-good row: {versions.describe(row)})"
        rest = {c: v for c, v in installed.items() if c != "vllm-ascend"}
        other = versions.nearest(rest)
        if wrong.component != "vllm-ascend" and not versions.mismatches(other, rest) and other is not row:
            mend += f", or keep it and install vllm-ascend {other['vllm-ascend'][0]}"
    return Finding(WRONG, wrong.component, text, mend)


def python_version(machine: Machine) -> Finding:
    minor = ".".join(machine.python.split(".")[:2])
    if has_ascend(machine) and minor not in versions.PYTHON:
        mend = f"make an environment with one of {', '.join(versions.PYTHON)}"
        return Finding(WRONG, "python", f"{machine.python} has no torch-npu and vllm-ascend releases", mend)
    return Finding(OK, "python", machine.python)


def transformers(version: str | None) -> Finding:
    if version is None:
        return Finding(WRONG, "transformers", "not installed", "pip install 'transformers>=4.57'")
    numbers = tuple(int(n) if n.isdigit() else 0 for n in version.split(".")[:2])
    if numbers < MIN_TRANSFORMERS:
        return Finding(WRONG, "transformers", f"{version} is older than 4.57", "pip install -U 'transformers>=4.57'")
    return Finding(OK, "transformers", version)


def cpu(machine: Machine, facts: dict[str, Any]) -> list[Finding]:
    """PyTorch itself, threads, and Surefoot's CPU kernels."""
    if "error" in facts:
        mend = "reinstall it: pip install --force-reinstall torch"
        return [Finding(WRONG, "torch", f"cannot be imported ({facts['error']})", mend)]
    build = f"CUDA {facts['cuda_build']}" if facts["cuda_build"] else "no CUDA"
    found = [Finding(OK, "torch build", f"{facts['torch']}, {build}, CPU capability {facts['cpu_capability']}")]
    threads, cpus = facts["threads"], machine.cpu_count
    text = f"{threads} threads on {cpus} CPUs"
    if threads > cpus:
        found.append(Finding(NOTE, "threads", f"{text}: they will wait for each other", f"use --threads {cpus}"))
    else:
        found.append(Finding(OK, "threads", text))
    if facts.get("kernels") == "portable":
        text = f"no vector instructions that they know on {machine.cpu} (AVX2 or NEON), so ten times slower"
        found.append(Finding(NOTE, "cpu kernels", text))
    elif facts.get("kernels"):
        found.append(Finding(OK, "cpu kernels", f"{facts['kernels']} on {machine.cpu}"))
    else:
        mend = "install a C++17 compiler, then pip install --force-reinstall --no-deps surefoot"
        found.append(
            Finding(NOTE, "cpu kernels", "not built: the CPU runs on PyTorch's ops, several times slower", mend)
        )
    return found


def cuda(machine: Machine, facts: dict[str, Any], wanted: bool) -> list[Finding]:
    level = WRONG if wanted else NOTE
    if "error" in facts:
        return [Finding(level, "cuda", facts["error"], "check nvidia-smi and the torch build")]
    if facts["cuda_devices"]:
        return [Finding(OK, "cuda", ", ".join(facts["cuda_devices"]))]
    if facts["cuda_build"] is None:
        text = f"torch {facts['torch']} has no CUDA"
        return [Finding(level, "cuda", text, "install a CUDA build of torch, from https://pytorch.org")]
    if not machine.nvidia_smi:
        return [Finding(level, "cuda", "no NVIDIA driver", "install the driver, then run nvidia-smi")]
    mend = "compare the CUDA version that nvidia-smi prints with torch's; update the driver"
    return [Finding(level, "cuda", f"torch (CUDA {facts['cuda_build']}) finds no GPU", mend)]


def npu(machine: Machine, facts: dict[str, Any]) -> list[Finding]:
    if "error" in facts:
        mend = "mend what is wrong above first; then source CANN's set_env.sh"
        return [Finding(WRONG, "npu", f"torch-npu does not load ({facts['error']})", mend)]
    if not facts["npu_devices"]:
        text = f"torch-npu loads but finds none of {len(machine.devices)} devices"
        mend = "check ASCEND_RT_VISIBLE_DEVICES, and that the user is in the group HwHiAiUser"
        return [Finding(WRONG, "npu", text, mend)]
    return [Finding(OK, "npu", f"{', '.join(facts['npu_devices'])} (SoC {facts['soc']})")]
