"""A request as the engine sees it: token ids in, token ids out, and where it stands. Torch-free."""

from __future__ import annotations

import enum
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from surefoot.core.errors import InputError
from surefoot.core.sampling import SamplingParams


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """One sequence to extend (or, with `score=True`, to score and return).

    The scheduler owns `status`, `num_computed_tokens`, `num_cached_tokens`, `block_ids` and `state_slot`;
    the engine appends to `output_token_ids`; `sampler_state` is the sampler's. `num_computed_tokens` counts the tokens
    whose KV and recurrent state are in the cache; after preemption it falls back to 0 and prompt plus output are
    computed again.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: frozenset[int] = frozenset()
    score: bool = False
    arrival_time: float = field(default_factory=time.monotonic)

    output_token_ids: list[int] = field(default_factory=list)
    status: Status = Status.WAITING
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    state_slot: int | None = None
    sampler_state: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise InputError("the prompt is empty: give at least one token")

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def needs_prompt_logits(self) -> bool:
        """Whether logits are wanted at prompt positions; such a request cannot skip tokens by a prefix-cache hit."""
        return self.score or self.params.prompt_logprobs is not None

    def token_ids(self, start: int, end: int) -> Sequence[int]:
        """Tokens [start, end) of prompt followed by output."""
        n = len(self.prompt_token_ids)
        if end <= n:
            return self.prompt_token_ids[start:end]
        if start >= n:
            return self.output_token_ids[start - n : end - n]
        return self.prompt_token_ids[start:] + self.output_token_ids[: end - n]
