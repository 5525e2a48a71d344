"""The CPU, and how much memory this process may really use (containers see the host's MemTotal but not its limit)."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from surefoot.device import heap
from surefoot.device.base import Device
from surefoot.device.graphs import Graph

# A cgroup v1 without a limit reports a huge page-aligned number instead of "max".
_NO_LIMIT = 1 << 60


class CpuDevice(Device):
    type = "cpu"
    captures_on_use = True

    def name(self) -> str:
        try:
            match = re.search(
                r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
            )
        except OSError:
            match = None
        name = match.group(1).strip() if match else platform.processor() or platform.machine()
        return f"{name}, {os.cpu_count()} logical CPUs"

    def no_graphs(self) -> str | None:
        return None

    def capture(self, fn: Callable[[], Any], pool: Any = None) -> Graph:
        from surefoot.device.cpu_graphs import CpuGraph

        return CpuGraph(fn)

    def loading(self) -> AbstractContextManager[None]:
        return heap.kept_afterwards()

    def memory(self) -> tuple[int, int]:
        free, total = _system_memory()
        limit = cgroup_memory()
        if limit is None:
            return free, total
        return min(free, limit[0]), min(total, limit[1])

    def peak_memory(self) -> int | None:
        """Resident memory of the process, which is what an engine's weights, cache and activations are on a CPU."""
        try:
            found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        except OSError:
            found = None
        if found:
            return int(found.group(1)) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def reset_peak_memory(self) -> bool:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: proc(5)
        except OSError:
            return False
        return True


def _system_memory() -> tuple[int, int]:
    """(free, total) bytes of the machine."""
    try:
        return parse_meminfo(Path("/proc/meminfo").read_text())
    except OSError:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return min(parse_vm_stat(subprocess.run(["vm_stat"], capture_output=True, text=True).stdout), total), total


def parse_meminfo(text: str) -> tuple[int, int]:
    """(MemAvailable, MemTotal) of /proc/meminfo in bytes."""
    kib = {key: int(value) for key, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    return kib.get("MemAvailable", kib["MemFree"]) * 1024, kib["MemTotal"] * 1024


def parse_vm_stat(text: str) -> int:
    """Bytes that macOS can hand out without swapping: free, inactive and speculative pages."""
    page = re.search(r"page size of (\d+) bytes", text)
    pages = re.findall(r"^Pages (?:free|inactive|speculative):\s+(\d+)", text, re.MULTILINE)
    return (int(page.group(1)) if page else 4096) * sum(map(int, pages))


def cgroup_memory(
    proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> tuple[int, int] | None:
    """(free, limit) bytes by the tightest memory limit of this process's cgroups (v2 or v1), None without a limit."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return None
    tightest: tuple[int, int] | None = None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # NOTE: inside a container the path may be the host's and absent here; the mount's own root still has the limit.
        leaf = top / path.strip("/")
        for folder in [leaf, *leaf.parents]:
            found = _limit_of(folder, *names)
            if found and (tightest is None or found[0] < tightest[0]):
                tightest = found
            if folder == top:
                break
    return tightest


def _limit_of(folder: Path, limit_file: str, usage_file: str, reclaimable: str) -> tuple[int, int] | None:
    """(free, limit) of one cgroup folder. Page cache that the kernel can drop at once counts as free."""
    try:
        limit = int((folder / limit_file).read_text())
        usage = int((folder / usage_file).read_text())
        stat = (folder / "memory.stat").read_text()
    except (OSError, ValueError):
        return None
    if limit >= _NO_LIMIT:
        return None
    cached = re.search(rf"^{reclaimable} (\d+)$", stat, re.MULTILINE)
    return max(0, limit - usage + (int(cached.group(1)) if cached else 0)), limit
