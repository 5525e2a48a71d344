"""The raw log of a server benchmark: one record per request with every chunk, from which all metrics are computed.

Times are seconds of this machine's monotonic clock. A chunk is one server-sent event:

    role        opens the answer, carries no token          usage   token counts, no choice
    reasoning   thinking text                               finish  says why the answer ended, carries no token
    text        answer text, or token ids without text yet  done    "[DONE]"
    error       an error object inside the stream           other   anything else
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from surefoot.core.errors import InputError

TOKEN_KINDS = ("text", "reasoning")


@dataclass(frozen=True)
class Chunk:
    """One event: when its last byte was read, its bytes, its tokens (None where the server does not say), its kind."""

    time: float
    bytes: int
    tokens: int | None
    kind: str
    chars: int = 0

    @property
    def carries_token(self) -> bool:
        return self.kind in TOKEN_KINDS


@dataclass
class RequestLog:
    """One request. scheduled: when it was due; sent: when its bytes were handed to the socket (connected before).

    prompt_tokens, output_tokens: as the server counts them (usage), None if it does not.
    error: one line; a request with an error may have chunks from before it broke.
    """

    id: int
    point: int = 0
    phase: str = "measured"
    asked_prompt_tokens: int | None = None
    asked_output_tokens: int | None = None
    scheduled: float = 0.0
    sent: float = 0.0
    ended: float = 0.0
    status: int | None = None
    error: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    text: str = ""
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.error is None and self.first_token is not None

    @property
    def token_chunks(self) -> list[Chunk]:
        return [c for c in self.chunks if c.carries_token]

    @property
    def first_token(self) -> Chunk | None:
        return next((c for c in self.chunks if c.carries_token), None)

    @property
    def num_output_tokens(self) -> int:
        """The server's count; else what the chunks name; else one token per chunk (`counted_by` says which)."""
        if self.output_tokens is not None:
            return self.output_tokens
        return sum(1 if c.tokens is None else c.tokens for c in self.token_chunks)

    @property
    def counted_by(self) -> str:
        if self.output_tokens is not None:
            return "usage"
        return "token ids" if all(c.tokens is not None for c in self.token_chunks) else "chunks"

    def as_dict(self) -> dict[str, Any]:
        record = {k: v for k, v in asdict(self).items() if k != "chunks"}
        return record | {"chunks": [[c.time, c.bytes, c.tokens, c.kind, c.chars] for c in self.chunks]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RequestLog:
        known = {k: v for k, v in data.items() if k in cls.__dataclass_fields__ and k != "chunks"}
        return cls(**known, chunks=[Chunk(*row) for row in data.get("chunks", [])])


def read(path: Path) -> Iterator[RequestLog]:
    """The request records of a raw file; other records (header, steps) are passed over."""
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                data = json.loads(line)
                if data.get("record") == "request":
                    yield RequestLog.from_dict(data)
            except (ValueError, TypeError, AttributeError) as error:
                raise InputError(f"{path}:{number}: not a record of a raw log ({error})") from None


def measured(logs: Iterable[RequestLog], point: int | None = None) -> list[RequestLog]:
    return [log for log in logs if log.phase == "measured" and point in (None, log.point)]
