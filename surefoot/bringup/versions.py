"""Which versions go together on Ascend, as data, and which one of an installed set is the odd one out.

Rows: vllm-ascend's public documentation (installation page and release notes, read at 182b75e of 2026-08-22). A
component may have several good versions. CANN and the other pins move with vllm-ascend, so its release names the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SOURCE = "vllm-ascend's documentation, version table (2026-08-22)"
PYTHON = ("3.10", "3.11", "3.12")
COMPONENTS = ("vllm-ascend", "vllm", "cann", "torch", "torch-npu", "triton-ascend")

Row = Mapping[str, tuple[str, ...]]


def _row(ascend: str, vllm: str, cann: str, torch: str, backend: str, triton: str = "") -> Row:
    values = (ascend, vllm, cann, torch, backend, triton)
    return {name: tuple(v.split()) for name, v in zip(COMPONENTS, values) if v}


# Newest first.
ROWS: tuple[Row, ...] = (
    _row("0.23.0", "0.23.0", "9.1.0", "2.10.0", "2.10.0.post4", "3.2.2"),
    _row("0.23.0rc1", "0.23.0", "9.0.1", "2.10.0", "2.10.0.post2", "3.2.1"),
    _row("0.22.1rc1", "0.22.1", "9.0.0", "2.10.0", "2.10.0", "3.2.1"),
    _row("0.21.0rc1", "0.21.0", "9.0.0", "2.10.0", "2.10.0", "3.2.1"),
    _row("0.20.2rc1", "0.20.2", "9.0.0", "2.10.0", "2.10.0", "3.2.1"),
    _row("0.19.1rc1", "0.19.1", "8.5.1", "2.9.0", "2.9.0 2.9.0.post1 2.9.0.post2", "3.2.0"),
    _row("0.18.0", "0.18.0", "8.5.1", "2.9.0", "2.9.0 2.9.0.post1 2.9.0.post2", "3.2.0"),
    _row("0.13.0", "0.13.0", "8.5.0 8.5.1", "2.8.0", "2.8.0.post2"),
    _row("0.11.0", "0.11.0", "8.3.RC2", "2.7.1", "2.7.1.post1"),
    _row("0.9.1", "0.9.1", "8.2.RC1", "2.5.1", "2.5.1"),
)


@dataclass(frozen=True)
class Wrong:
    """One component that does not fit, and what would: `wanted` beside the others, by `row`."""

    component: str
    installed: str
    wanted: tuple[str, ...]
    row: Row
    why: str = ""


def normal(version: str) -> str:
    """For comparing: "2.10.0+cpu" is 2.10.0, "8.3.rc2" is 8.3.RC2."""
    return version.split("+")[0].strip().upper()


def fits(row: Row, component: str, version: str) -> bool:
    return component not in row or normal(version) in map(normal, row[component])


def mismatches(row: Row, installed: Mapping[str, str]) -> list[str]:
    return [c for c in COMPONENTS if c in installed and not fits(row, c, installed[c])]


def nearest(installed: Mapping[str, str]) -> Row:
    """The row that most of the installed components agree with. Of equals the one of the installed vllm-ascend, since
    that release names the others; then the newest."""

    def distance(row: Row) -> tuple[int, bool]:
        wrong = mismatches(row, installed)
        return len(wrong), "vllm-ascend" in wrong

    return min(ROWS, key=distance)


def diagnose(installed: Mapping[str, str]) -> tuple[Row | None, list[Wrong]]:
    """(the row to go by, what differs from it). Row None: nothing installed, or no row knows this PyTorch.

    installed: versions by component, absent ones left out.
    """
    stack = {c: v for c, v in installed.items() if c in COMPONENTS}
    if not set(stack) - {"torch", "vllm"}:
        return None, []  # nothing of Ascend
    if not {"vllm", "vllm-ascend"} & set(stack) and not any(fits(r, "torch", stack.get("torch", "")) for r in ROWS):
        return None, pair(stack)
    row = nearest(stack)
    return row, [Wrong(c, stack[c], row[c], row) for c in mismatches(row, stack)]


def pair(installed: Mapping[str, str]) -> list[Wrong]:
    """PyTorch and its NPU backend must be of one release, whatever else is installed."""
    torch, backend = installed.get("torch"), installed.get("torch-npu")
    if not torch or not backend or release(torch) == release(backend):
        return []
    why = f"torch-npu {backend} is built for torch {release(backend)}"
    return [Wrong("torch-npu", backend, (f"{release(torch)}*",), {}, why)]


def release(version: str) -> str:
    """2.10.0.post4 -> 2.10.0"""
    return ".".join(normal(version).split(".")[:3])


def describe(row: Row) -> str:
    """vllm-ascend 0.18.0, vllm 0.18.0, cann 8.5.1, ..."""
    return ", ".join(f"{component} {' or '.join(versions)}" for component, versions in row.items())
