"""Continuous batching: which requests compute how many tokens in the next step. Torch-free.

There is one token budget per step and no prefill or decode mode: a request computes the tokens that it has and the
cache lacks, one in decode, many in prefill. Each step of the engine is

    step = scheduler.schedule()            # pages and slots are given out here
    zero step.state_resets, copy step.state_restores; forward; copy step.state_saves
    scheduler.advance(step)                # what the forward computed now counts, and can be shared
    for item in step.items:                # skip those whose request has been cancelled meanwhile
        if item.samples: append the sampled token to item.request.output_token_ids
        if the request is done (also: a score request whose item is final): scheduler.finish(item.request, reason)

Order is strictly first come, first served: `running` is in arrival order and everyone in it arrived before everyone in
`waiting`. When pages run out, the latest arrival is preempted: it loses its pages, goes back to the front of the queue
and computes prompt and output again later. Whoever arrived first always gets on, so the queue always moves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from surefoot.cache.pages import BlockPool, hash_block
from surefoot.cache.states import StatePool
from surefoot.core.errors import CapacityError, InputError
from surefoot.core.request import Request, Status


@dataclass(frozen=True, eq=False)
class Scheduled:
    """Tokens [start, end) of one request, to compute in this step.

    final: the last of them was the request's last known token, so that its logits give the next one.
    checkpoint: hash of the prefix up to `end`, if the state after this step is to be saved.
    """

    request: Request
    start: int
    num_new_tokens: int
    final: bool
    checkpoint: bytes | None = None

    @property
    def end(self) -> int:
        return self.start + self.num_new_tokens

    @property
    def samples(self) -> bool:
        """Whether a token is to be sampled from the last logits."""
        return self.final and not self.request.score


@dataclass(eq=False)
class Schedule:
    """One step. Items with a single token come first (`num_decodes` of them), as the batch wants them.

    state_resets: slots to zero before the forward.  state_restores: (checkpoint row, slot) to copy before it.
    state_saves: (slot, checkpoint row) to copy after it.
    preempted: who lost pages and slot to make this step possible.
    """

    items: list[Scheduled] = field(default_factory=list)
    state_resets: list[int] = field(default_factory=list)
    state_restores: list[tuple[int, int]] = field(default_factory=list)
    state_saves: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(item.num_new_tokens for item in self.items)

    @property
    def num_decodes(self) -> int:
        return sum(item.num_new_tokens == 1 for item in self.items)


class Scheduler:
    """Gives tokens, pages and slots to requests; owns every Request field that `core.request` assigns to it.

    max_num_seqs: most requests in one step.  max_num_batched_tokens: most tokens in one step.
    prefill_chunk_size: most tokens of one request in one step (None: only the budget limits it).
    state_pool: for models with linear-attention layers, else None.
    cacheable(request, end): whether the block ending at token `end` may be shared with other requests; for models whose
        keys depend on more than the tokens before them (length-dependent rope). False must stay False further right.
    """

    def __init__(
        self,
        block_pool: BlockPool,
        state_pool: StatePool | None = None,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        prefill_chunk_size: int | None = None,
        cacheable: Callable[[Request, int], bool] | None = None,
    ) -> None:
        self.block_pool = block_pool
        self.state_pool = state_pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.prefill_chunk_size = prefill_chunk_size or max_num_batched_tokens
        self.prefix_caching = block_pool.enable_caching and (state_pool is None or state_pool.num_checkpoints > 0)
        self._cacheable = cacheable or (lambda request, end: True)

        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._live: dict[str, Request] = {}
        self._checkpoint_ends: dict[str, list[int]] = {}  # by request id: where states are to be saved, ascending
        self._in_flight: Schedule | None = None
        self.num_preemptions = 0
        self.num_hit_tokens = 0
        self.num_query_tokens = 0

    # ---- requests come and go

    def length_limit(self, request: Request) -> int:
        """Prompt plus output tokens at which the request is over: max_tokens, or max_model_len if that comes first
        (the engine then ends it with finish_reason "length", as for max_tokens)."""
        if request.score:
            return request.num_prompt_tokens
        return min(request.num_prompt_tokens + request.params.max_tokens, self.max_model_len)

    def check(self, request: Request) -> None:
        """Refuse what can never run. prompt + max_tokens beyond max_model_len is no error, see `length_limit`."""
        prompt = request.num_prompt_tokens
        if prompt > self.max_model_len:
            raise InputError(
                f"the prompt has {prompt} tokens, max_model_len is {self.max_model_len}: "
                "shorten the prompt or raise max_model_len"
            )
        if prompt == self.max_model_len and not request.score:
            raise InputError(
                f"the prompt has {prompt} tokens and leaves no room for output in max_model_len {self.max_model_len}: "
                "shorten the prompt or raise max_model_len"
            )
        # The last output token is never computed, nothing follows it.
        tokens = self.length_limit(request) - (0 if request.score else 1)
        if self.block_pool.pages(tokens) > self.block_pool.num_usable:
            held = self.block_pool.num_usable * self.block_pool.block_size
            raise CapacityError(
                f"the request needs KV cache for {tokens} tokens, there is room for {held}: "
                "shorten the prompt, lower max_tokens or raise kv_cache_tokens"
            )

    def add(self, request: Request) -> None:
        """Queue a request; InputError or CapacityError if it can never run. Its id is free again once it is over."""
        if request.request_id in self._live:
            raise InputError(f"request id {request.request_id!r} is in use: choose another one")
        self.check(request)
        self._live[request.request_id] = request
        self.waiting.append(request)

    def finish(self, request: Request, reason: str) -> None:
        """End a request and free what it holds; no effect on one that is over already."""
        if request.status is Status.FINISHED:
            return
        (self.running if request.status is Status.RUNNING else self.waiting).remove(request)
        self._release(request)
        del self._live[request.request_id]
        request.status = Status.FINISHED
        request.finish_reason = reason

    def cancel(self, request_id: str) -> Request | None:
        """End a request by id, at any time between two calls; None if there is none of that id."""
        request = self._live.get(request_id)
        if request is not None:
            self.finish(request, "abort")
        return request

    def has_unfinished(self) -> bool:
        return bool(self._live)

    def stats(self) -> dict[str, int]:
        """Numbers of requests, pages, and tokens since the start; hit_tokens of query_tokens came from the cache."""
        return {
            "running": len(self.running),
            "waiting": len(self.waiting),
            "free_blocks": self.block_pool.num_free,
            "prefix_cache_hit_tokens": self.num_hit_tokens,
            "prefix_cache_query_tokens": self.num_query_tokens,
            "preemptions": self.num_preemptions,
        }

    # ---- one step

    def schedule(self) -> Schedule:
        """Choose the next step and give out the pages and slots that it needs. Empty only if nothing is unfinished."""
        if self._in_flight is not None:
            raise RuntimeError("the previous step has not been advanced")
        step = Schedule()
        budget = self._schedule_running(step)
        if not step.preempted:
            self._schedule_waiting(step, budget)
        if not step.items and self._live:
            raise RuntimeError("no request can get on")
        step.items.sort(key=lambda item: item.num_new_tokens > 1)
        if step.items:
            self._in_flight = step
        return step

    def advance(self, step: Schedule) -> None:
        """The forward of this step is done: count its tokens and make full blocks and saved states findable.

        Requests that ended since `schedule` are left out, so that a failed forward is undone by ending its requests
        and advancing.
        """
        if step.items and step is not self._in_flight:
            raise RuntimeError("this step is not the one that was scheduled last")
        self._in_flight = None
        for item in step.items:
            alive = item.request.status is Status.RUNNING
            if alive:
                item.request.num_computed_tokens = item.end
                self._register(item)
            if self.state_pool is not None and item.checkpoint is not None:
                settle = self.state_pool.commit_checkpoint if alive else self.state_pool.discard_checkpoint
                settle(item.checkpoint)
        if self.state_pool is not None:
            self.state_pool.unpin_all()

    def _schedule_running(self, step: Schedule) -> int:
        """Continue the running requests; returns what is left of the token budget."""
        budget = self.max_num_batched_tokens
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            if not self._grow(request, step):
                break
            budget -= self._place(request, budget, step)
            index += 1
        return budget

    def _schedule_waiting(self, step: Schedule, budget: int) -> None:
        """Admit waiting requests, in order, while tokens, sequences, pages and slots last."""
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            if not self._admit(request, step):
                break
            self.running.append(self.waiting.popleft())
            budget -= self._place(request, budget, step)

    def _place(self, request: Request, budget: int, step: Schedule) -> int:
        """Put the request's next tokens into the step; returns how many."""
        start = request.num_computed_tokens
        known = request.num_tokens
        if start >= known:
            raise RuntimeError(f"request {request.request_id!r} has nothing to compute: append a token or finish it")
        end = min(known, start + min(budget, self.prefill_chunk_size))
        end, checkpoint = self._cut_at_checkpoint(request, start, end, step)
        step.items.append(Scheduled(request, start, end - start, end == known, checkpoint))
        return end - start

    def _grow(self, request: Request, step: Schedule) -> bool:
        """Give a running request the page that its newest token may need, preempting later arrivals for it.

        If there is none later, the request waits in its place: whoever came before it either ends or preempts it.
        """
        missing = self.block_pool.pages(request.num_tokens) - len(request.block_ids)
        if missing <= 0:
            return True
        while (blocks := self.block_pool.allocate(missing)) is None:
            if self.running[-1] is request:
                return False
            self._preempt(self.running.pop(), step)
        request.block_ids += blocks
        return True

    def _admit(self, request: Request, step: Schedule) -> bool:
        """Give a waiting request the pages of all its tokens (so that a prefill never runs out halfway) and a slot."""
        if not self.block_pool.num_free or (self.state_pool is not None and not self.state_pool.num_free):
            return False
        hit, checkpoint_ends = self._match(request)
        self.block_pool.touch(hit)
        blocks = self.block_pool.allocate(self.block_pool.pages(request.num_tokens) - len(hit))
        if blocks is None:
            self.block_pool.free(hit)
            return False
        request.block_ids = hit + blocks
        request.num_computed_tokens = len(hit) * self.block_pool.block_size
        if request.status is Status.WAITING:
            request.num_cached_tokens = request.num_computed_tokens
        request.status = Status.RUNNING
        self.num_hit_tokens += request.num_computed_tokens
        self.num_query_tokens += request.num_tokens
        if self.state_pool is not None:
            self._checkpoint_ends[request.request_id] = checkpoint_ends
            request.state_slot = self.state_pool.allocate()
            if hit:
                source = self.state_pool.pin(request.block_hashes[len(hit) - 1])
                step.state_restores.append((source, request.state_slot))
            else:
                step.state_resets.append(request.state_slot)
        return True

    def _preempt(self, request: Request, step: Schedule) -> None:
        self._release(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        request.status = Status.PREEMPTED
        self.waiting.appendleft(request)
        self.num_preemptions += 1
        step.preempted.append(request)

    def _release(self, request: Request) -> None:
        self.block_pool.free(request.block_ids)
        request.block_ids = []
        self._checkpoint_ends.pop(request.request_id, None)
        if self.state_pool is not None and request.state_slot is not None:
            self.state_pool.free(request.state_slot)
        request.state_slot = None

    # ---- prefix caching

    def _match(self, request: Request) -> tuple[list[int], list[int]]:
        """Cached blocks to start from, and where to save states (token counts, ascending).

        At least one token is left to compute, for its logits. With recurrent layers a prefix is only usable where a
        state was saved. States are saved at the end of the prompt's last full block, for whoever continues this prompt,
        and where the keys matched beyond a saved state: there requests with a common beginning part ways.
        """
        if not self.prefix_caching or request.needs_prompt_logits:
            return [], []
        size = self.block_pool.block_size
        keys = self._hashes(request, (request.num_tokens - 1) // size)
        usable = 0
        while usable < len(keys) and self._cacheable(request, (usable + 1) * size):
            usable += 1
        hit = self.block_pool.match(keys[:usable])
        if self.state_pool is None:
            return hit, []
        ends = {len(hit), min((request.num_prompt_tokens - 1) // size, usable)}
        while hit and self.state_pool.lookup(keys[len(hit) - 1]) is None:
            hit.pop()
        return hit, [end * size for end in sorted(ends) if end > len(hit)]

    def _cut_at_checkpoint(self, request: Request, start: int, end: int, step: Schedule) -> tuple[int, bytes | None]:
        """End the chunk where a state is to be saved, if there is room for it; returns the end and the prefix hash."""
        if self.state_pool is None or request.state_slot is None:
            return end, None
        for boundary in self._checkpoint_ends.get(request.request_id, ()):
            if start < boundary <= end:
                key = request.block_hashes[boundary // self.block_pool.block_size - 1]
                row = self.state_pool.reserve_checkpoint(key)
                if row is not None:
                    step.state_saves.append((request.state_slot, row))
                    return boundary, key
        return end, None

    def _register(self, item: Scheduled) -> None:
        """Make the blocks that this item filled findable."""
        size = self.block_pool.block_size
        filled = range(item.start // size, item.end // size)
        if not self.prefix_caching or not filled:
            return
        keys = self._hashes(item.request, filled.stop)
        for index in filled:
            if not self._cacheable(item.request, (index + 1) * size):
                break
            self.block_pool.register(item.request.block_ids[index], keys[index])

    def _hashes(self, request: Request, num_blocks: int) -> list[bytes]:
        """Hashes of the first full blocks of prompt and output; each is computed once."""
        keys, size = request.block_hashes, self.block_pool.block_size
        while len(keys) < num_blocks:
            start = len(keys) * size
            keys.append(hash_block(keys[-1] if keys else None, request.token_ids(start, start + size)))
        return keys[:num_blocks]
