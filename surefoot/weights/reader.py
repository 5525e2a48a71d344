"""Tensors of a checkpoint read straight into memory by several threads, neighbours on disk by one system call.

A call fills many tensors, up to hundreds of megabytes, and needs the interpreter's lock neither for the copy nor for
the page faults of fresh memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch

from surefoot.core.errors import ModelError
from surefoot.weights.header import TensorInfo

SPAN_BYTES = 1 << 30
MIN_SPAN_BYTES = 4 << 20
MAX_VIEWS = 1024  # IOV_MAX of Linux and macOS


@dataclass
class Span:
    """Bytes from `offset` of a file on, and where they go, piece by piece."""

    path: Path
    offset: int
    views: list[memoryview] = field(default_factory=list)
    nbytes: int = 0

    def takes(self, info: TensorInfo, begin: int) -> bool:
        """Whether byte `begin` of this tensor comes next on disk."""
        follows = self.path == info.file and self.offset + self.nbytes == info.offset + begin
        return follows and len(self.views) < MAX_VIEWS


def spans(targets: Iterable[tuple[TensorInfo, torch.Tensor]], threads: int) -> list[Span]:
    """What fills all targets, in even parts; they are contiguous, on the CPU, in dtype and order as on disk."""
    wanted = [(info, flat_bytes(tensor)) for info, tensor in targets]
    total = sum(info.nbytes for info, _ in wanted)
    calls = threads * -(-total // (threads * SPAN_BYTES)) or 1
    size = max(MIN_SPAN_BYTES, -(-total // calls))
    found: list[Span] = []
    for info, view in wanted:
        begin = 0
        while begin < info.nbytes:
            if not found or found[-1].nbytes >= size or not found[-1].takes(info, begin):
                found.append(Span(info.file, info.offset + begin))
            span = found[-1]
            end = min(info.nbytes, begin + size - span.nbytes)
            span.views.append(view[begin:end])
            span.nbytes += end - begin
            begin = end
    # The largest first, so that none is left over.
    return sorted(found, key=lambda span: -span.nbytes)


def read(span: Span) -> int:
    """Fill a span; returns its bytes."""
    with opened(span.path) as file:
        fill(file, span.offset, span.views)
    return span.nbytes


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file for reading; errors of the system become one line, also those within the block."""
    try:
        with path.open("rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from None


def fill(file: BinaryIO, offset: int, views: list[memoryview]) -> None:
    """The file's bytes from `offset` on into the views, one after the other."""
    views = _after(views, 0)
    while views:
        count = os.preadv(file.fileno(), views, offset)  # may read less than asked for: Linux stops at 2 GiB
        if not count:
            raise ModelError(f"{file.name} became shorter while it was read: is something still writing to it?")
        offset += count
        views = _after(views, count)


def _after(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of the views after `count` bytes, without empty ones at the front."""
    for i, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[i + 1 :]]
        count -= len(view)
    return []


def flat_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
