"""The header of a safetensors file: names, dtypes, shapes and places of its tensors, checked without touching the data.

Layout: 8 bytes little-endian header length n, n bytes of JSON, then the data. Offsets in the JSON count from the start
of the data. The tensors must tile the data without hole or overlap, so the last one's end says how long the file must
be, and an interrupted download is told from a good file by its size alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surefoot.core.errors import ModelError
from surefoot.weights.jsonfile import parse_json_object
from surefoot.weights.messages import one_line

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint; its bytes are [offset, offset + nbytes) of `file`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of one file, in the order of their data."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            length = _header_length(f.read(8), path, size)
            text = f.read(length)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        header = parse_json_object(text.decode("utf-8"), "header")
    except UnicodeDecodeError:
        raise _damaged(path, "damaged: its header is not text") from None
    except ModelError as error:
        raise _damaged(path, f"damaged: its {str(error).split(';')[0]}") from None
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _tensor_info(name, entry, path, start) for name, entry in header.items()}
    in_order = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes))
    return _check_layout(dict(in_order), path, start, size)


def _damaged(path: Path, what: str) -> ModelError:
    return ModelError(f"{path} is {one_line(what)}; fetch it again")


def _header_length(first: bytes, path: Path, size: int) -> int:
    """Length of the JSON header, or the reason why this is no safetensors file."""
    if size == 0:
        raise _damaged(path, "empty (0 bytes): the download was interrupted")
    if first == b"version ":
        raise ModelError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in the folder it came from")
    length = int.from_bytes(first, "little")
    if size < 8 or length > MAX_HEADER_BYTES or length < 2:
        raise _damaged(path, f"not a safetensors file (its header length reads {length})")
    if 8 + length > size:
        raise _damaged(path, f"truncated: its header needs {8 + length:,} bytes, the file has {size:,}")
    return length


def _tensor_info(name: str, entry: Any, path: Path, start: int) -> TensorInfo:
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        well_formed = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end
        well_formed = well_formed and isinstance(kind, str)
    except (TypeError, KeyError, ValueError):
        well_formed = False
    if not well_formed:
        raise _damaged(path, f"damaged: its header entry for {name} makes no sense")
    if kind not in DTYPES:
        shown = one_line(f"{path}: tensor {name} has unknown dtype {kind!r}")
        raise ModelError(f"{shown}; use the BF16, F16 or F32 version of the model")
    dtype = DTYPES[kind]
    if math.prod(shape) * dtype.itemsize != end - begin:
        shown = f"{name} of shape {list(shape)} and dtype {kind}"
        raise _damaged(path, f"damaged: tensor {shown} cannot have {end - begin} bytes")
    return TensorInfo(dtype, shape, path, start + begin, end - begin)


def _check_layout(tensors: dict[str, TensorInfo], path: Path, start: int, size: int) -> dict[str, TensorInfo]:
    """The data is covered exactly once, up to the end of the file."""
    expected = start
    for name, info in tensors.items():
        if info.offset != expected:
            raise _damaged(path, f"damaged: the data of {name} overlaps another tensor or leaves a hole")
        expected += info.nbytes
    if size < expected:
        raise _damaged(path, f"truncated: it should have {expected:,} bytes and has {size:,}")
    if size > expected:
        raise _damaged(path, f"damaged: it has {size - expected:,} bytes more than its header says")
    return tensors
