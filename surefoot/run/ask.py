"""One answer: from text to token ids, streamed back to a terminal, with the figures that belong to it.

Time to first token runs from handing the request to the engine to its first token. Decode speed is
(n - 1) / (time of last token - time of first token) for n output tokens: it leaves the prompt out, and an answer of one
token has none.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from surefoot.core.errors import InputError
from surefoot.core.outputs import TokenLogprob
from surefoot.core.sampling import SamplingParams

if TYPE_CHECKING:
    from surefoot.engine.engine import Engine

Write = Callable[[str], None]


@dataclass(frozen=True)
class Style:
    """How text becomes a prompt: the system message, no template at all (`raw`), variables for the template."""

    system: str | None = None
    raw: bool = False
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, system: str | None, raw: bool, chat_template_kwargs: str | None) -> Style:
        if raw and (system is not None or chat_template_kwargs is not None):
            raise InputError("--system and --chat-template-kwargs belong to the chat template, which --raw leaves out")
        try:
            kwargs = json.loads(chat_template_kwargs or "{}")
        except json.JSONDecodeError as error:
            raise InputError(f"--chat-template-kwargs is not valid JSON: {error}") from error
        if not isinstance(kwargs, dict):
            raise InputError("--chat-template-kwargs must be a JSON object, like '{\"enable_thinking\": false}'")
        return cls(system, raw, kwargs)

    def messages(self, *turns: dict[str, Any]) -> list[dict[str, Any]]:
        return [*([{"role": "system", "content": self.system}] if self.system is not None else []), *turns]


@dataclass
class Answer:
    """One finished answer and its times (seconds on the monotonic clock)."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    postponed_s: float = 0.0
    finish_reason: str | None = None
    started: float = 0.0
    first: float | None = None
    last: float | None = None

    @property
    def ttft_s(self) -> float | None:
        return None if self.first is None else self.first - self.started

    @property
    def decode_tokens_per_s(self) -> float | None:
        if self.first is None or self.last is None or self.last <= self.first:
            return None
        return (len(self.token_ids) - 1) / (self.last - self.first)


def check_prompt(text: str) -> str:
    """Refuse what no tokenizer can take, before a model is loaded for it."""
    if not text:
        raise InputError("the prompt is empty: write some text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt is not valid UTF-8 (character {error.start + 1})") from error
    return text


def read_stdin() -> str:
    """The prompt from a pipe, without the newline that `echo` adds."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt on stdin is not valid UTF-8 (byte {error.start + 1})") from error
    if not text.strip():
        raise InputError("no prompt: give one as an argument or through a pipe, or run in a terminal to chat")
    return text.removesuffix("\n").removesuffix("\r")


def tokenizer_of(engine: Engine) -> Any:
    if engine.tokenizer is None:
        raise InputError('this model has no tokenizer: use --prompts with {"prompt_token_ids": [...]} lines')
    return engine.tokenizer


def encode_messages(engine: Engine, messages: list[dict[str, Any]], style: Style) -> list[int]:
    tokenizer = tokenizer_of(engine)
    if not tokenizer.has_chat_template:
        raise InputError("this model has no chat template: give a plain prompt instead of messages or --system")
    return tokenizer.encode_chat(messages, **style.template_kwargs)


def encode_prompt(engine: Engine, prompt: str, style: Style) -> list[int]:
    """Token ids of one prompt: as a user's message where the model has a chat template, else (or if `raw`) as it is."""
    if uses_template(engine, style):
        return encode_messages(engine, style.messages({"role": "user", "content": prompt}), style)
    return tokenizer_of(engine).encode(prompt)


def uses_template(engine: Engine, style: Style) -> bool:
    tokenizer = tokenizer_of(engine)
    return not style.raw and (tokenizer.has_chat_template or style.system is not None)


def stream(
    engine: Engine,
    token_ids: list[int],
    params: SamplingParams,
    write: Write,
    stopped: Callable[[], bool] = lambda: False,
) -> Answer:
    """Run one request to its end, writing its text as it becomes final; `stopped` is asked between steps."""
    answer = Answer(num_prompt_tokens=len(token_ids), started=time.monotonic())
    before = engine.postponed.seconds
    request_id = engine.add_request(token_ids, params)
    while answer.finish_reason is None:
        if stopped():
            engine.cancel(request_id)
            answer.finish_reason = "stopped by you"
            break
        for output in engine.step():
            if output.request_id == request_id:
                add(answer, output)
                if output.text:
                    write(output.text)
    while engine.has_unfinished():  # a cancelled request leaves within a step
        engine.step()
    answer.postponed_s = engine.postponed.seconds - before
    return answer


def add(answer: Answer, output: Any) -> None:
    """Take one RequestOutput into the answer."""
    now = time.monotonic()
    if output.token_ids:
        answer.first = now if answer.first is None else answer.first
        answer.last = now
    answer.text += output.text
    answer.token_ids += output.token_ids
    answer.logprobs += output.logprobs or []
    answer.prompt_logprobs += output.prompt_logprobs or []
    answer.num_cached_tokens = max(answer.num_cached_tokens, output.num_cached_tokens)
    if output.finished:
        answer.finish_reason = output.finish_reason or "stop"


def run(engine: Engine, prompt: str, params: SamplingParams, style: Style) -> None:
    """One prompt: the answer to stdout as it comes, one line of figures to stderr."""
    answer = stream(engine, encode_prompt(engine, prompt, style), params, _to_stdout)
    _to_stdout("\n")
    if params.logprobs is not None:
        print(logprob_table(engine, answer), file=sys.stderr)
    print(summary(engine, answer, "chat" if uses_template(engine, style) else "none"), file=sys.stderr)


def summary(engine: Engine, answer: Answer, template: str) -> str:
    """The figures: tokens and why they ended, time to first token, decode speed, device, scheme and dtype, template."""
    speed = answer.decode_tokens_per_s
    decode = "decode -" if speed is None else f"decode {speed:.1f} tok/s = (n - 1) / (last - first token)"
    if speed is not None and answer.postponed_s > 0.05:
        decode += f", while weights moved into memory for {answer.postponed_s:.1f} s"
    ttft = "-" if answer.ttft_s is None else f"{answer.ttft_s:.3f} s"
    cached = f", {answer.num_cached_tokens} cached" if answer.num_cached_tokens else ""
    parts = [
        f"{answer.num_prompt_tokens} prompt{cached} + {len(answer.token_ids)} output tokens ({answer.finish_reason})",
        f"first token {ttft}",
        decode,
        engine.info.device,
        engine.info.precision,
        f"template {template}",
    ]
    return " | ".join(parts)


def logprob_table(engine: Engine, answer: Answer) -> str:
    """One line per output token: its log-probability and rank, then the alternatives."""
    text = tokenizer_of(engine).token_text
    lines = ["logprob  rank  token  (alternatives)"]
    for entry in answer.logprobs:
        top = "  ".join(f"{text(t)!r} {p:.3f}" for t, p in entry.top)
        lines.append(f"{entry.logprob:7.3f}  {entry.rank:4d}  {text(entry.token_id)!r}" + (f"  ({top})" if top else ""))
    return "\n".join(lines)


def _to_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
