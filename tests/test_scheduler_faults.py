"""The random runs of the scheduler are only worth something if they notice a fault, so faults are planted here.

Each class and function breaks one rule of the scheduler or of its pools; the same runs that pass without it must fail.
"""

from __future__ import annotations

import pytest
from scheduler_world import random_run

from surefoot.cache.pages import BlockPool, hash_block
from surefoot.cache.states import StatePool
from surefoot.core.request import Request, Status
from surefoot.engine import scheduler as scheduler_module
from surefoot.engine.scheduler import Scheduled, Scheduler


class RegistersTooEarly(Scheduler):
    """Blocks can be found in the step that is to fill them."""

    def _place(self, request, budget, step):
        taken = super()._place(request, budget, step)
        self._register(step.items[-1])
        return taken


class ForgetsRestores(Scheduler):
    def schedule(self):
        step = super().schedule()
        step.state_restores.clear()
        return step


class ForgetsResets(Scheduler):
    def schedule(self):
        step = super().schedule()
        step.state_resets.clear()
        return step


class ForgetsSaves(Scheduler):
    def schedule(self):
        step = super().schedule()
        step.state_saves.clear()
        return step


class HitsEveryToken(Scheduler):
    """A fully cached prompt leaves nothing to compute."""

    def _match(self, request):
        hit, ends = super()._match(request)
        count = request.num_tokens // self.block_pool.block_size
        return (self.block_pool.match(self._hashes(request, count)) if hit and not ends else hit), ends


class IgnoresCheckpoints(Scheduler):
    """Takes matching keys of a hybrid model for a hit even where no state was saved."""

    def _admit(self, request, step):
        before, self.state_pool = self.state_pool, None
        admitted = super()._admit(request, step)
        self.state_pool = before
        if admitted and before is not None:
            request.state_slot = before.allocate()
            step.state_resets.append(request.state_slot)
        return admitted


class SeesCheckpointsTooEarly(Scheduler):
    def _cut_at_checkpoint(self, request, start, end, step):
        end, key = super()._cut_at_checkpoint(request, start, end, step)
        if key is not None:
            self.state_pool.commit_checkpoint(key)
            self.state_pool._reserved[key] = self.state_pool._committed[key]
        return end, key


class SavesWithoutCutting(Scheduler):
    """Stores the state of the chunk's end under the hash of a block before it."""

    def _cut_at_checkpoint(self, request, start, end, step):
        return end, super()._cut_at_checkpoint(request, start, end, step)[1]


class TrustsEndedRequests(Scheduler):
    """A checkpoint counts although its request ended in flight."""

    def advance(self, step):
        for item in step.items:
            if item.checkpoint is not None and item.request.status is Status.FINISHED:
                self.state_pool.commit_checkpoint(item.checkpoint)
        for index, item in enumerate(step.items):
            if item.request.status is Status.FINISHED:
                step.items[index] = Scheduled(item.request, item.start, item.num_new_tokens, item.final)
        super().advance(step)


class KeepsCountAfterPreemption(Scheduler):
    def _preempt(self, request, step):
        computed = request.num_computed_tokens
        super()._preempt(request, step)
        request.num_computed_tokens = computed


class PreemptsTheFirst(Scheduler):
    def _grow(self, request, step):
        self.running.reverse()
        try:
            return super()._grow(request, step)
        finally:
            self.running.reverse()


class QueuesPreemptedLast(Scheduler):
    def _preempt(self, request, step):
        super()._preempt(request, step)
        self.waiting.rotate(-1)


class LeaksPages(Scheduler):
    def _preempt(self, request, step):
        request.block_ids = request.block_ids[1:]
        super()._preempt(request, step)


class LeaksCheckpointRows(Scheduler):
    def advance(self, step):
        for item in step.items:
            if item.checkpoint is not None and item.request.status is Status.FINISHED:
                self.state_pool._free_rows.pop() if self.state_pool._free_rows else None
        super().advance(step)


class SharesWhatIsPrivate(Scheduler):
    """Does not ask `cacheable` when it registers blocks."""

    def _register(self, item):
        ask, self._cacheable = self._cacheable, lambda request, end: True
        super()._register(item)
        self._cacheable = ask


class TakesWhatIsShared(Scheduler):
    """Does not ask `cacheable` when it looks for blocks."""

    def _match(self, request):
        ask, self._cacheable = self._cacheable, lambda request, end: True
        found = super()._match(request)
        self._cacheable = ask
        return found


class SkipsPromptLogits(Scheduler):
    def _match(self, request):
        request.__class__ = type("Plain", (Request,), {"needs_prompt_logits": False})
        try:
            return super()._match(request)
        finally:
            request.__class__ = Request


FAULTS = [
    RegistersTooEarly,
    ForgetsRestores,
    ForgetsResets,
    ForgetsSaves,
    HitsEveryToken,
    IgnoresCheckpoints,
    SeesCheckpointsTooEarly,
    SavesWithoutCutting,
    TrustsEndedRequests,
    KeepsCountAfterPreemption,
    PreemptsTheFirst,
    QueuesPreemptedLast,
    LeaksPages,
    LeaksCheckpointRows,
    SharesWhatIsPrivate,
    TakesWhatIsShared,
    SkipsPromptLogits,
]


def notices(scheduler_class: type[Scheduler] = Scheduler) -> bool:
    for seed in range(2000):
        try:
            random_run(seed, scheduler_class)
        except (AssertionError, RuntimeError, LookupError, ValueError):
            return True
    return False


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_random_runs_notice_a_faulty_scheduler(fault):
    assert notices(fault)


def hash_without_parent(parent, token_ids, salt=b""):
    return hash_block(None, token_ids, salt)


def touch_without_taking(self, blocks):
    for block in blocks:
        self._refs[block] = self._refs.get(block, 0) + 1


def take_without_forgetting(self):
    before = dict(self._block_of)
    block = original_take(self)
    self._block_of = before
    self._hash_of.pop(block, None)
    return block


def evict_what_is_pinned(self, key):
    self._pinned.clear()
    return original_reserve(self, key)


def free_at_once(self, blocks):
    original_free(self, blocks)
    for block in set(blocks) & set(self._refs):
        del self._refs[block]
        self._blank.append(block)


original_take, original_free = BlockPool._take, BlockPool.free
original_reserve = StatePool.reserve_checkpoint


@pytest.mark.parametrize(
    ("where", "name", "fault"),
    [
        (scheduler_module, "hash_block", hash_without_parent),
        (BlockPool, "touch", touch_without_taking),
        (BlockPool, "_take", take_without_forgetting),
        (BlockPool, "free", free_at_once),
        (StatePool, "reserve_checkpoint", evict_what_is_pinned),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_random_runs_notice_a_faulty_pool(monkeypatch, where, name, fault):
    monkeypatch.setattr(where, name, fault)
    assert notices()
