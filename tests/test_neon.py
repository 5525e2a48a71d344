"""The Arm kernels, compiled for aarch64 and run: natively there, elsewhere under an emulator if it is installed."""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "surefoot/ops/cpu/csrc"
NATIVE = platform.machine() in ("aarch64", "arm64")
COMPILER = shutil.which("g++" if NATIVE else "aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", f"-I{CSRC}"]


@pytest.mark.slow
@pytest.mark.skipif(
    not COMPILER or not (NATIVE or EMULATOR), reason="needs an aarch64 compiler (g++-aarch64-linux-gnu) and qemu-user"
)
def test_arm_kernels_agree_with_the_portable_ones(tmp_path):
    variants = {
        "portable": [],
        "neon": ["-DSF_NEON"],
        "neon_dotprod": ["-DSF_NEON", "-march=armv8.2-a+dotprod"],
    }
    jobs = [(CSRC / "isa.cpp", name, [f"-DSF_ISA={name}", *flags]) for name, flags in variants.items()]
    jobs += [(CSRC / "threads.cpp", "threads", []), (ROOT / "tests/neon_check.cpp", "check", [])]

    def compile_one(job):
        source, name, flags = job
        done = subprocess.run(
            [COMPILER, *FLAGS, *flags, "-c", str(source), "-o", str(tmp_path / f"{name}.o")],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return str(tmp_path / f"{name}.o")

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs))
    program = str(tmp_path / "check")
    subprocess.run([COMPILER, "-static", *objects, "-o", program, "-lpthread"], check=True, capture_output=True)
    command = [program] if NATIVE else [EMULATOR, "-cpu", "max", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "agree" in done.stdout
