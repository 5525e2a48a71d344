"""What loading an engine left for later, so that its first token comes soon: weights still to be moved into memory of
their own, graphs still to be captured. Each step but the first does a piece of it, and so does an idle server.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

Progress = Callable[[str, float | None], None]
Postponable = tuple[str, Callable[[], object]]  # what it is called, and the work


class Postponed:
    """Pieces of work in their order, with what each is called; true while some are left. One thread owns it."""

    def __init__(self, pieces: Iterable[Postponable] = ()) -> None:
        self._pieces = deque(pieces)
        self._total = len(self._pieces)

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def advance(self) -> None:
        """Do the next piece. One that fails stays, and is done anew the next time."""
        if self._pieces:
            self._pieces[0][1]()
            self._pieces.popleft()

    def finish(self, progress: Progress | None = None) -> None:
        while self._pieces:
            if progress is not None:
                progress(self._pieces[0][0], 1 - len(self._pieces) / self._total)
            self.advance()
