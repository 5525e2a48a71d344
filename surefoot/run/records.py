"""One line of a `--prompts` file, checked before any model is loaded. Torch-free.

{"id": "q1", "prompt": "What is the capital of France?", "max_tokens": 20}
{"messages": [{"role": "user", "content": "中国的首都是哪里?"}], "temperature": 0.7, "seed": 1}
{"prompt_token_ids": [1, 15, 27]}
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from surefoot.core.errors import InputError
from surefoot.core.sampling import SamplingParams

SOURCES = ("prompt", "messages", "prompt_token_ids")
INTEGERS = ("max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs")
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
BOOLEANS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")


@dataclass(frozen=True)
class Record:
    """A prompt in one of its three forms, with the sampling parameters in effect for it."""

    id: str | int
    params: SamplingParams
    where: str
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    prompt_token_ids: list[int] | None = None


def parse(line: str, where: str, number: int, defaults: SamplingParams) -> Record:
    """The record of one line. `where` is "file:line" and begins every complaint; `number` replaces an absent id."""
    try:
        data = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f'{where}: must be a JSON object like {{"prompt": "..."}}')
    try:
        given = [s for s in SOURCES if s in data]
        if len(given) != 1:
            raise InputError(f"needs exactly one of {', '.join(SOURCES)}; has {', '.join(given) or 'none'}")
        source = {given[0]: _source(given[0], data.pop(given[0]))}
        record_id = data.pop("id", number)
        if isinstance(record_id, bool) or not isinstance(record_id, str | int):
            raise InputError("id must be a string or an integer")
        fields = {name: _sampling(name, value) for name, value in data.items()}
        return Record(record_id, dataclasses.replace(defaults, **fields), where, **source)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _source(kind: str, value: Any) -> Any:
    if kind == "prompt":
        if not isinstance(value, str) or not value:
            raise InputError("prompt must be a text that is not empty")
        _check_text(value)
    elif kind == "messages":
        if not isinstance(value, list) or not value:
            raise InputError("messages must be a list that is not empty")
        for message in value:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
                raise InputError('each message must be an object with "role" and "content"')
            if isinstance(message["content"], str):
                _check_text(message["content"])
    elif not isinstance(value, list) or not value or not all(_is_int(t) and t >= 0 for t in value):
        raise InputError("prompt_token_ids must be a list of token ids that is not empty")
    return value


def _sampling(name: str, value: Any) -> Any:
    """The value of one sampling field, of the right type. Ranges are SamplingParams' own business."""
    if name in INTEGERS:
        return _expect(
            name,
            value,
            _is_int(value) or (value is None and name in ("seed", "logprobs", "prompt_logprobs")),
            "an integer",
        )
    if name in NUMBERS:
        return float(_expect(name, value, _is_number(value), "a number"))
    if name in BOOLEANS:
        return _expect(name, value, isinstance(value, bool), "true or false")
    if name == "stop":
        texts = [value] if isinstance(value, str) else value
        good = isinstance(texts, list) and all(isinstance(t, str) for t in texts)
        return tuple(_expect(name, texts, good, "a text or a list of texts"))
    if name == "stop_token_ids":
        good = isinstance(value, list) and all(_is_int(t) for t in value)
        return tuple(_expect(name, value, good, "a list of token ids"))
    if name == "logit_bias":
        good = isinstance(value, dict) and all(k.isascii() and k.isdigit() and _is_number(v) for k, v in value.items())
        return {int(k): float(v) for k, v in _expect(name, value, good, "an object of token id: number").items()}
    known = ", ".join((*INTEGERS, *NUMBERS, *BOOLEANS, "stop", "stop_token_ids", "logit_bias"))
    raise InputError(f"unknown field {name!r}; known are id, {', '.join(SOURCES)} and {known}")


def _expect(name: str, value: Any, good: bool, what: str) -> Any:
    if not good:
        raise InputError(f"{name} must be {what}, got {json.dumps(value, ensure_ascii=False)}")
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"the text has half a surrogate pair (character {error.start + 1})") from error
