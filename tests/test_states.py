"""The state pool: slots, and checkpoints that are invisible until written and immovable while read."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from surefoot.cache.states import DUMMY_SLOT, StatePool


def save(pool: StatePool, key: bytes) -> int:
    row = pool.reserve_checkpoint(key)
    assert row is not None
    pool.commit_checkpoint(key)
    return row


def test_rows_are_dummy_then_slots_then_checkpoints():
    pool = StatePool(3, 2)
    assert pool.num_rows == 6 and pool.num_free == 3
    assert [pool.allocate() for _ in range(3)] == [1, 2, 3] and pool.num_free == 0
    assert {save(pool, b"a"), save(pool, b"b")} == {4, 5}
    pool.free(2)
    assert pool.num_free == 1 and pool.allocate() == 2


@pytest.mark.parametrize("slot", [DUMMY_SLOT, 1, 3, 4])
def test_only_a_slot_in_use_can_be_freed(slot):
    pool = StatePool(3, 2)
    pool.allocate()
    pool.free(1)
    with pytest.raises(ValueError, match="not in use"):
        pool.free(slot)


def test_a_checkpoint_is_found_only_once_it_is_written():
    pool = StatePool(1, 2)
    row = pool.reserve_checkpoint(b"a")
    assert pool.lookup(b"a") is None and pool.reserve_checkpoint(b"a") is None
    pool.commit_checkpoint(b"a")
    assert pool.lookup(b"a") == row and pool.reserve_checkpoint(b"a") is None and pool.num_saved == 1


def test_a_discarded_checkpoint_gives_its_row_back():
    pool = StatePool(1, 1)
    row = pool.reserve_checkpoint(b"a")
    assert pool.reserve_checkpoint(b"b") is None, "the only row is being written"
    pool.discard_checkpoint(b"a")
    assert pool.lookup(b"a") is None and pool.reserve_checkpoint(b"b") == row


def test_least_recently_used_goes_first_but_not_while_it_is_read():
    pool = StatePool(1, 2)
    a, b = save(pool, b"a"), save(pool, b"b")
    assert pool.pin(b"a") == a
    pool.unpin_all()
    assert save(pool, b"c") == b and pool.lookup(b"b") is None, "b has not been used since"
    pool.pin(b"a")
    pool.pin(b"c")
    assert pool.reserve_checkpoint(b"d") is None
    pool.unpin_all()
    assert save(pool, b"d") == a and pool.lookup(b"c") == b


def test_without_checkpoints_none_is_kept():
    assert StatePool(1, 0).reserve_checkpoint(b"a") is None


class AnyUse(RuleBasedStateMachine):
    """`rows` says what stands in each checkpoint row, `dict` order is order of use."""

    @initialize(num_checkpoints=st.integers(0, 3))
    def start(self, num_checkpoints):
        self.pool = StatePool(2, num_checkpoints)
        self.saved: dict[bytes, int] = {}
        self.open: dict[bytes, int] = {}
        self.pinned: set[bytes] = set()
        self.slots: list[int] = []

    @rule(key=st.binary(min_size=1, max_size=1))
    def reserve(self, key):
        row = self.pool.reserve_checkpoint(key)
        busy = set(self.open.values()) | {self.saved[k] for k in self.pinned}
        if row is None:
            assert key in self.saved or key in self.open or len(busy) == self.pool.num_checkpoints
            return
        assert row not in busy and self.pool.num_slots < row < self.pool.num_rows
        self.saved = {k: r for k, r in self.saved.items() if r != row}
        self.open[key] = row

    @precondition(lambda self: self.open)
    @rule(keep=st.booleans())
    def settle(self, keep):
        key, row = self.open.popitem()
        if keep:
            self.saved[key] = row
            self.pool.commit_checkpoint(key)
        else:
            self.pool.discard_checkpoint(key)

    @precondition(lambda self: self.saved)
    @rule(index=st.integers(0, 9))
    def pin(self, index):
        key = list(self.saved)[index % len(self.saved)]
        assert self.pool.pin(key) == self.saved[key]
        self.pinned.add(key)

    @rule()
    def unpin(self):
        self.pool.unpin_all()
        self.pinned.clear()

    @rule(take=st.booleans())
    def slot(self, take):
        if take and self.pool.num_free:
            self.slots.append(self.pool.allocate())
        elif self.slots:
            self.pool.free(self.slots.pop(0))
        assert len(set(self.slots)) == len(self.slots) == self.pool.num_slots - self.pool.num_free
        assert set(self.slots) <= {1, 2}

    @rule()
    def check(self):
        assert self.pool.num_saved == len(self.saved)
        assert all(self.pool.lookup(key) == row for key, row in self.saved.items())
        assert all(self.pool.lookup(key) is None for key in self.open if key not in self.saved)


AnyUse.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestAnyUse = AnyUse.TestCase
