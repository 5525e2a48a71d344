"""Print a `Coverage`: a table for the terminal, or Markdown for an issue or a report."""

from __future__ import annotations

from surefoot.analyze.coverage import ORDER, PHASES, Coverage, Row, _bytes
from surefoot.analyze.registry import Status

CAVEAT = (
    "A kernel that exists may still refuse a dtype or a shape, and tells nothing of precision or speed; "
    "`surefoot selftest --device npu:0` on the device does."
)
BAD = (Status.UNSUPPORTED, Status.UNKNOWN, Status.FALLBACK)


def table(coverage: Coverage, everything: bool = True) -> str:
    """Aligned columns; without `everything` only what is not native."""
    lines = [*_head(coverage), ""]
    for phase in PHASES:
        rows = [r for r in coverage.rows if r.phase == phase and (everything or r.status in BAD)]
        if rows:
            lines += [f"{phase}", *_aligned([_cells(r) for r in rows]), ""]
    lines += [*_summary(coverage), "", CAVEAT, f"{coverage.model}: {coverage.verdict}"]
    return "\n".join(lines)


def markdown(coverage: Coverage) -> str:
    """One table per phase, the verdict first."""
    lines = [f"**{coverage.model}: {coverage.verdict}**", "", *[f"{line}  " for line in _head(coverage)], ""]
    for phase in PHASES:
        rows = [r for r in coverage.rows if r.phase == phase]
        if not rows:
            continue
        lines += [
            f"### {phase}",
            "",
            "| status | operator | dtypes | shapes | calls | note |",
            "|---|---|---|---|--:|---|",
        ]
        lines += ["| " + " | ".join(c.replace("|", "\\|") for c in _cells(r)) + " |" for r in rows]
        lines.append("")
    return "\n".join([*lines, CAVEAT])


def _head(coverage: Coverage) -> list[str]:
    return [f"traced through {coverage.through}, against torch-npu {coverage.registry}"]


def _summary(coverage: Coverage) -> list[str]:
    counts = [[str(s), *[str(coverage.count(s, p)) for p in PHASES]] for s in ORDER if coverage.count(s)]
    return _aligned([["operators", *PHASES], *counts])


def _cells(row: Row) -> list[str]:
    note = row.note
    if row.bytes is not None:
        note = "; ".join([f"{_bytes(row.bytes)} to the host and back", *([note] if note else [])])
    elif row.part_of:
        note = "; ".join([*([note] if note else []), f"in {row.part_of}"])
    return [str(row.status), row.operator, row.dtypes, row.shapes, f"{row.calls:g}", note]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [min(60, max(len(r[i]) for r in rows)) for i in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(r, widths)).rstrip() for r in rows]
