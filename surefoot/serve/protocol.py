"""Request bodies: OpenAI's fields plus vLLM's extensions that the engine can honour.

A field is honoured, harmless (it cannot change the answer), or refused by name: nothing is dropped silently.
`None` always means "not given".
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from starlette.concurrency import run_in_threadpool

from surefoot.serve.errors import ApiError

HARMLESS = {
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}

# Known fields that would change the answer and are not supported, with the values that ask for nothing special.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "logits_processors": ([],),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "truncate_prompt_tokens": (),
    "prompt_embeds": (),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": ([],),
    "spaces_between_special_tokens": (True,),
    "priority": (0,),
    "cache_salt": (),
}

# Names in chat_template_kwargs that are not the template's variables but would change how it is applied.
# NOTE: a template from a request could loop for ever (CVE-2025-61620 in vLLM).
TEMPLATE_RESERVED = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "self",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
}

INT64 = 2**63


def _complaint(message: str, param: str | None = None) -> PydanticCustomError:
    # NOTE: the message goes in through the context, because braces in a template would be taken for placeholders.
    return PydanticCustomError("surefoot", "{message}", {"message": message, "param": param})


def _clean_text(value: Any) -> Any:
    """Half a surrogate pair is legal JSON and not legal Unicode: no tokenizer can take it."""
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise _complaint("the text holds half of a surrogate pair, which is not valid Unicode") from None
    return value


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(t) is int for t in value)


def _prompts(value: Any) -> Any:
    """Any of OpenAI's four prompt shapes, as a list of strings and id lists."""
    prompts = [value] if isinstance(value, str) or (value and _is_ids(value)) else value
    if not isinstance(prompts, list) or not all(isinstance(p, str) or _is_ids(p) for p in prompts):
        raise _complaint("prompt must be a string, a list of strings, a list of token ids or a list of such lists")
    if not prompts or not all(p == "" or p for p in prompts):
        raise _complaint("the prompt is empty: give at least one token")
    return [_clean_text(p) for p in prompts]


def _strings(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_clean_text)]
Strings = Annotated[list[Text], BeforeValidator(_strings)]
Prompts = Annotated[list[Any], BeforeValidator(_prompts)]
Seed = Annotated[int, Field(ge=-INT64, lt=INT64)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    model: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_or_refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise _complaint("the request body must be a JSON object")
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in UNSUPPORTED:
                if value is not None and value not in UNSUPPORTED[name]:
                    raise _complaint(f"{name} is not supported by this server: leave it out", name)
            elif name not in HARMLESS:
                kept[name] = value
        return kept


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: with include_usage, counts until now in every chunk
    include_obfuscation: bool = False  # pads chunks against traffic analysis; the answer is the same without


class GenerationBody(Body):
    """What chat and plain completions share."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: Seed | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Strings | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise _complaint("stream_options needs stream: true", "stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise _complaint("prompt_logprobs cannot be combined with stream", "prompt_logprobs")
        return self

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def requested_max_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def requested_logprobs(self) -> int | None:
        raise NotImplementedError


class ContentPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One chat message. Tool calls of earlier turns are history that the chat template may render."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Annotated[Text, Field(min_length=1)]
    content: Text | list[ContentPart] | None = None
    name: Text | None = None
    refusal: Text | None = None
    reasoning_content: Text | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: Text | None = None

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it: tool arguments as objects, not as JSON in a string."""
        message = self.model_dump(exclude_none=True, exclude={"refusal"})
        for call in message.get("tool_calls", ()):
            function = call.get("function")
            if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                try:
                    function["arguments"] = json.loads(function["arguments"] or "{}")
                except ValueError:
                    raise ApiError("tool_calls: arguments must be a JSON object", param="messages") from None
        return message


class ChatFields(Body):
    messages: Annotated[list[Message], Field(min_length=1)]
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_template_kwargs(self) -> ChatFields:
        if reserved := sorted(TEMPLATE_RESERVED & set(self.chat_template_kwargs or {})):
            raise _complaint(f"chat_template_kwargs must not hold {reserved[0]!r}", "chat_template_kwargs")
        return self


class ChatCompletionRequest(ChatFields, GenerationBody):
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise _complaint("top_logprobs needs logprobs: true", "top_logprobs")
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise _complaint("max_tokens and max_completion_tokens differ: give one of them", "max_tokens")
        return self

    @property
    def requested_max_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def requested_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationBody):
    prompt: Prompts
    echo: bool | None = None
    best_of: int | None = None
    logprobs: int | None = None

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.num_choices:
            raise _complaint("best_of other than n is not supported by this server: leave it out", "best_of")
        return self

    @property
    def requested_logprobs(self) -> int | None:
        return self.logprobs


class TokenizeTextRequest(Body):
    prompt: Text
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(ChatFields):
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    tokens: list[int]


B = TypeVar("B", bound=BaseModel)


async def read_json(request: Request, limit: int) -> Any:
    """The parsed body; the content type is not asked for, as curl users forget it."""
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            chunks.append(chunk)
        elif size > 8 * limit:
            break  # until then the rest is read and dropped, so that the client gets to read the answer
    if size > limit:
        raise ApiError(f"the request body is longer than this server's limit of {limit} bytes", 413)
    data = b"".join(chunks)
    try:
        return json.loads(data) if size < 65536 else await run_in_threadpool(json.loads, data)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the request body is not valid JSON: {error}") from None


def validate(kind: type[B], data: Any) -> B:
    """The typed body, or one line that names the field."""
    try:
        return kind.model_validate(data)
    except ValidationError as errors:
        raise _api_error(errors) from None


def _api_error(errors: ValidationError) -> ApiError:
    found = errors.errors(include_url=False)
    # Of a union's several complaints the deepest one is about the branch that the client meant.
    first = max(found, key=lambda e: len([p for p in e["loc"] if isinstance(p, int)])) if len(found) > 1 else found[0]
    path = ".".join(str(p) for p in first["loc"] if not (isinstance(p, str) and ("[" in p or p == "str")))
    if first["type"] == "surefoot":
        return ApiError(first["ctx"]["message"], param=first["ctx"]["param"] or path or None)
    if first["type"] == "extra_forbidden":
        return ApiError(f"unknown field {path!r}: leave it out", param=path)
    if first["type"] == "missing":
        return ApiError(f"the field {path!r} is missing", param=path)
    message = first["msg"][0].lower() + first["msg"][1:]
    return ApiError(f"{path}: {message}", param=path)
