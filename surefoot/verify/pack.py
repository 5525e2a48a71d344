"""Number arrays in a JSON document: rounded to 12 significant bits, byte planes together, deflated, base64.

The gate judges what is stored, so that whoever reads the file judges the same numbers.
"""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np

from surefoot.core.errors import InputError

_DROPPED = 12  # of fp32's 24 significant bits


def pack(values: np.ndarray) -> dict[str, Any]:
    """{"n": count, "f4": text} of a one-dimensional array; integers up to 4096 stay exact."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    finite = np.isfinite(values)
    rounded = (bits + (1 << (_DROPPED - 1))) >> _DROPPED << _DROPPED
    bits = np.where(finite, rounded, bits).astype("<u4")
    planes = bits.view(np.uint8).reshape(-1, 4).T.tobytes()
    return {"n": len(values), "f4": base64.b64encode(zlib.compress(planes, 9)).decode()}


def unpack(packed: Any) -> np.ndarray:
    try:
        count = int(packed["n"])
        planes = np.frombuffer(zlib.decompress(base64.b64decode(packed["f4"], validate=True)), np.uint8)
        return planes.reshape(4, count).T.copy().view("<f4").reshape(-1).astype(np.float64)
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise InputError(f"a list of numbers in the proof cannot be read ({error}): the file is damaged") from None


def pack_rows(rows: dict[str, np.ndarray]) -> dict[str, Any]:
    return {key: pack(value) for key, value in rows.items()}


def unpack_rows(rows: dict[str, Any]) -> dict[str, np.ndarray]:
    return {key: unpack(value) for key, value in rows.items()}


def pack_index(values: np.ndarray) -> list[list[int]]:
    """Run-length form of a non-negative integer array that mostly counts up or stays: [start, step, count] each."""
    runs: list[list[int]] = []
    for value in (int(v) for v in values):
        if runs:
            start, step, count = runs[-1]
            if count == 1 and value - start in (0, 1):
                runs[-1] = [start, value - start, 2]
                continue
            if count > 1 and value == start + step * count:
                runs[-1][2] += 1
                continue
        runs.append([value, 0, 1])
    return runs


def unpack_index(runs: list[list[int]]) -> np.ndarray:
    parts = [start + step * np.arange(count) for start, step, count in runs]
    return np.concatenate(parts) if parts else np.zeros(0, int)
