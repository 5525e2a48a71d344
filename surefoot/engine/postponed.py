"""What loading an engine left for later, so that its first token comes soon: weights still to be moved into memory of
their own. Each step but the first does a piece of it, and so does whoever has to wait.
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from surefoot.core.errors import first_line

Progress = Callable[[str, float | None], None]


class Postponed:
    """Named pieces of work in their order; true while some are left. `seconds`: spent on them so far.

    Whoever may call the engine may call this, and nobody else meanwhile.
    """

    def __init__(self, pieces: Iterable[tuple[str, Callable[[], object]]] = ()) -> None:
        self._pieces = deque(pieces)
        self._total = len(self._pieces)
        self.seconds = 0.0

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def advance(self) -> None:
        """Do the next piece. If it fails (out of memory), the rest stays as it is, with a warning."""
        if not self._pieces:
            return
        what, work = self._pieces[0]
        began = time.perf_counter()
        try:
            work()
            self._pieces.popleft()
        except Exception as error:
            self._pieces.clear()
            warnings.warn(f"{what} was given up ({first_line(error)}): steps will take longer", stacklevel=2)
        self.seconds += time.perf_counter() - began

    def finish(self, progress: Progress | None = None) -> None:
        while self._pieces:
            if progress is not None:
                progress(self._pieces[0][0], 1 - len(self._pieces) / self._total)
            self.advance()

    @contextlib.contextmanager
    def meanwhile(self) -> Iterator[None]:
        """Go on while the block waits for something, such as a user who types; ends at most a piece after the block."""
        if not self._pieces:
            yield
            return
        over = threading.Event()

        def work() -> None:
            while self._pieces and not over.is_set():
                self.advance()

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            yield
        finally:
            over.set()
            worker.join()
