"""A run folder: what a bring-up has found so far, in files that survive whatever ends it.

    manifest.json       settings and the state of every stage
    STAGE.json          one record per finished stage, written in one step
    *.raw.jsonl, logs/  samples, and what each stage printed
    README.md, report.html, plots/

A stage is finished when its record is there, parses and is not marked partial: the record is the stage's last act, so a
process that dies in between leaves either the whole record or none. Torch-free.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surefoot.core.errors import InputError, SurefootError

FORMAT = "surefoot-run/1"
MANIFEST = "manifest.json"
PENDING, RUNNING, DONE, FAILED, INTERRUPTED = "pending", "running", "done", "failed", "interrupted"


class DiskError(SurefootError):
    """The run folder cannot be written: nothing can go on, and what is there stays."""


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def write_json(path: Path, data: Any) -> None:
    """Replace a file in one step, so that a reader and a full disk see the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(data, file, ensure_ascii=False, indent=1, default=str)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> DiskError:
    reason = (error.strerror or str(error)).lower()
    return DiskError(f"cannot write {path}: {reason}; what was finished is kept, go on with --resume {path.parent}")


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no whole one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


@dataclass
class RunFolder:
    """`manifest`: format, created, settings, stages {name: {state, seconds, outcome, ...}}."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def create(cls, path: Path, settings: dict[str, Any], stages: list[str], facts: dict[str, Any]) -> RunFolder:
        try:
            path.mkdir(parents=True)
            (path / "logs").mkdir()
        except FileExistsError:
            raise InputError(
                f"{path} exists already: continue it with --resume {path}, or name another --runs"
            ) from None
        except OSError as error:
            raise InputError(
                f"cannot make {path}: {(error.strerror or str(error)).lower()}; name another --runs"
            ) from None
        states: dict[str, Any] = {name: {"state": PENDING} for name in stages}
        folder = cls(path, {"format": FORMAT, "created": now(), **facts, "settings": settings, "stages": states})
        folder.save()
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        data = read_json(path / MANIFEST)
        if data is None:
            raise InputError(f"{path} is not a run folder: it has no readable {MANIFEST}")
        if data.get("format") != FORMAT:
            raise InputError(f"{path} has format {data.get('format')}, this version continues {FORMAT}")
        return cls(path, data)

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        return self.manifest["stages"]

    def save(self) -> None:
        write_json(self.path / MANIFEST, self.manifest)

    def update(self, stage: str, **facts: Any) -> None:
        self.stages[stage] = self.stages.get(stage, {}) | facts
        self.save()

    def record(self, stage: str) -> dict[str, Any] | None:
        """The record of a finished stage."""
        data = read_json(self.path / f"{stage}.json")
        return None if data is None or data.get("partial") else data

    def write(self, stage: str, data: dict[str, Any]) -> None:
        write_json(self.path / f"{stage}.json", data)

    def digest(self, stage: str) -> str | None:
        """SHA-256 of a stage's record, by which the stages that read it know whether it is still the same."""
        if self.record(stage) is None:
            return None
        return hashlib.sha256((self.path / f"{stage}.json").read_bytes()).hexdigest()[:16]

    def set_aside(self, stage: str) -> None:
        """Keep what an interrupted stage had measured under another name before it starts again."""
        for path in (self.path / f"{stage}.json", self.path / f"{stage}.raw.jsonl"):
            if path.exists():
                kept = self.path / "interrupted"
                kept.mkdir(exist_ok=True)
                number = sum(1 for p in kept.iterdir() if p.name.endswith(path.name))
                os.replace(path, kept / f"{number + 1}-{path.name}")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time works on a folder; the system lets go of the lock when the process dies."""
        with open(self.path / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"another process is working on {self.path}: wait for it, or stop it") from None
            yield
