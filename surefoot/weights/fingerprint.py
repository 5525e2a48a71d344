"""Which weights a number belongs to, in milliseconds: a digest of the tensors that does not read all of a large model.

    fingerprint(Checkpoint(folder))          # "sha256:..." of every byte, or "sampled-sha256:..." of some

Every tensor counts with its name, dtype and shape. Up to `FULL_BYTES` in all, every byte counts too; beyond it, three
pieces of each tensor do, which tells one training run from another but not a single changed number. Sharding does not
change it. For every byte of a large model there is `Checkpoint.content_digest`.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from typing import BinaryIO

from surefoot.core.errors import ModelError
from surefoot.weights.checkpoint import Checkpoint
from surefoot.weights.header import TensorInfo

FULL_BYTES = 32 << 20
PIECE_BYTES = 4096


def fingerprint(checkpoint: Checkpoint) -> str:
    """The digest with its method in front."""
    full = checkpoint.total_bytes <= FULL_BYTES
    by_file = defaultdict(list)
    for name, info in checkpoint.names().items():
        by_file[info.file].append((name, info))
    digests: dict[str, bytes] = {}
    for path, tensors in by_file.items():
        try:
            with path.open("rb") as file:
                digests |= {name: _digest(file, name, info, full) for name, info in tensors}
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror or error}") from None
    whole = hashlib.sha256(b"".join(digests[name] for name in sorted(digests)))
    return f"{'sha256' if full else 'sampled-sha256'}:{whole.hexdigest()[:32]}"


def _digest(file: BinaryIO, name: str, info: TensorInfo, full: bool) -> bytes:
    sha = hashlib.sha256(f"{name}\0{info.dtype}\0{list(info.shape)}\0".encode())
    for begin, count in _pieces(info.nbytes, full):
        file.seek(info.offset + begin)
        sha.update(file.read(count))
    return sha.digest()


def _pieces(size: int, full: bool) -> Iterator[tuple[int, int]]:
    """(begin, count): everything, or a piece of the beginning, the middle and the end."""
    if full or size <= 3 * PIECE_BYTES:
        yield 0, size
    else:
        yield from ((begin, PIECE_BYTES) for begin in (0, (size - PIECE_BYTES) // 2, size - PIECE_BYTES))
