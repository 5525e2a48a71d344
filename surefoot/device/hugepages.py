"""Memory for weights in pages of 2 MiB, where the system gives them on request (Linux, `madvise`).

A CPU that decodes reads every weight once a token; with pages of 4 KiB the address translation limits it before the
memory does (measured: 42 instead of up to 69 GB/s). It is advice: without such pages nothing changes.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
from collections.abc import Callable, Sequence

import torch

PAGE = 2 << 20
MADV_HUGEPAGE = 14  # linux/mman.h


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None = None) -> torch.Tensor:
    """torch.empty; on a CPU what is as large as such a page begins at one, and they are asked for before it is touched.

    Up to a page more than needed is reserved for that. It is never touched, so it takes no memory.
    """
    where = torch.get_default_device() if device is None else torch.device(device)
    nbytes = math.prod(shape) * dtype.itemsize
    if where.type != "cpu" or nbytes < PAGE or (madvise := _madvise()) is None:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    reserved = torch.empty(nbytes + PAGE, dtype=torch.uint8, device=where)
    begin = -reserved.data_ptr() % PAGE
    madvise(reserved.data_ptr() + begin, nbytes // PAGE * PAGE, MADV_HUGEPAGE)
    return reserved[begin : begin + nbytes].view(dtype).view(tuple(shape))


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        call = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return call
