"""Tensors that lie in their file: mapped, private to this process, read by the page when they are wanted.

For an embedding on a CPU: a step looks up a few rows of what can be a third of a small model. Mapped it needs neither
time to load nor memory of its own, as the system keeps its pages for all processes and may drop them. And for weights
that an engine begins with before it moves them into memory of their own (moving.py).

NOTE: what is written into the file later would show in results, and a page cut off it would kill the process. Files are
normally replaced by renaming (downloads, Surefoot's own writer), which leaves a mapping as it was. For the rest the
engine asks `MappedFiles.check` before each step, which refuses to go on with a file that has changed.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from surefoot.core.errors import ModelError
from surefoot.weights.header import TensorInfo

MIN_BYTES = 16 << 20  # an embedding of less is soon read
MAX_GAP = 1 << 20  # between tensors that share a mapping


def can_map(info: TensorInfo) -> bool:
    return sys.platform == "linux" and info.nbytes > 0 and info.offset % info.dtype.itemsize == 0


@dataclass
class MappedFiles:
    """The files that a model's tensors still lie in, open, with what they looked like when they were mapped."""

    files: dict[Path, tuple[int, os.stat_result, Callable[[], object]]] = field(default_factory=dict)
    _for_good: set[Path] = field(default_factory=set)
    _arrival: threading.Thread | None = None

    def map(self, info: TensorInfo) -> torch.Tensor:
        """The tensor as it lies in its file, where it stays. Writing to it makes private copies of the pages."""
        self._for_good.add(info.file)
        return self._view(info, *self._pages([info]))

    def map_all(self, infos: dict[str, TensorInfo]) -> dict[str, torch.Tensor]:
        """Tensors in the order of the disk, neighbours in one mapping, which lasts as long as one of them.

        Their pages are brought in meanwhile, see `wait`.
        """
        tensors: dict[str, torch.Tensor] = {}
        mappings = []
        for run in _runs(infos):
            pages, begin = self._pages([infos[name] for name in run])
            mappings.append(pages)
            tensors |= {name: self._view(infos[name], pages, begin) for name in run}
        if mappings:
            self._arrival = threading.Thread(target=_touch, args=(mappings,), daemon=True)
            self._arrival.start()
        return tensors

    def moved(self) -> None:
        """Nothing of `map_all` is used any more: files that held nothing else may change now."""
        for path in self.files.keys() - self._for_good:
            _, _, close = self.files.pop(path)
            close()

    def wait(self, progress: Callable[[str, float | None], None] | None = None) -> None:
        """Until all pages of `map_all` are there: reading them in the order of the disk is faster than by faults."""
        if self._arrival is not None:
            self._arrival.join(1.0)
            if progress is not None and self._arrival.is_alive():
                progress("reading weights from the disk", None)
            self._arrival.join()
            self._arrival = None

    def _pages(self, infos: list[TensorInfo]) -> tuple[mmap.mmap, int]:
        """A mapping of these tensors of one file, and the offset in the file at which it begins."""
        path, begin = infos[0].file, infos[0].offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        end = infos[-1].offset + infos[-1].nbytes
        try:
            file, seen, _ = self._open(path)
            if seen.st_size < end:
                raise ModelError(f"{path} became shorter while it was read: is something still writing to it?")
            pages = mmap.mmap(file, end - begin, access=mmap.ACCESS_COPY, offset=begin)
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror or error}") from None
        pages.madvise(mmap.MADV_WILLNEED)  # from a disk: begin to read now
        return pages, begin

    def _view(self, info: TensorInfo, pages: mmap.mmap, begin: int) -> torch.Tensor:
        count = info.nbytes // info.dtype.itemsize
        return torch.frombuffer(pages, dtype=info.dtype, count=count, offset=info.offset - begin).view(info.shape)

    def _open(self, path: Path) -> tuple[int, os.stat_result, Callable[[], object]]:
        if path not in self.files:
            file = os.open(path, os.O_RDONLY)
            close = weakref.finalize(self, os.close, file)
            self.files[path] = file, os.fstat(file), close
        return self.files[path]

    def check(self) -> None:
        """ModelError if a file changed in place; a microsecond each."""
        for path, (file, seen, _) in self.files.items():
            now = os.fstat(file)
            if (now.st_size, now.st_mtime_ns) != (seen.st_size, seen.st_mtime_ns):
                raise ModelError(f"{path} was changed while the model is in use: load the model again")


def _runs(infos: dict[str, TensorInfo]) -> list[list[str]]:
    """Names of tensors that lie one after the other in a file, but for small gaps."""
    runs: list[list[str]] = []
    for name, info in infos.items():
        last = infos[runs[-1][-1]] if runs else None
        if last is None or last.file != info.file or info.offset - (last.offset + last.nbytes) > MAX_GAP:
            runs.append([])
        runs[-1].append(name)
    return runs


def _touch(mappings: list[mmap.mmap]) -> None:
    """Have the system bring all pages in, by reading a byte of each. A call takes one mapping, without the
    interpreter's lock, so that it goes on while a tokenizer is read, which keeps the lock."""
    while mappings:
        np.frombuffer(mappings.pop(0), np.uint8)[:: mmap.PAGESIZE].max()
