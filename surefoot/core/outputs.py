"""What the engine hands back. Torch-free, so that servers and reports can hold on to it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TokenLogprob:
    """One token, its log-probability under the raw model distribution, its rank (1 = most likely), alternatives."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class RequestOutput:
    """What one engine step added to one request.

    `text` is the newly final text (bytes of an unfinished UTF-8 character and a possible beginning of a stop string
    are held back). `prompt_logprobs` is set once, with the first output; its first entry is None, because nothing
    predicts the first prompt token.
    """

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finished: bool = False
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0


@dataclass
class Completion:
    """A finished request, accumulated."""

    request_id: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    num_cached_tokens: int = 0
    ttft_s: float | None = None
    latency_s: float | None = None
