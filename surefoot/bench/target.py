"""What the server can do, found out by asking before anything is measured, and request bodies made to fit.

Fields beyond OpenAI's are sent only if the server takes them: `ignore_eos` (answers of exact length) and
`return_token_ids` (tokens counted per chunk). Never `min_tokens`, which makes some servers mask logits in a slow path.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

from surefoot.backends.http import HttpBackend, RefusedError
from surefoot.bench.workload import Ask, random_ids
from surefoot.core.errors import InputError

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
FILLER = (
    "A climber tests each hold before putting weight on it. The rock was warm in the afternoon and cold before dawn; "
    "seven people, two ropes and one map went up the north side while rivers below turned silver, green, then grey. "
)
EXTRAS: tuple[dict[str, Any], ...] = ({"ignore_eos": True, "return_token_ids": True}, {"ignore_eos": True}, {})
WORDS = FILLER.replace(";", "").replace(",", "").replace(".", "").lower().split()
TRIES = 48


@dataclass
class Target:
    """One model of one server behind one endpoint. Build it with `open_target`."""

    backend: HttpBackend
    endpoint: str
    extras: dict[str, Any]
    takes_ids: bool
    pool: list[int]
    temperature: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def path(self) -> str:
        return PATHS[self.endpoint]

    def info(self) -> dict[str, Any]:
        """What the server says of itself, without asking it for more."""
        card = self.backend.card
        known = {k: card[k] for k in ("root", "owned_by", "dtype", "device", "max_model_len") if k in card}
        return {"backend": "http", "url": self.backend.url, "model": self.backend.model} | known

    def body(self, ask: Ask, max_tokens: int) -> bytes:
        body: dict[str, Any] = {"model": self.backend.model, "stream": True, "temperature": self.temperature}
        body["stream_options"] = {"include_usage": True}
        if self.endpoint == "chat":
            body["messages"] = ask.messages
        else:
            body["prompt"] = ask.token_ids if ask.token_ids is not None else ask.text
        return json.dumps(body | {"max_tokens": max_tokens} | self.extras, ensure_ascii=False).encode()

    def exact(self, length: int, draw: random.Random, ids: list[int] | None = None) -> Ask:
        """A prompt of exactly `length` tokens: token ids, or text that the server's own tokenizer measures."""
        if self.endpoint == "completions" and self.takes_ids:
            return Ask(token_ids=ids or random_ids(self.pool, length, draw), tokens=length)
        return self._exact_text(length, draw)

    def _exact_text(self, length: int, draw: random.Random) -> Ask:
        """Words, added and dropped until the server counts `length`; their sizes differ, so the search ends."""
        words = [draw.choice(WORDS) for _ in range(length)]
        size = 0
        for _ in range(TRIES):
            text = " ".join(words)
            chat = self.endpoint == "chat"
            ask = Ask(messages=[{"role": "user", "content": text}], tokens=length) if chat else Ask(text, tokens=length)
            size = self._measure(ask)
            if size == length:
                return ask
            each = max(1.0, size / len(words))  # tokens per word, about
            if size > length:
                del words[max(1, len(words) - max(1, int((size - length) / each))) :]
                words[-1] = draw.choice(WORDS)
            else:
                words += [draw.choice(WORDS) for _ in range(max(1, int((length - size) / each)))]
        raise InputError(
            f"no prompt of exactly {length} tokens found (nearest {size}, template included): ask for more"
        )

    def _measure(self, ask: Ask) -> int:
        try:
            return len(self.backend.tokenize(ask.messages if ask.messages is not None else ask.text or ""))
        except RefusedError:
            raise InputError(
                f"{self.backend.url} takes neither token ids nor /tokenize: no prompts of an exact length, "
                "use --prompts FILE"
            ) from None


def open_target(
    url: str,
    model: str | None = None,
    api_key: str | None = None,
    endpoint: str = "completions",
    timeout: float = 120.0,
    temperature: float = 0.0,
) -> Target:
    """Reach the server and find out what it takes; every failure is one line."""
    if endpoint not in PATHS:
        raise InputError(f"unknown endpoint {endpoint!r}: choose {' or '.join(PATHS)}")
    backend = HttpBackend(url, model, api_key, timeout=timeout)
    pool = _pool(backend)
    takes_ids = False
    if endpoint == "completions":
        takes_ids = _takes_ids(backend, pool or [3, 4, 5, 6])
    extras, notes = _extras(backend, endpoint, (pool or [3, 4, 5, 6])[:4] if takes_ids else "The")
    if not pool:
        notes.append("no /tokenize: random prompts use token ids 3 to 255")
    return Target(backend, endpoint, extras, takes_ids, pool or list(range(3, 256)), temperature, notes)


def _pool(backend: HttpBackend) -> list[int]:
    """Ids of ordinary tokens."""
    try:
        return sorted(set(backend.tokenize(FILLER)[1:]))
    except RefusedError:
        return []


def _takes_ids(backend: HttpBackend, ids: list[int]) -> bool:
    prompt = ids[:4]
    try:
        return backend.ask(prompt, 1).prompt_tokens in (None, len(prompt))
    except RefusedError:
        return False


def _extras(backend: HttpBackend, endpoint: str, prompt: str | list[int]) -> tuple[dict[str, Any], list[str]]:
    notes: list[str] = []
    for extras in EXTRAS:
        try:
            if endpoint == "chat":
                backend.chat([{"role": "user", "content": "Hi"}], 1, extras)
            else:
                backend.ask(prompt, 1, extras)
        except RefusedError as error:
            if not extras:
                raise InputError(str(error)) from None
            continue
        if "ignore_eos" not in extras:
            notes.append("the server does not take ignore_eos: answers end where the model ends them")
        if "return_token_ids" not in extras:
            notes.append("the server does not name token ids: tokens per chunk are unknown, the sum is its usage")
        return extras, notes
    raise AssertionError("unreachable")
