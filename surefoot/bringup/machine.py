"""What is installed on this machine: versions by file and package metadata, libraries, device files; nothing is run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from surefoot.device.npu_smi import version_file

PACKAGES = ("torch", "torch-npu", "vllm", "vllm-ascend", "transformers", "triton-ascend")
LIBRARIES = ("libascendcl.so", "libhccl.so")
ASCEND = "usr/local/Ascend"
# Where set_env.sh points; then where the installers put CANN.
CANN_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
CANN_PLACES = (f"{ASCEND}/ascend-toolkit/latest", f"{ASCEND}/cann", f"{ASCEND}/latest")
CANN_FILES = (
    "{arch}-linux/ascend_toolkit_install.info",
    "ascend_toolkit_install.info",
    "version.cfg",
    "toolkit/version.info",
    "compiler/version.info",
)


@dataclass
class Machine:
    """Versions are None where the component is not there.

    cann_home: where CANN lies.  cann_active: its set_env.sh was sourced.  libraries: where each was found on the
    loader's path, None if it was not.  devices: /dev/davinci*.
    """

    python: str
    packages: dict[str, str | None] = field(default_factory=dict)
    driver: str | None = None
    firmware: str | None = None
    cann: str | None = None
    cann_home: str | None = None
    cann_active: bool = False
    libraries: dict[str, str | None] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)
    npu_smi: str | None = None
    nvidia_smi: str | None = None
    cpu: str = ""
    cpu_count: int = 1

    @property
    def installed(self) -> dict[str, str]:
        """Versions of what has rows: the packages and CANN, absent ones left out."""
        found = {**self.packages, "cann": self.cann}
        return {name: version for name, version in found.items() if version}


def look(root: Path = Path("/"), environment: Mapping[str, str] | None = None) -> Machine:
    """This machine, or the one whose files lie under `root`."""
    environment = os.environ if environment is None else environment
    home, active = cann_home(root, environment)
    return Machine(
        python=platform.python_version(),
        packages={name: package_version(name) for name in PACKAGES},
        driver=version_file(root / ASCEND / "driver/version.info"),
        firmware=version_file(root / ASCEND / "firmware/version.info"),
        cann=cann_version(home) if home else None,
        cann_home=str(home) if home else None,
        cann_active=active,
        libraries={name: find_library(name, environment) for name in LIBRARIES},
        devices=sorted(p.name for p in (root / "dev").glob("davinci[0-9]*")),
        npu_smi=shutil.which("npu-smi", path=environment.get("PATH")),
        nvidia_smi=shutil.which("nvidia-smi", path=environment.get("PATH")),
        cpu=platform.machine(),
        cpu_count=usable_cpus(),
    )


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cann_home(root: Path, environment: Mapping[str, str]) -> tuple[Path | None, bool]:
    """(folder of CANN, whether the environment points there)."""
    for variable in CANN_VARIABLES:
        if value := environment.get(variable):
            folder = Path(value)
            return (folder, True) if folder.is_dir() else (None, True)
    return next((root / place for place in CANN_PLACES if (root / place).is_dir()), None), False


def cann_version(home: Path) -> str | None:
    """The toolkit's version by the first of its version files that says one."""
    arch = platform.machine()
    versions = (version_file(home / name.format(arch=arch)) for name in CANN_FILES)
    return next((v for v in versions if v), None)


def find_library(name: str, environment: Mapping[str, str]) -> str | None:
    """The folder of LD_LIBRARY_PATH that has this library."""
    folders = [f for f in environment.get("LD_LIBRARY_PATH", "").split(":") if f]
    return next((f for f in folders if (Path(f) / name).exists()), None)


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
