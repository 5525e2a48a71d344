"""What an audit reports, and the allowances that it makes for a page. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from surefoot.analyze.claims import Claims

ROUNDING = 1.10  # published numbers are rounded, and come from different runs
SHORTEST_ANSWER = 16  # tokens: where a page says nothing, no answer is taken to be longer
ABOVE_LIMIT = 1.02  # a physical limit is a limit, but its published value is rounded too


@dataclass(frozen=True)
class Finding:
    """check: its name.  where: rows.  statement: the two numbers.  arithmetic: one line that anyone can repeat."""

    severity: str
    check: str
    where: tuple[str, ...]
    statement: str
    arithmetic: str

    def line(self) -> str:
        return f"{self.severity}: {self.statement} [{self.arithmetic}]"


Check = Callable[[Claims], Iterator[Finding]]


def impossible(check: str, where: str | tuple[str, ...], statement: str, arithmetic: str) -> Finding:
    return Finding("impossible", check, (where,) if isinstance(where, str) else where, statement, arithmetic)


def suspicious(check: str, where: str | tuple[str, ...], statement: str, arithmetic: str) -> Finding:
    return Finding("suspicious", check, (where,) if isinstance(where, str) else where, statement, arithmetic)


def missing(check: str, where: str, statement: str, arithmetic: str = "-") -> Finding:
    return Finding("missing", check, (where,), statement, arithmetic)
