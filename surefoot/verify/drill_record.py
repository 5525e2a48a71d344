"""Outcomes of a drill, kept as they come, so that a drill that was stopped goes on where it was.

    record = Record(Path("drill.jsonl"))
    outcome = record.get(key) or record.put(key, compute())

One JSON line per outcome after a first line that names the code. Outcomes of other code are dropped.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import surefoot


class Record:
    """Values by key in a file; in memory only without a path."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.values: dict[str, Any] = {}
        if path is None:
            return
        code = {"code": code_digest()}
        lines = _whole_lines(path)
        if lines[:1] == [code]:
            self.values = {line["key"]: line["value"] for line in lines[1:]}
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [code, *({"key": key, "value": value} for key, value in self.values.items())]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def get(self, key: str) -> Any | None:
        return self.values.get(key)

    def put(self, key: str, value: Any) -> Any:
        self.values[key] = value
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "value": value}) + "\n")
        return value


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The last line may be half written."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(True) if line.endswith("\n")]


def code_digest() -> str:
    """Of every source file of the package, kernels included."""
    digest = hashlib.sha256()
    root = Path(surefoot.__file__).parent
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".h", ".cpp"):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
