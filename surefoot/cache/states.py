"""Recurrent-state slots: which row of the state tensors belongs to whom. Torch-free; it hands out numbers.

A linear-attention layer keeps one fixed-size state per running request instead of KV pages. A state cannot be cut back
to an earlier token, so a prefix can only be reused where a copy of the state was taken: a checkpoint. Rows of the
state tensors:

    num_dummies       dummies: padded rows write to them, each padded row of a step to one of its own
    num_slots         running requests
    num_checkpoints   checkpoints, found by the block hash of their prefix

A checkpoint is written after a forward pass. It is reserved before (`reserve_checkpoint`) and becomes findable once
the pass has been done (`commit_checkpoint`). A checkpoint that a copy of this step reads from is pinned: not evicted.
"""

from __future__ import annotations

from collections import OrderedDict

DUMMY_SLOT = 0


class StatePool:
    """Slots for running requests, and checkpoints that are dropped least recently used first."""

    def __init__(self, num_slots: int, num_checkpoints: int = 0, num_dummies: int = 1) -> None:
        if num_slots < 1 or num_checkpoints < 0 or num_dummies < 1:
            raise ValueError(
                f"need at least 1 slot, 0 checkpoints and 1 dummy, got {num_slots}, {num_checkpoints} and {num_dummies}"
            )
        self.num_dummies = num_dummies
        self.num_slots = num_slots
        self.num_checkpoints = num_checkpoints
        self._free_slots = list(reversed(range(num_dummies, num_dummies + num_slots)))
        self._free_rows = list(reversed(range(num_dummies + num_slots, self.num_rows)))
        self._committed: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._reserved: dict[bytes, int] = {}
        self._pinned: set[bytes] = set()

    @property
    def num_rows(self) -> int:
        """Rows that the state tensors need: dummies, slots, checkpoints."""
        return self.num_dummies + self.num_slots + self.num_checkpoints

    @property
    def num_free(self) -> int:
        """Free slots for running requests."""
        return len(self._free_slots)

    @property
    def num_saved(self) -> int:
        """Checkpoints that can be found."""
        return len(self._committed)

    def allocate(self) -> int:
        """A slot with unknown content: zero it, or copy a checkpoint into it, before use."""
        return self._free_slots.pop()

    def free(self, slot: int) -> None:
        if not 0 <= slot - self.num_dummies < self.num_slots or slot in self._free_slots:
            raise ValueError(f"slot {slot} is not in use")
        self._free_slots.append(slot)

    def lookup(self, key: bytes) -> int | None:
        """Row of the checkpoint of this prefix, if it has been written. Changes nothing."""
        return self._committed.get(key)

    def pin(self, key: bytes) -> int:
        """Row of a checkpoint that a copy will read from in this step; it stays where it is until `unpin_all`."""
        self._committed.move_to_end(key)
        self._pinned.add(key)
        return self._committed[key]

    def unpin_all(self) -> None:
        self._pinned.clear()

    def reserve_checkpoint(self, key: bytes) -> int | None:
        """A row to write the checkpoint of this prefix to. None if it exists or is being written already, or if every
        row is in use by this step."""
        if key in self._committed or key in self._reserved:
            return None
        if not self._free_rows:
            oldest = next((k for k in self._committed if k not in self._pinned), None)
            if oldest is None:
                return None
            self._free_rows.append(self._committed.pop(oldest))
        self._reserved[key] = self._free_rows.pop()
        return self._reserved[key]

    def commit_checkpoint(self, key: bytes) -> None:
        """The reserved row has been written: the prefix can be found from now on."""
        self._committed[key] = self._reserved.pop(key)

    def discard_checkpoint(self, key: bytes) -> None:
        """The reserved row was not, or perhaps not, written."""
        self._free_rows.append(self._reserved.pop(key))
