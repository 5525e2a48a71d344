"""The scheduler: worked examples, and a pretend model under random use (see scheduler_world.py).

That the random runs notice a fault is shown in test_scheduler_faults.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from scheduler_world import GARBAGE, Setup, World, random_run

from surefoot.cache.pages import BlockPool
from surefoot.cache.states import StatePool
from surefoot.core.errors import CapacityError, InputError
from surefoot.core.request import Request, Status
from surefoot.core.sampling import SamplingParams
from surefoot.engine.scheduler import Schedule, Scheduler

# ---- worked examples


def make(blocks: int = 20, size: int = 4, slots: int = 0, checkpoints: int = 2, **config) -> Scheduler:
    """A scheduler with roomy defaults; `slots` > 0 makes the model a hybrid one."""
    config = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 64} | config
    return Scheduler(BlockPool(blocks, size), StatePool(slots, checkpoints) if slots else None, **config)


def add(scheduler: Scheduler, name: str, prompt: list[int] | range, max_tokens: int = 8, **params) -> Request:
    score = params.pop("score", False)
    request = Request(name, list(prompt), SamplingParams(max_tokens=max_tokens, **params), score=score)
    scheduler.add(request)
    return request


def step(scheduler: Scheduler, token: int = 7) -> Schedule:
    """Schedule, pretend to compute, give `token` to whoever samples."""
    schedule = scheduler.schedule()
    scheduler.advance(schedule)
    for item in schedule.items:
        if item.samples:
            item.request.output_token_ids.append(token)
    return schedule


def shape(schedule: Schedule) -> list[tuple[str, int, int]]:
    return [(item.request.request_id, item.start, item.num_new_tokens) for item in schedule.items]


def test_prefill_and_decode_share_one_budget_and_decodes_come_first():
    s = make(max_num_batched_tokens=10)
    add(s, "a", range(12))
    assert shape(step(s)) == [("a", 0, 10)]
    b = add(s, "b", range(100, 103))
    assert shape(step(s)) == [("a", 10, 2), ("b", 0, 3)]
    add(s, "c", range(200, 220))
    third = s.schedule()
    assert shape(third) == [("a", 12, 1), ("b", 3, 1), ("c", 0, 8)] and third.num_decodes == 2
    assert [item.samples for item in third.items] == [True, True, False]
    s.advance(third)
    assert b.num_computed_tokens == 4


def test_a_single_token_prefill_counts_as_a_decode():
    s = make()
    add(s, "long", range(9))
    add(s, "short", [1])
    assert shape(step(s)) == [("short", 0, 1), ("long", 0, 9)]


def test_chunk_size_limits_each_request_not_the_step():
    s = make(prefill_chunk_size=3)
    add(s, "a", range(7))
    add(s, "b", range(100, 105))
    assert [shape(step(s)) for _ in range(3)] == [
        [("a", 0, 3), ("b", 0, 3)],
        [("a", 3, 3), ("b", 3, 2)],
        [("a", 6, 1), ("b", 5, 1)],
    ]


def test_the_latest_arrival_is_preempted_and_resumes_from_the_pages_that_are_left():
    s = make(blocks=9, size=2)
    a, b = add(s, "a", range(5)), add(s, "b", range(100, 103))
    c = add(s, "c", range(200, 205))
    assert [len(step(s).items), len(step(s).items)] == [3, 3]  # then all 8 pages are full
    third = step(s)
    assert shape(third) == [("a", 6, 1), ("b", 4, 1)] and third.preempted == [c]
    assert c.status is Status.PREEMPTED and s.waiting[0] is c
    assert (c.num_computed_tokens, c.block_ids, len(c.output_token_ids)) == (0, [], 2)
    s.finish(a, "stop")
    s.finish(b, "stop")
    resumed = s.schedule()  # a and b took the end of what c had; its beginning is still there
    assert shape(resumed) == [("c", 2, 5)] and resumed.items[0].samples
    assert (c.num_cached_tokens, c.num_preemptions, s.stats()["preemptions"]) == (0, 1, 1)


def test_the_latest_arrival_waits_in_its_place_rather_than_preempt_itself():
    s = make(blocks=7, size=2)
    add(s, "a", range(5))
    b, c = add(s, "b", range(100, 103)), add(s, "c", range(200, 202))
    assert shape(step(s)) == [("a", 0, 5), ("b", 0, 3), ("c", 0, 2)]
    assert shape(step(s)) == [("a", 5, 1), ("b", 3, 1)] and c.status is Status.RUNNING
    s.finish(b, "stop")
    assert shape(step(s)) == [("a", 6, 1), ("c", 2, 1)] and not s.num_preemptions


def test_a_waiting_request_is_not_overtaken_by_a_smaller_one():
    s = make(blocks=5, size=2)
    add(s, "a", range(4), max_tokens=3)
    add(s, "big", range(100, 106), max_tokens=2)
    add(s, "small", [1], max_tokens=1)
    assert shape(step(s)) == [("a", 0, 4)]
    assert [r.request_id for r in s.waiting] == ["big", "small"]


def test_full_blocks_are_shared_and_the_last_token_is_always_computed():
    s = make()
    a = add(s, "a", range(8))
    step(s)
    b = add(s, "b", range(8))
    c = add(s, "c", [*range(7), 99, 5])
    schedule = step(s)
    assert shape(schedule) == [("a", 8, 1), ("b", 4, 4), ("c", 4, 5)]
    assert b.block_ids[0] == c.block_ids[0] == a.block_ids[0] and s.block_pool.ref_count(a.block_ids[0]) == 3
    assert len({a.block_ids[1], b.block_ids[1], c.block_ids[1]}) == 3
    assert (a.num_cached_tokens, b.num_cached_tokens, s.stats()["prefix_cache_hit_tokens"]) == (0, 4, 8)


def test_equal_prompts_in_one_step_do_not_share_what_is_not_computed_yet():
    s = make()
    a, b = add(s, "a", range(12)), add(s, "b", range(12))
    assert shape(step(s)) == [("a", 0, 12), ("b", 0, 12)]
    assert not set(a.block_ids) & set(b.block_ids)


def test_prompt_logits_want_every_token_computed():
    s = make()
    add(s, "a", range(8))
    step(s)
    add(s, "b", range(8), prompt_logprobs=0)
    scored = add(s, "c", range(8), score=True)
    items = s.schedule().items
    assert [(i.start, i.num_new_tokens, i.final, i.samples) for i in items[1:]] == [
        (0, 8, True, True),
        (0, 8, True, False),
    ]
    assert scored.num_cached_tokens == 0


def test_a_hybrid_prompt_is_cut_at_its_last_full_block_and_the_state_saved_there():
    s = make(slots=3)
    a = add(s, "a", range(10))
    first = step(s)
    assert shape(first) == [("a", 0, 8)] and not first.items[0].samples
    assert (first.state_resets, first.state_restores, first.state_saves) == ([1], [], [(1, 4)])
    second = step(s)
    assert shape(second) == [("a", 8, 2)] and not (second.state_resets or second.state_saves)
    add(s, "b", [*range(9), 50, 51])
    third = step(s)
    assert shape(third) == [("a", 10, 1), ("b", 8, 3)]
    assert (third.state_resets, third.state_restores, third.state_saves) == ([], [(4, 2)], [])
    assert a.block_ids[:2] == s.running[1].block_ids[:2]


def test_a_hybrid_saves_where_prompts_part_ways_so_that_the_third_one_hits():
    s = make(slots=4, checkpoints=4)
    system = list(range(8))
    add(s, "a", [*system, *range(20, 26)])
    step(s), step(s)
    add(s, "b", [*system, *range(30, 36)])  # the keys of `system` match, but no state was saved there
    saves = [step(s), step(s), step(s)]
    assert [shape(x)[-1] for x in saves] == [("b", 0, 8), ("b", 8, 4), ("b", 12, 2)]
    assert [len(x.state_saves) for x in saves] == [1, 1, 0]
    add(s, "c", [*system, *range(40, 46)])
    assert shape(step(s))[-1] == ("c", 8, 4)


def test_a_hybrid_without_checkpoints_has_no_prefix_caching():
    s = make(slots=2, checkpoints=0)
    assert not s.prefix_caching
    add(s, "a", range(8))
    assert shape(step(s)) == [("a", 0, 8)]
    add(s, "b", range(8))
    schedule = step(s)
    assert shape(schedule)[-1] == ("b", 0, 8) and not schedule.state_saves and s.block_pool.num_cached == 0


def test_a_request_cancelled_in_flight_leaves_no_trace():
    s = make(slots=2)
    request = add(s, "a", range(10))
    schedule = s.schedule()
    assert schedule.state_saves and s.cancel("a") is request and s.cancel("a") is None
    s.advance(schedule)
    s.finish(request, "stop")
    assert (request.status, request.finish_reason) == (Status.FINISHED, "abort")
    assert s.block_pool.num_free == s.block_pool.num_usable and s.block_pool.num_cached == 0
    assert s.state_pool is not None and (s.state_pool.num_free, s.state_pool.num_saved) == (2, 0)
    assert not s.has_unfinished()
    add(s, "a", range(10))  # the id is free again, and nothing is taken for computed
    assert shape(step(s)) == [("a", 0, 8)]


def test_what_can_never_run_is_refused():
    s = make(blocks=4, size=4, max_model_len=16)
    for prompt, message in ((17, "shorten the prompt"), (16, "no room for output")):
        with pytest.raises(InputError, match=message):
            add(s, "a", range(prompt))
    with pytest.raises(CapacityError, match="15 tokens, there is room for 12"):
        add(s, "a", range(10), max_tokens=50)
    assert not s.has_unfinished()
    add(s, "a", range(10), max_tokens=3)  # 13 tokens, the last of which is never computed
    with pytest.raises(InputError, match="in use"):
        add(s, "a", [1])
    with pytest.raises(CapacityError):
        add(s, "b", range(16), score=True)
    assert s.length_limit(add(s, "c", range(12), max_tokens=1)) == 13


def test_prompt_plus_max_tokens_may_exceed_the_model_length():
    s = make(max_model_len=16)
    assert s.length_limit(add(s, "a", range(10), max_tokens=500)) == 16
    assert s.length_limit(add(s, "b", range(16), score=True)) == 16


def test_wrong_use_is_an_error_not_a_hang():
    s = make()
    add(s, "a", range(4))
    schedule = s.schedule()
    with pytest.raises(RuntimeError, match="advanced"):
        s.schedule()
    s.advance(schedule)
    with pytest.raises(RuntimeError, match="not the one"):
        s.advance(schedule)
    with pytest.raises(RuntimeError, match="nothing to compute"):
        s.schedule()


def test_host_logic_does_not_import_torch():
    code = "import sys, surefoot.engine.scheduler, surefoot.cache.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


# ---- random use


class AnyUse(RuleBasedStateMachine):
    """Hypothesis chooses the engine and the moves; `World` checks."""

    @initialize(rng=st.randoms(use_true_random=False))
    def start(self, rng):
        self.world = World(Setup.random(rng))

    @rule(
        name=st.integers(0, 7),
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        max_tokens=st.integers(1, 20),
        kind=st.sampled_from(["generate"] * 4 + ["score", "probs"]),
    )
    def add(self, name, prompt, max_tokens, kind):
        self.world.add(f"r{name}", prompt, max_tokens, kind == "score", kind == "probs")

    @precondition(lambda self: self.world.live)
    @rule(index=st.integers(0, 9))
    def cancel(self, index):
        self.world.cancel(index)

    @rule(times=st.integers(1, 4))
    def steps(self, times):
        for _ in range(times):
            self.world.step()

    @precondition(lambda self: self.world.live)
    @rule(index=st.integers(0, 9), drop=st.booleans(), readd=st.booleans())
    def cancel_in_flight(self, index, drop, readd):
        victim = self.world.live[index % len(self.world.live)]

        def meanwhile():
            self.world.cancel(index)
            if readd:
                self.world.add(victim.request_id, victim.prompt_token_ids, 3)

        self.world.step(meanwhile, drop_ended=drop)

    @rule()
    def failing_step(self):
        self.world.step(fail=True)

    def teardown(self):
        if hasattr(self, "world"):
            self.world.drain()


AnyUse.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAnyUse = AnyUse.TestCase

SEEDS = range(400)


def test_random_runs_and_what_they_reach():
    worlds = [random_run(seed) for seed in SEEDS]
    for hybrid in (False, True):
        some = [w.scheduler for w in worlds if w.setup.hybrid == hybrid]
        assert sum(s.num_preemptions for s in some) > 20
        assert sum(s.num_hit_tokens for s in some) > 100
    finished = [r for w in worlds for r in w.finished]
    assert {r.finish_reason for r in finished} == {"stop", "length", "error"}
    assert any(r.num_preemptions > 1 and r.finish_reason == "length" for r in finished)


def test_garbage_is_never_a_true_value():
    world = World(Setup())
    assert world.add("a", [0, 1, 1], 4)
    assert GARBAGE not in world.truth(world.live[0])
