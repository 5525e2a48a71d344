"""From request fields to `SamplingParams`: the request, then the model's generation_config, then OpenAI's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from surefoot.core.errors import InputError
from surefoot.core.sampling import SamplingParams
from surefoot.serve.errors import ApiError
from surefoot.serve.protocol import INT64, CompletionRequest, GenerationBody

OPENAI_DEFAULTS: dict[str, float | int] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
FROM_GENERATION_CONFIG = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
PASSED_THROUGH = (
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
)


def sampling_defaults(policy: str, tokenizer: Any | None) -> dict[str, Any]:
    """Sampling values for fields that a request leaves out; `policy` is a ServeSettings.generation_defaults."""
    defaults: dict[str, Any] = dict(OPENAI_DEFAULTS)
    if policy == "model" and tokenizer is not None:
        recommended = tokenizer.generation_defaults
        given = {k: recommended[k] for k in FROM_GENERATION_CONFIG if recommended.get(k) is not None}
        if recommended.get("do_sample") is False:
            # transformers decodes such a model greedily and ignores its temperature, top_p and top_k
            given = {k: v for k, v in given.items() if k == "repetition_penalty"} | {"temperature": 0.0}
        defaults |= given
    return defaults


def sampling_params(
    body: GenerationBody, defaults: Mapping[str, Any], prompt_len: int, max_model_len: int, vocab_size: int
) -> SamplingParams:
    """The parameters of the first choice. `max_tokens` 0 (score the prompt only) runs as 1; see `scores_only`."""
    fields: dict[str, Any] = dict(defaults)
    for name in (*FROM_GENERATION_CONFIG, *PASSED_THROUGH):
        if (value := getattr(body, name)) is not None:
            fields[name] = value
    if fields["top_k"] > vocab_size:
        fields["top_k"] = vocab_size
    fields["max_tokens"] = max_tokens(body, prompt_len, max_model_len)
    fields["logit_bias"] = logit_bias(body, vocab_size)
    fields["stop"] = tuple(body.stop or ())
    fields["stop_token_ids"] = tuple(check_ids(body.stop_token_ids or [], vocab_size, "stop_token_ids"))
    fields["logprobs"] = None if scores_only(body) else body.requested_logprobs
    fields["prompt_logprobs"] = prompt_logprobs(body)
    try:
        return SamplingParams(**fields)
    except InputError as error:
        message = str(error)
        name = message.split(maxsplit=1)[0]
        if name == "max_tokens" and getattr(body, "max_completion_tokens", None) is not None:
            name = "max_completion_tokens"
        elif name == "logprobs" and "top_logprobs" in type(body).model_fields:
            name, message = "top_logprobs", f"top_{message}"
        raise ApiError(message, param=name if name in type(body).model_fields else None) from None


def for_choice(params: SamplingParams, choice: int) -> SamplingParams:
    """The parameters of choice 0..n-1: its own seed; what is asked about the prompt is asked once."""
    if choice == 0:
        return params
    seed = None if params.seed is None else (params.seed + choice + INT64) % (2 * INT64) - INT64
    return replace(params, seed=seed, prompt_logprobs=None)


def scores_only(body: GenerationBody) -> bool:
    """max_tokens 0 with something asked about the prompt: score it, generate nothing."""
    if body.requested_max_tokens != 0:
        return False
    return bool(getattr(body, "echo", False)) or body.prompt_logprobs is not None


def max_tokens(body: GenerationBody, prompt_len: int, max_model_len: int) -> int:
    """What was asked for; else 16 for completions (OpenAI's default) and whatever fits for chat."""
    asked, room = body.requested_max_tokens, max_model_len - prompt_len
    wanted = 1 if asked is None or scores_only(body) else asked
    if wanted > room:
        tail = f" and max_tokens is {asked}" if asked else ""
        raise ApiError(
            f"this model's maximum context length is {max_model_len} tokens; the prompt has {prompt_len}{tail}: "
            "shorten the prompt or ask for fewer tokens",
            param="prompt" if isinstance(body, CompletionRequest) else "messages",
            code="context_length_exceeded",
        )
    if asked is None:
        wanted = min(16, room) if isinstance(body, CompletionRequest) else room
        return max(wanted, min(body.min_tokens or 0, room))
    return wanted


def prompt_logprobs(body: GenerationBody) -> int | None:
    """Alternatives wanted per prompt token, for `prompt_logprobs` and for `echo` with `logprobs`."""
    echoed = body.requested_logprobs if getattr(body, "echo", False) else None
    wanted = [k for k in (body.prompt_logprobs, echoed) if k is not None]
    return max(wanted) if wanted else None


def logit_bias(body: GenerationBody, vocab_size: int) -> dict[int, float]:
    biases = {}
    for key, value in (body.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit()):
            raise ApiError(f"each logit_bias key must be a token id, got {key!r}", param="logit_bias")
        biases[int(key)] = value
    check_ids(list(biases), vocab_size, "logit_bias")
    return biases


def check_ids(ids: list[int], vocab_size: int, param: str) -> list[int]:
    bad = next((t for t in ids if not 0 <= t < vocab_size), None)
    if bad is not None:
        raise ApiError(f"token id {bad} does not exist: ids lie in 0..{vocab_size - 1}", param=param)
    return ids
