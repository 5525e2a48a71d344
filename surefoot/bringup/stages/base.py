"""What a stage is given, what it is, and how its record becomes one line. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surefoot.bringup.folder import RunFolder
from surefoot.bringup.settings import BringupSettings

Progress = Callable[[str, "float | None"], None]
Record = dict[str, Any]

GOOD, WARN, BAD = "good", "warn", "bad"


@dataclass
class Work:
    """settings: of the whole run.  folder: where records are read from and the stage's own goes."""

    settings: BringupSettings
    folder: RunFolder
    progress: Progress

    @property
    def path(self) -> Path:
        return self.folder.path

    def record(self, stage: str) -> Record | None:
        return self.folder.record(stage)


@dataclass(frozen=True)
class Stage:
    """One stage.

    run: returns the record, or None where it has written the file itself (progressively, marked partial meanwhile).
    outcome: (good, warn or bad; one line) of a record.  command: repeats the stage by itself.
    needs: records that it reads; if one of them has changed since, the stage runs again.
    seconds: on a quiet CPU with a canary, for the time left only.
    """

    name: str
    run: Callable[[Work], Record | None]
    outcome: Callable[[Record], tuple[str, str]]
    command: Callable[[BringupSettings], list[str]]
    needs: tuple[str, ...] = ()
    seconds: float = 5.0


def plain(data: Any) -> Any:
    """What JSON makes of it, as a reader of the file will see it."""
    return json.loads(json.dumps(data, default=str))
