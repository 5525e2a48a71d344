"""A pretend model around the scheduler: it writes into simulated pages and states, and checks all that it reads.

What a real layer would store for token p depends on all tokens up to p. Here that is one number, chained over the
tokens, so whatever a request finds in its block table and its slot can be compared with what its own tokens demand.
Aliased blocks, stale reuse, wrong prefix hits, a missing reset or restore: each shows as a wrong number at a read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from surefoot.cache.pages import DUMMY_BLOCK, BlockPool
from surefoot.cache.states import StatePool
from surefoot.core.errors import SurefootError
from surefoot.core.request import Request, Status
from surefoot.core.sampling import SamplingParams
from surefoot.engine.scheduler import Schedule, Scheduled, Scheduler

ZERO = 0
GARBAGE = -1


@dataclass(frozen=True)
class Setup:
    """One engine: its sizes. Tokens from `shared_length` on, and whole prompts longer than that, mean something else in
    each request, like keys under a length-dependent rope (None: there is no such limit)."""

    hybrid: bool = False
    block_size: int = 2
    num_blocks: int = 8
    max_num_seqs: int = 2
    budget: int = 8
    chunk: int | None = None
    num_checkpoints: int = 2
    caching: bool = True
    max_model_len: int = 14
    shared_length: int | None = None

    @staticmethod
    def random(rng: Random) -> Setup:
        return Setup(
            hybrid=rng.random() < 0.6,
            block_size=rng.choice([1, 2, 3, 4]),
            num_blocks=rng.randint(3, 11),
            max_num_seqs=rng.randint(1, 5),
            budget=rng.choice([1, 3, 8, 30]),
            chunk=rng.choice([None, None, 1, 2, 3, 7]),
            num_checkpoints=rng.choice([0, 1, 2, 4]),
            caching=rng.random() < 0.8,
            max_model_len=rng.randint(4, 24),
            shared_length=rng.choice([None, None, 4, 8]),
        )


class World:
    """A scheduler, the memory it hands out, a pretend model, and checks after every move."""

    def __init__(self, setup: Setup, scheduler_class: type[Scheduler] = Scheduler) -> None:
        self.setup = setup
        self.pool = BlockPool(setup.num_blocks, setup.block_size, setup.caching)
        self.states = StatePool(setup.max_num_seqs, setup.num_checkpoints) if setup.hybrid else None
        limit = setup.shared_length
        self.scheduler = scheduler_class(
            self.pool,
            self.states,
            max_num_seqs=setup.max_num_seqs,
            max_num_batched_tokens=setup.budget,
            max_model_len=setup.max_model_len,
            prefill_chunk_size=setup.chunk,
            cacheable=None if limit is None else lambda request, end: max(end, request.num_prompt_tokens) <= limit,
        )
        self.kv = [[GARBAGE] * setup.block_size for _ in range(setup.num_blocks)]
        self.state = [GARBAGE] * (self.states.num_rows if self.states else 1)
        self.serial: dict[Request, int] = {}  # arrival order of every request there ever was
        self.live: list[Request] = []
        self.finished: list[Request] = []

    # ---- what is true, whatever the scheduler does

    def chain(self, request: Request, tokens: list[int]) -> list[int]:
        """What the cache must hold for each of these tokens of this request."""
        values, value, limit = [], ZERO, self.setup.shared_length
        for position, token in enumerate(tokens):
            shared = limit is None or max(position + 1, request.num_prompt_tokens) <= limit
            private = 0 if shared else 1 + self.serial[request]
            value = hash((value, token, private, 12345)) & 0xFFFFFFFF
            values.append(value)
        return values

    def truth(self, request: Request) -> list[int]:
        return self.chain(request, list(request.token_ids(0, request.num_tokens)))

    @staticmethod
    def sample(value: int) -> tuple[int, bool]:
        """The next token after this cache value, and whether it ends the request."""
        return value % 2, value % 29 == 0

    def alone(self, request: Request) -> list[int]:
        """Output tokens of the request run by itself, without any cache."""
        tokens, done = list(request.prompt_token_ids), request.score
        while not done:
            token, done = self.sample(self.chain(request, tokens)[-1])
            tokens.append(token)
            done = done or len(tokens) == self.scheduler.length_limit(request)
        return tokens[request.num_prompt_tokens :]

    # ---- moves

    def add(
        self, request_id: str, prompt: list[int], max_tokens: int, score: bool = False, probs: bool = False
    ) -> bool:
        """Whether the scheduler took it."""
        params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=0 if probs else None)
        request = Request(request_id, prompt, params, score=score)
        try:
            self.scheduler.add(request)
        except SurefootError:
            return False
        self.serial[request] = len(self.serial)
        self.live.append(request)
        return True

    def cancel(self, index: int) -> None:
        request = self.live.pop(index % len(self.live))
        assert self.scheduler.cancel(request.request_id) is request
        assert request.status is Status.FINISHED and request.finish_reason == "abort"
        assert self.scheduler.cancel(request.request_id) is None

    def step(self, meanwhile: Callable[[], None] | None = None, drop_ended: bool = False, fail: bool = False) -> None:
        """One engine step; `meanwhile` happens between schedule and forward. Requests that end there are computed
        nevertheless, or left out of the forward (`drop_ended`). A failing forward leaves garbage."""
        step = self.scheduler.schedule()
        self.check_step(step)
        rows = [(item, list(item.request.block_ids), item.request.state_slot or 0) for item in step.items]
        if meanwhile is not None:
            meanwhile()
        if drop_ended:
            rows = [row for row in rows if row[0].request.status is Status.RUNNING]
        self.forward(step, rows, fail)
        if fail:
            for item in step.items:
                self.end(item.request, "error")
        self.scheduler.advance(step)
        for item in step.items:
            self.take_token(item)
        self.check_pools()

    def drain(self) -> None:
        """Run all requests to their end; then nothing may be in use."""
        for _ in range(20 + 40 * sum(self.scheduler.length_limit(r) + 1 for r in self.live)):
            if not self.scheduler.has_unfinished():
                break
            self.step()
        assert not self.scheduler.has_unfinished() and not self.live, "requests do not come to an end"
        assert not self.scheduler.schedule().items
        assert self.pool.num_free == self.pool.num_usable
        assert not self.scheduler.waiting and not self.scheduler.running and not self.scheduler._checkpoint_ends
        if self.states:
            assert self.states.num_free == self.states.num_slots
            spare = copy.deepcopy(self.states)
            rows = {spare.reserve_checkpoint(bytes([n])) for n in range(spare.num_checkpoints)}
            assert rows == set(range(spare.num_slots + 1, spare.num_rows)), "a checkpoint row has leaked"

    def end(self, request: Request, reason: str) -> None:
        if request.status is not Status.FINISHED:
            self.live.remove(request)
            self.finished.append(request)
        self.scheduler.finish(request, reason)
        assert not request.block_ids and request.state_slot is None

    # ---- the pretend engine

    def forward(self, step: Schedule, rows: list[tuple[Scheduled, list[int], int]], fail: bool) -> None:
        """Zero and restore states; every row reads its past; every row writes; save states."""
        for slot in step.state_resets:
            self.state[slot] = ZERO
        for source, slot in step.state_restores:
            self.state[slot] = self.state[source]
        for item, table, slot in rows:
            self.read(item, table, slot)
        for item, table, slot in rows:
            values = self.truth(item.request)
            for p in range(item.start, item.end):
                page, offset = divmod(p, self.setup.block_size)
                self.kv[table[page]][offset] = GARBAGE if fail else values[p]
            self.state[slot] = GARBAGE if fail else values[item.end - 1]
        for slot, row in step.state_saves:
            self.state[row] = self.state[slot]

    def read(self, item: Scheduled, table: list[int], slot: int) -> None:
        """All that the model reads before it writes must be this request's own past."""
        want = self.truth(item.request)
        for p in range(item.start):
            page, offset = divmod(p, self.setup.block_size)
            got = self.kv[table[page]][offset]
            assert got == want[p], f"{item.request.request_id} reads a wrong key at {p}, block {table[page]}"
        if self.states:
            past = want[item.start - 1] if item.start else ZERO
            assert self.state[slot] == past, f"{item.request.request_id} starts at {item.start} from a wrong state"

    def take_token(self, item: Scheduled) -> None:
        request = item.request
        if request.status is Status.FINISHED:
            return
        if item.samples:
            token, stop = self.sample(self.truth(request)[item.end - 1])
            request.output_token_ids.append(token)
            if stop or request.num_tokens == self.scheduler.length_limit(request):
                assert request.output_token_ids == self.alone(request)
                self.end(request, "stop" if stop else "length")
        elif item.final:
            assert request.score
            self.end(request, "stop")

    # ---- checks

    def check_step(self, step: Schedule) -> None:
        setup, requests = self.setup, [item.request for item in step.items]
        assert step.items or not self.live
        assert len(set(requests)) == len(requests) <= setup.max_num_seqs
        assert step.num_tokens <= setup.budget
        singles = [item.num_new_tokens == 1 for item in step.items]
        assert singles == sorted(singles, reverse=True) and step.num_decodes == sum(singles)
        for item in step.items:
            request = item.request
            assert request.status is Status.RUNNING
            assert item.start == request.num_computed_tokens < item.end <= request.num_tokens
            assert item.num_new_tokens <= (setup.chunk or setup.budget)
            assert item.final == (item.end == request.num_tokens)
            assert item.samples == (item.final and not request.score)
            assert request.num_cached_tokens < request.num_tokens
            if request.needs_prompt_logits:
                assert request.num_cached_tokens == 0
            for block in request.block_ids[item.start // setup.block_size : self.pool.pages(item.end)]:
                assert self.pool.ref_count(block) == 1, f"block {block} is written and shared"
                assert not self.pool.is_registered(block), f"block {block} is written and can be found"
        if step.preempted:
            assert list(self.scheduler.waiting)[: len(step.preempted)] == step.preempted[::-1]
        self.check_state_copies(step)
        self.check_pools()

    def check_state_copies(self, step: Schedule) -> None:
        if self.states is None:
            assert not step.state_resets and not step.state_restores and not step.state_saves
            return
        checkpoints = range(self.states.num_slots + 1, self.states.num_rows)
        given = step.state_resets + [slot for _, slot in step.state_restores]
        assert len(set(given)) == len(given) and set(given) <= set(range(1, self.states.num_slots + 1))
        sources, saved = {row for row, _ in step.state_restores}, [row for _, row in step.state_saves]
        assert sources | set(saved) <= set(checkpoints)
        assert len(set(saved)) == len(saved) and not sources & set(saved)
        assert {slot for slot, _ in step.state_saves} <= {item.request.state_slot for item in step.items}

    def check_pools(self) -> None:
        """Nothing leaks, nothing overlaps, counts are right, order is kept."""
        running, waiting = self.scheduler.running, list(self.scheduler.waiting)
        assert set(running + waiting) == set(self.live)
        arrivals = [self.serial[request] for request in running + waiting]
        assert arrivals == sorted(arrivals), "somebody has been overtaken"
        users = dict.fromkeys(range(self.setup.num_blocks), 0)
        for request in running:
            assert len(set(request.block_ids)) == len(request.block_ids) >= self.pool.pages(request.num_computed_tokens)
            for block in request.block_ids:
                users[block] += 1
        assert users == {block: self.pool.ref_count(block) for block in users}
        spare = copy.deepcopy(self.pool)
        free = spare.allocate(self.pool.num_free)
        assert free is not None and spare.allocate(1) is None
        assert sorted(free) == [block for block, n in users.items() if not n and block != DUMMY_BLOCK]
        assert users[DUMMY_BLOCK] == 0
        assert all(not r.block_ids and r.state_slot is None and not r.num_computed_tokens for r in waiting)
        slots = [request.state_slot for request in running]
        if self.states:
            assert len(set(slots)) == len(slots) == self.states.num_slots - self.states.num_free
            assert set(slots) <= set(range(1, self.states.num_slots + 1))
        else:
            assert set(slots) <= {None}


def random_prompt(rng: Random, length: int) -> list[int]:
    """Prompts of two tokens that often begin alike."""
    family = Random(rng.randrange(2))
    shared = rng.randint(0, length)
    return [family.randrange(2) for _ in range(shared)] + [rng.randrange(2) for _ in range(length - shared)]


def random_run(seed: int, scheduler_class: type[Scheduler] = Scheduler, moves: int = 50) -> World:
    """A random engine under random use, run to its end."""
    rng = Random(seed)
    world = World(Setup.random(rng), scheduler_class)

    def add() -> None:
        prompt = random_prompt(rng, rng.randint(1, rng.choice([2, 6, world.setup.max_model_len])))
        world.add(f"r{rng.randrange(10)}", prompt, rng.randint(1, 24), rng.random() < 0.1, rng.random() < 0.1)

    def disturb() -> None:
        if rng.random() < 0.5:
            add()
        for _ in range(rng.randint(0, 2)):
            if world.live:
                world.cancel(rng.randrange(len(world.live)))

    for _ in range(moves):
        kind = rng.random()
        if kind < 0.45:
            add()
        elif kind < 0.5 and world.live:
            world.cancel(rng.randrange(len(world.live)))
        elif kind < 0.85:
            world.step()
        elif kind < 0.97:
            world.step(meanwhile=disturb, drop_ended=rng.random() < 0.5)
        else:
            world.step(fail=True)
    world.drain()
    return world
