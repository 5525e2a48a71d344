"""Numbers as people read them: three significant digits, a unit that fits, thousands apart. Torch-free.

`show(value, unit)` is a pure function of the record's value, so that whoever checks a report can repeat it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

UNKNOWN = "–"


def significant(x: float, digits: int = 3) -> str:
    """1234.6 -> "1,235", 12.345 -> "12.3", 0.001234 -> "0.00123"; below 1e-4 and from 1e9 in powers of ten."""
    if x == 0:
        return "0"
    size = math.floor(math.log10(abs(x)))
    if size < -4 or size >= 9:
        return f"{x:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e+")
    return f"{x:,.{max(0, digits - 1 - size)}f}"


def _scaled(x: float, steps: tuple[tuple[float, str], ...]) -> str:
    """The first step that the number reaches, else the last."""
    factor, unit = next((s for s in steps if abs(x) >= s[0]), steps[-1])
    return f"{significant(x / factor)} {unit}"


SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
BYTES = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B"))
RATE = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))


def _rate(x: float, unit: str) -> str:
    return _scaled(x, tuple((f, p + unit) for f, p in RATE))


UNITS: dict[str, Callable[[float], str]] = {
    "": significant,
    "int": lambda x: f"{x:,.0f}",
    "s": lambda x: _scaled(x, SECONDS) if x else "0 s",
    "ms": lambda x: f"{significant(x * 1e3)} ms",
    "sec": lambda x: f"{x:.1f} s",
    "bytes": lambda x: _scaled(x, BYTES),
    "tok/s": lambda x: f"{significant(x)} tok/s",
    "/s": lambda x: f"{significant(x)} /s",
    "B/s": lambda x: _rate(x, "B/s"),
    "FLOP/s": lambda x: _rate(x, "FLOP/s"),
    "FLOP": lambda x: _rate(x, "FLOP"),
    "count": lambda x: _rate(x, "").strip(),
    "%": lambda x: f"{significant(100 * x)} %" if abs(x) < 0.9995 else f"{100 * x:.1f} %",
    "+%": lambda x: f"{100 * x:+.0f} %",
    "J": lambda x: f"{significant(x)} J",
    "W": lambda x: f"{significant(x)} W",
    "nats": lambda x: f"{significant(x)} nats",
    "x": lambda x: f"{significant(x)}×",
}


def show(value: Any, unit: str = "") -> str:
    """Text of a record's value. Text, truth values and what is not known need no unit."""
    if value is None:
        return UNKNOWN
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:,}" if not unit and isinstance(value, int) else UNITS[unit](value)
