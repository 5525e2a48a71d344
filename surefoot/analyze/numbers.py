"""Numbers for people: 1.2T, 6.2 ms. Torch-free."""

from __future__ import annotations

UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


def amount(value: float | None, unit: str = "") -> str:
    """1.2e12, "B/s" -> '1.2 TB/s'; 1290.3 -> '1,290'; 12288, "B" -> '12,288 B'; None -> 'unknown'."""
    if value is None:
        return "unknown"
    for size, letter in UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}{unit}"
    return f"{value:,.0f} {unit}".strip() if abs(value) >= 1000 else f"{value:.4g} {unit}".strip()


def seconds(value: float | None) -> str:
    """0.0062 -> '6.2 ms', 3.785 -> '3.785 s', None -> 'unknown'."""
    if value is None:
        return "unknown"
    if value >= 1:
        return f"{value:.4g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"
