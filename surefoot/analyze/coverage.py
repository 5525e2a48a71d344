"""Does a model run on a device? The operators that a trace found, their status, what fallbacks cost, and one line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from surefoot.analyze.registry import Registry, Status

if TYPE_CHECKING:
    from surefoot.analyze.trace import OpUse, Tracer

PHASES = ("prefill", "decode")
ORDER = [
    Status.UNSUPPORTED,
    Status.UNKNOWN,
    Status.FALLBACK,
    Status.FUSED,
    Status.NATIVE,
    Status.COMPOSITE,
]
# What a device library does to a dtype without saying so.
SILENT_CASTS = {"float64": "float64 becomes float32 on an NPU", "complex128": "complex128 is not computed on an NPU"}


@dataclass(frozen=True)
class Row:
    """One operator of one phase. calls: per forward pass, on average; bytes: to the host and back per pass if it falls
    back, else None."""

    phase: str
    operator: str
    dtypes: str
    shapes: str
    calls: float
    status: Status
    bytes: float | None
    part_of: str = ""
    note: str = ""


@dataclass
class Coverage:
    """The answer for one model."""

    model: str
    through: str
    registry: str
    rows: list[Row] = field(default_factory=list)
    incomplete: str | None = None

    def count(self, status: Status, phase: str | None = None) -> int:
        return len({r.operator for r in self.rows if r.status is status and phase in (None, r.phase)})

    def operators(self, status: Status) -> list[str]:
        return sorted({r.operator for r in self.rows if r.status is status})

    def moved(self, phase: str) -> float:
        """Bytes that the fallbacks of one forward pass move to the host and back."""
        return sum(r.bytes or 0 for r in self.rows if r.phase == phase)

    @property
    def runs(self) -> bool | None:
        """True: all operators are known to run (falling back or not); False: one is missing; None: cannot be told."""
        if self.count(Status.UNSUPPORTED):
            return False
        return None if self.incomplete or self.count(Status.UNKNOWN) or not self.rows else True

    @property
    def verdict(self) -> str:
        """One line: runs / runs with fallbacks / will not run because / cannot be told because."""
        missing, unknown = self.operators(Status.UNSUPPORTED), self.operators(Status.UNKNOWN)
        if missing:
            return f"will not run because torch-npu {self.registry} has nothing for {_some(missing)}"
        if self.incomplete:
            return f"cannot be told: {self.incomplete}"
        if unknown:
            return f"cannot be told: nothing is known about {_some(unknown)}"
        if not self.rows:
            return "cannot be told: the trace saw no operator"
        if fallen := self.operators(Status.FALLBACK):
            cost = " and ".join(f"{_bytes(self.moved(p))} a {p} pass" for p in PHASES if self.moved(p))
            return f"runs with {len(fallen)} CPU fallback{'s'[: len(fallen) > 1]} ({_some(fallen)}), moving {cost}"
        total = len({r.operator for r in self.rows})
        return f"runs: all {total} operators have a kernel in torch-npu {self.registry} or are made of such"

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "through": self.through,
            "torch-npu": self.registry,
            "verdict": self.verdict,
            "runs": self.runs,
            "incomplete": self.incomplete,
            "operators": {str(s): {p: self.count(s, p) for p in PHASES} for s in ORDER},
            "fallback_bytes_per_pass": {p: self.moved(p) for p in PHASES},
            "rows": [vars(r) | {"status": str(r.status)} for r in self.rows],
        }


def cover(
    model: str, through: str, registry: Registry, tracers: Iterable[Tracer], incomplete: str | None = None
) -> Coverage:
    """Judge what the tracers of prefill and decode have found."""
    result = Coverage(model, through, registry.version, incomplete=incomplete)
    for phase, tracer in zip(PHASES, tracers):
        result.rows += [_row(phase, use, max(1, tracer.passes)) for use in tracer.uses]
    result.rows.sort(key=lambda r: (PHASES.index(r.phase), ORDER.index(r.status), r.operator, r.dtypes))
    return result


def _row(phase: str, use: OpUse, passes: int) -> Row:
    from surefoot.analyze.trace import READS_VALUES

    notes = [SILENT_CASTS[d] for d in dict.fromkeys(use.dtypes) if d in SILENT_CASTS]
    if use.name in READS_VALUES:
        notes.append(READS_VALUES[use.name])
    return Row(
        phase=phase,
        operator=use.name,
        dtypes=", ".join(use.dtypes),
        shapes=" ".join(_shape(s) for s in use.shapes),
        calls=round(use.calls / passes, 2),
        status=use.status,
        bytes=use.nbytes / passes if use.status is Status.FALLBACK else None,
        part_of=", ".join(sorted(use.parts_of)),
        note="; ".join(notes),
    )


def _shape(dims: list[tuple[int, int]]) -> str:
    return "[" + ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in dims) + "]"


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _bytes(n: float) -> str:
    for unit in ("B", "KB", "MB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} GB"
