"""Threads that each run torch's ops alone: for many independent tensors.

On busy cores this is many times faster than splitting each small op over all threads, which wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

import torch

MOST = 16  # a disk or the memory is the limit by then


def count() -> int:
    return min(MOST, torch.get_num_threads())


@contextmanager
def workers() -> Iterator[Executor]:
    """A pool of as many threads as torch would use. If the block fails, what has not begun never does."""
    threads = torch.get_num_threads()
    # NOTE: with OpenMP the setting is the calling thread's own, but threads that are born later inherit it: so restore.
    pool = ThreadPoolExecutor(count(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
