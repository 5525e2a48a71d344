"""Works off the stages, each in a process of its own, and keeps the run folder true at every moment.

    run = Run(folder, watcher);  run.go()       # again with the same folder: goes on where it ended

A stage that fails is noted and the others go on. A finished stage is not run again unless a record that it reads has
changed. Torch-free.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from surefoot.bringup.folder import (
    DONE,
    FAILED,
    INTERRUPTED,
    MANIFEST,
    RUNNING,
    DiskError,
    RunFolder,
    cannot_write,
    now,
)
from surefoot.bringup.settings import BringupSettings
from surefoot.bringup.stages.base import BAD, Stage

KILL_AFTER = 5.0


class Watcher(Protocol):
    """Who shows the run to people. `left`: seconds until all is done, as far as can be told."""

    def begin(self, stage: str, number: int, total: int) -> None: ...

    def progress(self, what: str, fraction: float | None, left: float) -> None: ...

    def end(self, stage: str, state: str, level: str, text: str, seconds: float, reused: bool) -> None: ...


@dataclass
class Clock:
    """Time left, from what finished stages took against what they take with a canary."""

    stages: Sequence[Stage]
    spent: dict[str, float] = field(default_factory=dict)

    def left(self, current: str, elapsed: float, fraction: float | None) -> float:
        usual = {s.name: s.seconds for s in self.stages}
        done = [n for n in self.spent if n in usual]
        ratio = sum(self.spent[n] for n in done) / sum(usual[n] for n in done) if done else 1.0
        names = list(usual)
        later = sum(usual[n] for n in names[names.index(current) + 1 :]) * ratio
        here = usual[current] * ratio
        if fraction and fraction > 0.05:
            here = 0.5 * here + 0.5 * elapsed / fraction
        return later + max(here - elapsed, 0.1 * here)


class Failed(Exception):
    """The stage's process ended without its record. kind: input, bug, crash or disk."""

    def __init__(self, text: str, kind: str):
        super().__init__(text)
        self.kind = kind


class Run:
    """One run of a folder's stages. `program`: the module of a stage's process, with `stages` for tests."""

    def __init__(
        self, folder: RunFolder, watcher: Watcher, stages: Sequence[Stage], program: str = "surefoot.bringup.child"
    ):
        self.folder, self.watcher, self.stages, self.program = folder, watcher, tuple(stages), program
        self.settings = BringupSettings.from_dict(folder.manifest["settings"])
        self.clock = Clock(self.stages)

    def go(self) -> bool:
        """Run what is not finished; True if every stage is done and none found anything bad."""
        good = True
        try:
            with self.folder.locked():
                for number, stage in enumerate(self.stages, 1):
                    self.watcher.begin(stage.name, number, len(self.stages))
                    good &= self.finished(stage) or self.perform(stage)
        except OSError as error:
            raise cannot_write(self.folder.path / MANIFEST, error) from error
        return good

    # ---- one stage

    def inputs(self, stage: Stage) -> dict[str, str | None]:
        return {name: self.folder.digest(name) for name in stage.needs}

    def finished(self, stage: Stage) -> bool:
        """Whether the stage's record is there and was made from the records as they are; says so."""
        entry = self.folder.stages.get(stage.name, {})
        record = self.folder.record(stage.name)
        if record is None or entry.get("inputs") != self.inputs(stage):
            return False
        if entry.get("state") != DONE:  # it died after its last act and before this was noted
            level, text = stage.outcome(record)
            self.folder.update(stage.name, state=DONE, level=level, text=text, error=None)
        entry = self.folder.stages[stage.name]
        seconds = entry.get("seconds") or 0.0
        self.clock.spent[stage.name] = seconds
        self.watcher.end(stage.name, DONE, entry["level"], entry["text"], seconds, True)
        return entry["level"] != BAD

    def perform(self, stage: Stage) -> bool:
        began = time.monotonic()
        runs = self.folder.stages.get(stage.name, {}).get("runs", 0) + 1
        self.folder.set_aside(stage.name)
        self.folder.stages[stage.name] = {
            "state": RUNNING,
            "runs": runs,
            "began": now(),
            "inputs": self.inputs(stage),
            "command": shlex.join(stage.command(self.settings)),
        }
        self.folder.save()
        try:
            self.child(stage, began)
            record = self.folder.record(stage.name)
            if record is None:
                raise Failed("it ended without a record", "bug")
        except KeyboardInterrupt:
            self.folder.update(stage.name, state=INTERRUPTED, seconds=time.monotonic() - began)
            raise
        except Failed as error:
            return self._failed(stage, error, time.monotonic() - began)
        seconds = time.monotonic() - began
        level, text = stage.outcome(record)
        self.folder.update(stage.name, state=DONE, seconds=seconds, level=level, text=text)
        self.clock.spent[stage.name] = seconds
        self.watcher.end(stage.name, DONE, level, text, seconds, False)
        return level != BAD

    def _failed(self, stage: Stage, error: Failed, seconds: float) -> bool:
        text = str(error)
        if error.kind == "bug":
            text = f"{text} (see logs/{stage.name}.log)"
        self.folder.update(stage.name, state=FAILED, seconds=seconds, level=BAD, text=text, kind=error.kind)
        self.watcher.end(stage.name, FAILED, BAD, text, seconds, False)
        if error.kind == "disk":
            raise DiskError(text)
        return False

    # ---- its process

    def child(self, stage: Stage, began: float) -> None:
        """Run the stage in a child process and pass its progress on."""
        command = [sys.executable, "-m", self.program, str(self.folder.path), stage.name]
        with contextlib.ExitStack() as stack:
            path = self.folder.path / "logs" / f"{stage.name}.log"
            try:
                log = stack.enter_context(open(path, "a", encoding="utf-8"))
            except OSError as error:
                raise cannot_write(path, error) from None
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C reaches this process only, which then ends the child
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
            try:
                said = self._listen(process, stage, began)
            except BaseException:
                end(process)
                raise
            code = process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        if "error" in said:
            raise Failed(str(said["error"]), str(said.get("kind", "bug")))
        if "done" not in said:
            raise Failed(died(code), "crash")

    def _listen(self, process: subprocess.Popen[str], stage: Stage, began: float) -> dict:
        last: dict = {}
        assert process.stdout is not None
        for line in process.stdout:
            try:
                last = json.loads(line)
            except ValueError:
                continue
            if "what" in last:
                fraction = last.get("fraction")
                left = self.clock.left(stage.name, time.monotonic() - began, fraction)
                self.watcher.progress(str(last["what"]), fraction, left)
        return last


def end(process: subprocess.Popen[str]) -> None:
    """End a child that is not needed any more; it ends what it has started when its stdin closes."""
    if process.stdin is not None:
        process.stdin.close()
    process.terminate()
    try:
        process.wait(KILL_AFTER)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def died(code: int) -> str:
    """What an exit code without a last word means."""
    if code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else str(-code)
    why = {"SIGKILL": ": the system takes that way when memory runs out", "SIGSEGV": ": a library crashed"}.get(
        name, ""
    )
    return f"its process was ended by {name}{why}"
