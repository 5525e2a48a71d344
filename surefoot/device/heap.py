"""Freed memory kept for the next step instead of given back to the system (Linux with glibc, `mallopt`).

glibc maps large blocks one by one and unmaps them when they are freed, or trims them off the end of its heap. So every
result of a prefill would lie in pages that the system has to clear and map again at their first touch (measured: a
quarter of the time of 512 tokens). Kept, they stay mapped: the process then holds what its largest step so far needed.

NOTE: this holds for the whole process, for whoever allocates in it. While an engine is loaded it is undone, so that
what a load frees on its way goes back to the system.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Iterator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
USUAL = 128 << 10  # glibc's own value of both
KEPT_AT_THE_END, KEPT_BLOCK = 1 << 30, 256 << 20
KEPT_BLOCK_BEFORE_2_35 = 32 << 20  # older ones refuse more


@contextlib.contextmanager
def kept_afterwards() -> Iterator[None]:
    """Within the block memory is handled as usual, after it freed blocks are kept. Without glibc nothing changes."""
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(M_TRIM_THRESHOLD, USUAL)
    libc.mallopt(M_MMAP_THRESHOLD, USUAL)
    libc.malloc_trim(0)
    try:
        yield
    finally:
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_AT_THE_END)
        if not libc.mallopt(M_MMAP_THRESHOLD, KEPT_BLOCK):
            libc.mallopt(M_MMAP_THRESHOLD, KEPT_BLOCK_BEFORE_2_35)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library if it is glibc: others have no mallopt, or one that means something else."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
