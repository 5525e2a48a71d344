"""Four small stages for tests of the runner: `python -m tests.bringup_fakes run DIR`, or DIR STAGE for one.

What a stage does is told by files of the run folder: `hang-STAGE` (tell and wait for ever), `fail-STAGE` (a clear
error), `bug-STAGE`, `crash-STAGE` (die by SIGKILL) and `full-STAGE` (the disk is full). `ran` has a line per start.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from pathlib import Path

from surefoot.bringup.child import leave, main
from surefoot.bringup.folder import RunFolder
from surefoot.bringup.run import Run
from surefoot.bringup.settings import BringupSettings
from surefoot.bringup.stages.base import BAD, GOOD, Stage, Work
from surefoot.core.errors import InputError, SurefootError

NAMES = ("first", "second", "third", "last")


def _stage(name: str, needs: tuple[str, ...]) -> Stage:
    def run(work: Work) -> dict | None:
        with open(work.path / "ran", "a") as file:
            file.write(f"{name} {os.getpid()}\n")
        work.progress("working", 0.5)
        for what in ("hang", "fail", "bug", "crash", "full"):
            if (work.path / f"{what}-{name}").exists():
                _misbehave(what, name, work)
        return {"made_by": name, "from": {n: (work.record(n) or {}).get("made_by") for n in needs}}

    def outcome(record: dict) -> tuple[str, str]:
        return (BAD if record.get("bad") else GOOD), f"made by {record['made_by']}"

    return Stage(name, run, outcome, lambda s: ["surefoot", name, s.model], needs, 0.1)


def _misbehave(what: str, name: str, work: Work) -> None:
    if what == "hang":
        work.folder.write(name, {"partial": True, "points": [1, 2]})
        (work.path / "hanging").touch()
        time.sleep(600)
    if what == "fail":
        raise InputError(f"{name} cannot be done: do something else")
    if what == "bug":
        raise ZeroDivisionError("something unexpected")
    if what == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(errno.ENOSPC, "No space left on device")


STAGES = tuple(_stage(name, NAMES[:i] if name == "last" else ()) for i, name in enumerate(NAMES))


class Quiet:
    """Keeps what a watcher is told."""

    def __init__(self) -> None:
        self.ended: list[tuple[str, str, str, bool]] = []

    def begin(self, stage: str, number: int, total: int) -> None: ...

    def progress(self, what: str, fraction: float | None, left: float) -> None:
        assert left >= 0

    def end(self, stage: str, state: str, level: str, text: str, seconds: float, reused: bool) -> None:
        self.ended.append((stage, state, text, reused))


def new_folder(path: Path) -> RunFolder:
    return RunFolder.create(path, BringupSettings("canary-llama").as_dict(), list(NAMES), {"model_folder": ""})


def run(path: Path) -> tuple[bool, Quiet]:
    watcher = Quiet()
    return Run(RunFolder.open(path), watcher, STAGES, "tests.bringup_fakes").go(), watcher


if __name__ == "__main__":
    if sys.argv[1] == "run":
        try:
            leave(0 if run(Path(sys.argv[2]))[0] else 1)
        except KeyboardInterrupt:
            leave(130)
        except SurefootError as error:
            print(error, file=sys.stderr)
            leave(error.exit_code)
    leave(main(sys.argv[1], sys.argv[2], {stage.name: stage for stage in STAGES}))
