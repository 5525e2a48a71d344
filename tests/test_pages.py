"""The block pool: order of reuse, sharing, and a comparison with a plain model under random use."""

from __future__ import annotations

import copy

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from surefoot.cache.pages import DUMMY_BLOCK, BlockPool, hash_block


def keys(n: int, first: int = 0) -> list[bytes]:
    out: list[bytes] = []
    for i in range(n):
        out.append(hash_block(out[-1] if out else None, [first, i]))
    return out


def test_the_dummy_block_is_never_given_out_and_too_much_changes_nothing():
    pool = BlockPool(5, 4)
    assert pool.allocate(5) is None and pool.num_free == pool.num_usable == 4
    blocks = pool.allocate(4)
    assert blocks is not None and sorted(blocks) == [1, 2, 3, 4] and DUMMY_BLOCK not in blocks
    assert pool.num_free == 0 and pool.allocate(1) is None and pool.allocate(0) == []


def test_pages_rounds_up():
    pool = BlockPool(5, 4)
    assert [pool.pages(n) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


def test_a_hash_names_the_whole_prefix():
    chain = keys(2)
    assert len(chain[0]) == 32
    assert chain == keys(2)
    assert hash_block(keys(1, first=9)[0], [0, 1]) != chain[1]
    assert hash_block(None, [0, 0], salt=b"adapter") != chain[0]
    assert hash_block(None, [1, 256]) != hash_block(None, [257, 0])
    assert hash_block(None, [2**31]) != hash_block(None, [0])


def test_freed_blocks_are_found_until_their_space_is_needed_the_end_of_a_sequence_goes_first():
    pool = BlockPool(4, 2)
    chain = keys(3)
    blocks = pool.allocate(3)
    for block, key in zip(blocks, chain):
        pool.register(block, key)
    pool.free(blocks)
    assert pool.num_free == 3 and pool.match(chain) == blocks
    assert pool.allocate(1) == blocks[2:] and pool.match(chain) == blocks[:2]
    assert pool.allocate(1) == blocks[1:2] and pool.match(chain) == blocks[:1]


def test_least_recently_used_goes_first_and_blank_blocks_before_cached_ones():
    pool = BlockPool(4, 2)
    a, b, c = pool.allocate(3)
    pool.register(a, keys(1, 1)[0])
    pool.register(b, keys(1, 2)[0])
    pool.free([a])
    pool.free([b])
    pool.free([c])
    pool.touch([a])
    pool.free([a])  # used again: now b is the oldest
    assert pool.allocate(3) == [c, b, a] and pool.num_cached == 0


def test_never_used_blocks_go_before_cached_ones():
    pool = BlockPool(4, 2)
    (a,) = pool.allocate(1)
    pool.register(a, keys(1)[0])
    pool.free([a])
    assert pool.allocate(2) == [2, 3] and pool.match(keys(1)) == [a]


def test_a_shared_block_is_free_after_its_last_user():
    pool = BlockPool(4, 2)
    (a,) = pool.allocate(1)
    pool.register(a, keys(1)[0])
    pool.touch(pool.match(keys(1)))
    assert pool.ref_count(a) == 2
    pool.free([a])
    assert pool.num_free == 2 and pool.ref_count(a) == 1
    pool.free([a])
    assert pool.num_free == 3
    with pytest.raises(KeyError):
        pool.free([a])


def test_the_first_block_under_a_hash_stays():
    pool = BlockPool(4, 2)
    a, b = pool.allocate(2)
    pool.register(a, keys(1)[0])
    pool.register(b, keys(1)[0])
    assert pool.match(keys(1)) == [a] and not pool.is_registered(b)
    with pytest.raises(ValueError, match="not in use"):
        pool.register(3, keys(1, 5)[0])


def test_without_caching_nothing_is_found():
    pool = BlockPool(4, 2, enable_caching=False)
    (a,) = pool.allocate(1)
    pool.register(a, keys(1)[0])
    assert pool.match(keys(1)) == [] and pool.num_cached == 0


class AnyUse(RuleBasedStateMachine):
    """Sequences of blocks come and go; `owned` is what each holds, `content` what each block was last filled with."""

    @initialize(num_blocks=st.integers(2, 9))
    def start(self, num_blocks):
        self.pool = BlockPool(num_blocks, 2)
        self.owned: list[list[int]] = []
        self.content: dict[int, bytes | None] = {}

    @rule(first=st.integers(0, 2), matchable=st.integers(0, 4), extra=st.integers(0, 4), fill=st.booleans())
    def sequence(self, first, matchable, extra, fill):
        chain = keys(matchable + extra, first)
        hit = self.pool.match(chain[:matchable])
        assert [self.content[block] for block in hit] == chain[: len(hit)]
        self.pool.touch(hit)
        new = self.pool.allocate(len(chain) - len(hit))
        if new is None:
            self.pool.free(hit)
            return
        self.content |= dict.fromkeys(new)
        self.owned.append(hit + new)
        if fill:
            for block, key in list(zip(hit + new, chain))[len(hit) :]:
                self.content[block] = key
                self.pool.register(block, key)

    @precondition(lambda self: self.owned)
    @rule(index=st.integers(0, 9))
    def release(self, index):
        self.pool.free(self.owned.pop(index % len(self.owned)))

    def teardown(self):
        while getattr(self, "owned", None):
            self.pool.free(self.owned.pop())
            self.check()

    @rule()
    def check(self):
        used = [block for blocks in self.owned for block in blocks]
        assert all(self.pool.ref_count(block) == used.count(block) for block in range(self.pool.num_blocks))
        assert self.pool.num_free == self.pool.num_usable - len(set(used))
        free = copy.deepcopy(self.pool).allocate(self.pool.num_free)
        assert sorted([*free, *set(used)]) == list(range(1, self.pool.num_blocks))


AnyUse.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestAnyUse = AnyUse.TestCase
