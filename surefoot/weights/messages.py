"""Helpers for error messages that stay one line whatever goes into them."""

from __future__ import annotations

from collections.abc import Sequence


def one_line(text: object, limit: int = 300) -> str:
    """Fold white space (also line breaks) into single spaces and cut at `limit` characters."""
    folded = " ".join(str(text).split())
    return folded if len(folded) <= limit else folded[: limit - 1] + "…"


def some(items: Sequence[str], limit: int = 5) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(one_line(item, 150) for item in items[:limit]) + more
