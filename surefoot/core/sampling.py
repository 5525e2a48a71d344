"""How the next token is chosen. Names and ranges follow vLLM and OpenAI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from surefoot.core.errors import InputError

MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings of one request. The default is greedy decoding.

    temperature: 0 means greedy; the other filters then have no effect, penalties and logit_bias still do.
    top_k: keep the k most likely tokens; 0 or -1 keeps all.  top_p: nucleus mass in (0, 1].
    min_p: drop tokens less likely than min_p x the most likely one.
    repetition_penalty: over prompt and output (as in transformers); presence/frequency: over output only (OpenAI).
    seed: draws depend on (seed, index of the output token) and nothing else; None takes a fresh random seed.
    logprobs / prompt_logprobs: number of top alternatives to report (0: only the token itself), None for none.
        Log-probabilities are those of the raw model distribution, before penalties and temperature.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for bad, message in self._complaints():
            if bad:
                raise InputError(message)

    def _complaints(self) -> list[tuple[bool, str]]:
        """Each (is wrong, what to say) pair. NaN fails every range check because the checks are written positively."""
        return [
            (not self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}"),
            (
                not 0 <= self.min_tokens <= self.max_tokens,
                f"min_tokens must lie in 0..max_tokens ({self.max_tokens}), got {self.min_tokens}",
            ),
            (not 0.0 <= self.temperature <= 100.0, f"temperature must lie in 0..100, got {self.temperature}"),
            (not self.top_k >= -1, f"top_k must be -1 or 0 (off) or a positive number, got {self.top_k}"),
            (not 0.0 < self.top_p <= 1.0, f"top_p must lie in (0, 1], got {self.top_p}"),
            (not 0.0 <= self.min_p <= 1.0, f"min_p must lie in 0..1, got {self.min_p}"),
            (
                not 0.0 < self.repetition_penalty <= 100.0,
                f"repetition_penalty must lie in (0, 100], got {self.repetition_penalty}",
            ),
            (
                not -2.0 <= self.presence_penalty <= 2.0,
                f"presence_penalty must lie in -2..2, got {self.presence_penalty}",
            ),
            (
                not -2.0 <= self.frequency_penalty <= 2.0,
                f"frequency_penalty must lie in -2..2, got {self.frequency_penalty}",
            ),
            (
                not all(-100.0 <= b <= 100.0 for b in self.logit_bias.values()),
                "each logit_bias value must lie in -100..100",
            ),
            (not all(t >= 0 for t in self.logit_bias), "each logit_bias key must be a token id (0 or more)"),
            (any(not s for s in self.stop), "a stop string must not be empty"),
            (
                self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS,
                f"logprobs must lie in 0..{MAX_LOGPROBS}, got {self.logprobs}",
            ),
            (
                self.prompt_logprobs is not None and not 0 <= self.prompt_logprobs <= MAX_LOGPROBS,
                f"prompt_logprobs must lie in 0..{MAX_LOGPROBS}, got {self.prompt_logprobs}",
            ),
        ]

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @cached_property
    def plain(self) -> bool:
        """Whether the most likely token is all that is ever wanted: greedy, no edit of logits, no log-probabilities."""
        penalised = self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty
        return self.greedy and self.logprobs is None and not (penalised or self.logit_bias or self.min_tokens)
