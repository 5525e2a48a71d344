"""KV pages: which block of the paged KV tensors belongs to whom. Torch-free; it hands out numbers, not memory.

A block is `block_size` token positions, in every attention layer at once. Blocks are reference-counted, because
requests with a common prefix share them. A full block can be registered under the hash of all tokens up to its end;
after its last user has gone it stays findable by that hash until the pool needs its space (least recently used first).
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

DUMMY_BLOCK = 0


def hash_block(parent: bytes | None, token_ids: Sequence[int], salt: bytes = b"") -> bytes:
    """32-byte digest of a full block: it names all tokens from the sequence's start to the block's end.

    `parent` is the digest of the block before; the first block has None and takes `salt` instead, which separates
    sequences whose equal tokens mean different things (another adapter, another image).
    NOTE: a cryptographic digest, because a collision would let one request read another one's cache.
    """
    digest = blake2b(parent if parent is not None else blake2b(salt, digest_size=32).digest(), digest_size=32)
    digest.update(array("q", token_ids))
    return digest.digest()


class BlockPool:
    """Blocks num_dummies .. num_blocks - 1. Those below are dummies that padded rows write to, each padded row to one
    of its own; they are never given out.

    Free blocks are given out in this order: those that hold nothing findable (their memory is warm), those never used
    (untouched memory stays uncommitted on a CPU), then cached ones, least recently used first.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_caching: bool = True, num_dummies: int = 1) -> None:
        if not 1 <= num_dummies < num_blocks or block_size < 1:
            raise ValueError(
                f"need a block of at least 1 token beside the dummies, got {num_blocks} of {block_size}, "
                f"{num_dummies} of them dummies"
            )
        self.num_blocks = num_blocks
        self.num_dummies = num_dummies
        self.block_size = block_size
        self.enable_caching = enable_caching
        self._refs: dict[int, int] = {}  # block in use -> number of users
        self._blank: list[int] = []  # free, holds nothing findable
        self._fresh = num_dummies  # free and never used: this one and all above
        self._cached: OrderedDict[int, None] = OrderedDict()  # free but findable, least recently used first
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_usable(self) -> int:
        return self.num_blocks - self.num_dummies

    @property
    def num_free(self) -> int:
        return len(self._blank) + self.num_blocks - self._fresh + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks findable by hash, in use or not."""
        return len(self._block_of)

    def ref_count(self, block: int) -> int:
        return self._refs.get(block, 0)

    def is_registered(self, block: int) -> bool:
        return block in self._hash_of

    def pages(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens need."""
        return -(-num_tokens // self.block_size)

    def allocate(self, n: int) -> list[int] | None:
        """n blocks with one user each and no content to rely on, or None (and no change) if fewer are free."""
        if n > self.num_free:
            return None
        blocks = [self._take() for _ in range(n)]
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def _take(self) -> int:
        if self._blank:
            return self._blank.pop()
        if self._fresh < self.num_blocks:
            self._fresh += 1
            return self._fresh - 1
        block, _ = self._cached.popitem(last=False)
        del self._block_of[self._hash_of.pop(block)]
        return block

    def free(self, blocks: Sequence[int]) -> None:
        """Drop one use of each block of a sequence. The sequence's end is forgotten before its beginning, because a
        beginning is what other requests share and an end is useless without it."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            del self._refs[block]
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._blank.append(block)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest run of hashes, from the first on, that are in the cache. Takes no reference."""
        blocks = []
        for key in hashes:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def touch(self, blocks: Iterable[int]) -> None:
        """Add one user to each of these matched blocks."""
        for block in blocks:
            self._refs[block] = self._refs.get(block, 0) + 1
            self._cached.pop(block, None)

    def register(self, block: int, key: bytes) -> None:
        """Make a full block in use, whose content has been computed, findable. The first block under a hash stays:
        a second one with the same content remains its owner's alone."""
        if not self.enable_caching or key in self._block_of or block in self._hash_of:
            return
        if block not in self._refs:
            raise ValueError(f"block {block} is not in use, its content cannot be relied on")
        self._block_of[key] = block
        self._hash_of[block] = key
