"""Memory for weights in pages of 2 MiB, where the system gives them on request (Linux, `madvise`).

A CPU that decodes reads every weight once a token; with pages of 4 KiB the address translation limits it before the
memory does (measured: 42 instead of up to 69 GB/s). It is advice: without such pages nothing changes.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence

import torch

PAGE = 2 << 20
MIN_BYTES = 2 * PAGE
MADV_HUGEPAGE = 14  # linux/mman.h


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None = None) -> torch.Tensor:
    """torch.empty; for what lies inside a large tensor on a CPU, huge pages are asked for before it is touched."""
    tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
    if tensor.device.type == "cpu" and tensor.nbytes >= MIN_BYTES and (madvise := _madvise()) is not None:
        begin = -(-tensor.data_ptr() // PAGE) * PAGE
        end = (tensor.data_ptr() + tensor.nbytes) // PAGE * PAGE
        madvise(begin, end - begin, MADV_HUGEPAGE)
    return tensor


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
