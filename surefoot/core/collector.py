"""Python's cyclic garbage collector, set aside while very many objects are made that will stay.

Importing torch and building a model set it off several times; it then goes through all of torch's objects, for a tenth
of a second each time, and finds next to nothing.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """No collection within the block. Objects are still freed with their last reference."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
