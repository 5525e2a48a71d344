"""Progress of slow work on stderr: silent for the first two seconds, then a bar on a terminal or one line elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

PATIENCE_S = 2.0


class Progress:
    """Pass the object itself as `progress(what, fraction)`, with fraction in 0..1 or None where unknown."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._due = time.monotonic() + patience_s
        self._bar: Any = None
        self._task: Any = None
        self._said = ""

    def __call__(self, what: str, fraction: float | None = None) -> None:
        if time.monotonic() < self._due:
            return
        if not sys.stderr.isatty():
            if what != self._said:
                print(f"{what} ...", file=sys.stderr, flush=True)
            self._said = what
            return
        if self._bar is None:
            self._start(what)
        self._bar.update(
            self._task, description=what, total=None if fraction is None else 1.0, completed=fraction or 0.0
        )

    def _start(self, what: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(what, total=None)
        self._bar.start()

    def pause(self) -> None:
        """Take the bar away, so that a line can be printed; the next call brings it back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
