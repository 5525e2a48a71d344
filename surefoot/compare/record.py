"""What a comparison leaves on the disk: OUT.json with the numbers, OUT.answers.jsonl with every answer as it came,
OUT.scores.csv to score by hand, OUT.png and OUT.svg. The record says `"partial": true` until all is done.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from surefoot.bench.result import command_line, host, plain
from surefoot.core.errors import InputError

FORMAT = "surefoot-compare/1"


def new_record(settings: Mapping[str, Any], prompts: list[Any], rubric: Mapping[str, str]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "partial": True,
        "command": command_line(),
        "host": host(),
        "settings": dict(settings),
        "prompts": [vars(p) for p in prompts],
        "rubric": dict(rubric),
        "sides": {},
        "scores": [],
        "judge": None,
        "cautions": [],
    }


class Files:
    """The places, and how they are written."""

    def __init__(self, output: Path):
        if output.suffix != ".json" or output.is_dir() or not output.parent.is_dir():
            raise InputError(f"cannot write {output}: give a .json file in a folder that exists")
        self.record = output
        self.answers = output.with_suffix(".answers.jsonl")
        self.scores = output.with_suffix(".scores.csv")
        self.png, self.svg = output.with_suffix(".png"), output.with_suffix(".svg")

    def log(self, index: int) -> Path:
        """Where a side's process writes what its libraries say."""
        return self.record.with_suffix(f".side{index + 1}.log")

    def save(self, record: Mapping[str, Any]) -> None:
        text = json.dumps(plain(record), ensure_ascii=False, indent=1, allow_nan=False) + "\n"
        self.write(self.record, text)

    def write(self, path: Path, text: str) -> None:
        """In one step, so that a full disk leaves the last good file."""
        temporary = path.with_name(path.name + ".tmp")
        with self.disk(path):
            try:
                temporary.write_text(text, encoding="utf-8")
                os.replace(temporary, path)
            except OSError:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise

    def append(self, answer: Mapping[str, Any]) -> None:
        with self.disk(self.answers), open(self.answers, "a", encoding="utf-8") as file:
            file.write(json.dumps(plain(answer), ensure_ascii=False, allow_nan=False) + "\n")

    @contextlib.contextmanager
    def disk(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"cannot write {path}: {(error.strerror or str(error)).lower()}") from error


def load(path: Path) -> dict[str, Any]:
    """A record from before, to score it or to show it again."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(f"{path} is no record of `surefoot compare`")
    return record
