"""What a device draws and how warm it is: one reading for NPUs (npu-smi) and NVIDIA GPUs (nvidia-smi), none for CPUs.

    with Sampler("npu:0", interval=0.5) as sampler: ...run...
    sampler.mean_power(), sampler.energy()               # watts, joules; None where nothing could be read

Readings come from another process and take tens of milliseconds, so they are taken on a thread of their own.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
import warnings
from dataclasses import dataclass, field

from surefoot.device import npu_smi
from surefoot.device.npu_smi import MEGABYTE


@dataclass(frozen=True)
class Reading:
    """Watts, degrees Celsius, percent, bytes; None where the tool does not say."""

    source: str
    power: float | None = None
    temperature: float | None = None
    utilisation: float | None = None
    memory_used: int | None = None
    memory_total: int | None = None


def read(device: str) -> Reading | None:
    """One reading of "npu:0", "cuda:1", ...; None for a CPU, and None with a warning where the tool cannot be read."""
    kind, _, index = device.partition(":")
    if kind == "npu":
        return _read_npu(int(index or 0))
    if kind == "cuda":
        return _read_cuda(int(index or 0))
    return None


def _read_npu(index: int) -> Reading | None:
    chip = npu_smi.status(index)
    if chip is None:
        return None
    return Reading("npu-smi", chip.power, chip.temperature, chip.aicore, chip.memory_used, chip.memory_total)


NVIDIA_FIELDS = "power.draw,temperature.gpu,utilization.gpu,memory.used,memory.total"


def _read_cuda(index: int) -> Reading | None:
    program = shutil.which("nvidia-smi")
    command = [program or "", f"--query-gpu={NVIDIA_FIELDS}", "--format=csv,noheader,nounits", f"--id={index}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        done = None
    values = [npu_smi.number(part) for part in done.stdout.split(",")] if done and done.returncode == 0 else []
    if len(values) != 5:
        warnings.warn("nvidia-smi did not answer: no power, temperature or load of the GPU", stacklevel=2)
        return None
    power, temperature, load, used, total = values
    return Reading("nvidia-smi", power, temperature, load, _bytes(used), _bytes(total))


def _bytes(megabytes: float | None) -> int | None:
    return None if megabytes is None else int(megabytes * MEGABYTE)


@dataclass
class Sampler:
    """Takes a reading every `interval` seconds until the block ends; `samples` holds (monotonic time, reading)."""

    device: str
    interval: float = 1.0
    samples: list[tuple[float, Reading]] = field(default_factory=list)

    def __enter__(self) -> Sampler:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            began = time.monotonic()
            reading = read(self.device)
            if reading is None:
                return  # What cannot be read once is not asked for again.
            self.samples.append(((began + time.monotonic()) / 2, reading))
            if self._stop.wait(max(0.0, self.interval - (time.monotonic() - began))):
                return

    def _powers(self) -> list[tuple[float, float]]:
        return [(at, r.power) for at, r in self.samples if r.power is not None]

    def mean_power(self) -> float | None:
        """Watts, weighted by time."""
        powers, energy = self._powers(), self.energy()
        if energy is None:
            return powers[0][1] if powers else None
        return energy / (powers[-1][0] - powers[0][0])

    def energy(self) -> float | None:
        """Joules between the first and the last reading, by trapezoids; None with fewer than two."""
        powers = self._powers()
        if len(powers) < 2:
            return None
        return sum((b - a) * (p + q) / 2 for (a, p), (b, q) in zip(powers, powers[1:]))
