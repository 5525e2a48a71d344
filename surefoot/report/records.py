"""The records of a run folder, read in a way that never forgets where a value stands.

    bench = Records(folder)["bench"]
    step = bench["points"][0]["decode"]["step_s"]["median"]
    step.pointer                            # no: an `At` has items only, so that no key of a record can be hidden
    place(step), value(step)                # "bench.json#/points/0/decode/step_s/median", 0.00107

What is not there is an `At` too, empty and false, and prints as "not known". Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class At:
    """A value of a record and its place: file and JSON pointer (RFC 6901)."""

    __slots__ = ("_file", "_path", "_value")

    def __init__(self, file: str, path: tuple[str, ...], value: Any):
        self._file, self._path, self._value = file, path, value

    def __getitem__(self, key: str | int) -> At:
        try:
            found = self._value[key]
        except (KeyError, IndexError, TypeError):
            found = None
        return At(self._file, (*self._path, str(key)), found)

    def __iter__(self) -> Iterator[At]:
        """The items of a list, the values of an object."""
        keys = self._value if isinstance(self._value, dict) else range(len(self))
        return (self[key] for key in keys)

    def __len__(self) -> int:
        return len(self._value) if isinstance(self._value, (list, dict)) else 0

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return self._value == (other._value if isinstance(other, At) else other)

    def __hash__(self) -> int:
        return hash((self._file, self._path))

    def __repr__(self) -> str:
        return f"At({place(self)} = {str(self._value)[:60]})"


def value(at: At) -> Any:
    return at._value


def known(at: At) -> bool:
    return at._value is not None


def place(at: At) -> str:
    path = "".join("/" + p.replace("~", "~0").replace("/", "~1") for p in at._path)
    return f"{at._file}#{path}"


def pairs(at: At) -> list[tuple[str, At]]:
    """Keys and values of an object."""
    return [(k, at[k]) for k in at._value] if isinstance(at._value, dict) else []


def find(at: At, **wanted: Any) -> At:
    """The first item of a list whose keys have these values, or an empty one."""
    for item in at:
        if all(item[k] == v for k, v in wanted.items()):
            return item
    return At(at._file, (*at._path, "-"), None)


def look_up(folder: Path, where: str) -> Any:
    """The value at a place, read from the disk afresh. KeyError, IndexError or OSError where there is none."""
    file, _, pointer = where.partition("#")
    found = json.loads((folder / file).read_text(encoding="utf-8"))
    for part in pointer.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        found = found[int(part)] if isinstance(found, list) else found[part]
    return found


class Records:
    """The records of a folder by stage; a stage without one gives an empty `At`. `partial` ones count as absent."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._read: dict[str, At] = {}

    def __getitem__(self, name: str) -> At:
        if name not in self._read:
            path, data = self.folder / f"{name}.json", None
            if path.is_file():
                data = json.loads(path.read_text(encoding="utf-8"))
                data = None if data.get("partial") else data
            self._read[name] = At(path.name, (), data)
        return self._read[name]
