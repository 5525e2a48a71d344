"""Write a safetensors file piece by piece: shapes first, then data in any order, never a whole tensor in memory.

with SafetensorsWriter(path, {"a.weight": Entry(torch.int8, (64, 32))}) as file:
    file.write("a.weight", 0, rows)          # consecutive elements from that index on
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from surefoot.core.errors import ModelError
from surefoot.weights.header import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 64  # of the data: a mapped tensor then suits vector loads


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """All tensors must be written in full before the file is closed. Threads may write at the same time."""

    def __init__(self, path: Path, entries: Mapping[str, Entry]):
        self.path, self.entries, self._lock = path, entries, threading.Lock()
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, int] = {}
        end = 0
        # The widest types first, so that every tensor lies at a multiple of its element size.
        for name, entry in sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize):
            self._offsets[name], begin, end = end, end, end + entry.nbytes
            header[name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        self._start, self._left = 8 + len(text), end
        try:
            self._file = path.open("xb", buffering=0)
            self._put(0, len(text).to_bytes(8, "little") + text)
        except OSError as error:
            raise _cannot_write(path, error) from None

    def write(self, name: str, first: int, piece: torch.Tensor) -> None:
        """Write `piece` (any shape, CPU) as the elements from index `first` on."""
        entry = self.entries[name]
        if piece.dtype != entry.dtype:
            raise ValueError(f"{name} is declared {entry.dtype}, not {piece.dtype}")
        flat = piece.detach().contiguous().view(-1)
        try:
            self._put(self._start + self._offsets[name] + first * entry.dtype.itemsize, _bytes(flat))
        except OSError as error:
            raise _cannot_write(self.path, error) from None
        with self._lock:
            self._left -= flat.nbytes

    def _put(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[count:], offset + count

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                assert self._left == 0, f"{self.path}: {self._left} bytes were never written"
                os.fsync(self._file.fileno())
        except OSError as failure:
            raise _cannot_write(self.path, failure) from None
        finally:
            self._file.close()


def _bytes(flat: torch.Tensor) -> memoryview:
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _cannot_write(path: Path, error: OSError) -> ModelError:
    return ModelError(f"cannot write {path}: {error.strerror or error}")
