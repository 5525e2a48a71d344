"""Tensors that stay in their file: mapped, private to this process, read by the page when rows of them are wanted.

For an embedding on a CPU: a step looks up a few rows of what can be a third of a small model. Mapped it needs neither
time to load nor memory of its own, as the system keeps its pages for all processes and may drop them.

NOTE: what is written into the file later would show in results, and a page cut off it would kill the process. Files are
normally replaced by renaming (downloads, Surefoot's own writer), which leaves a mapping as it was. For the rest the
engine asks `MappedFiles.check` before each step, which refuses to go on with a file that has changed.
"""

from __future__ import annotations

import mmap
import os
import sys
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import torch

from surefoot.core.errors import ModelError
from surefoot.weights.header import TensorInfo

MIN_BYTES = 16 << 20  # less is soon read


@dataclass
class MappedFiles:
    """The files that a model's tensors still lie in, with what they looked like when they were mapped."""

    files: list[tuple[int, os.stat_result, Path]] = field(default_factory=list)

    def takes(self, info: TensorInfo) -> bool:
        return sys.platform == "linux" and info.nbytes >= MIN_BYTES and info.offset % info.dtype.itemsize == 0

    def map(self, info: TensorInfo) -> torch.Tensor:
        """The tensor as it lies in its file. Writing to it makes private copies of the pages that are written."""
        begin = info.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        try:
            file = os.open(info.file, os.O_RDONLY)
            weakref.finalize(self, os.close, file)
            seen = os.fstat(file)
            if seen.st_size < info.offset + info.nbytes:
                raise ModelError(f"{info.file} became shorter while it was read: is something still writing to it?")
            pages = mmap.mmap(file, info.offset - begin + info.nbytes, access=mmap.ACCESS_COPY, offset=begin)
        except OSError as error:
            raise ModelError(f"cannot read {info.file}: {error.strerror or error}") from None
        pages.madvise(mmap.MADV_WILLNEED)  # from a disk: begin to read now
        self.files.append((file, seen, info.file))
        count = info.nbytes // info.dtype.itemsize
        return torch.frombuffer(pages, dtype=info.dtype, count=count, offset=info.offset - begin).view(info.shape)

    def check(self) -> None:
        """ModelError if a file changed in place; a microsecond each."""
        for file, seen, path in self.files:
            now = os.fstat(file)
            if (now.st_size, now.st_mtime_ns) != (seen.st_size, seen.st_mtime_ns):
                raise ModelError(f"{path} was changed while the model is in use: load the model again")
