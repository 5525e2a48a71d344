"""From the bytes of a streamed answer to chunks. Runs after the measurement, so that parsing costs no latency."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from surefoot.bench.rawlog import Chunk, RequestLog


def events(parts: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """(time, data) of each server-sent event; the time is that of the read which completed it.

    Comments (lines that begin with a colon, sent as keep-alive) and other fields are dropped.
    """
    rest = b""
    for time, piece in parts:
        rest = (rest + piece).replace(b"\r\n", b"\n")
        while (end := rest.find(b"\n\n")) >= 0:
            block, rest = rest[:end], rest[end + 2 :]
            if (data := _data(block)) is not None:
                yield time, data
    if (data := _data(rest)) is not None:
        yield time, data


def _data(block: bytes) -> bytes | None:
    lines = [line[5:].lstrip(b" ") for line in block.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


class Reader:
    """Fills a `RequestLog` from events. Token counts of a chunk come from token ids or from running usage."""

    def __init__(self, log: RequestLog) -> None:
        self.log = log
        self._counted = 0  # output tokens by the last running usage
        self._texts: list[str] = []

    def read(self, parts: list[tuple[float, bytes]]) -> None:
        for time, data in events(parts):
            self.log.chunks.append(self._chunk(time, data))
        self.log.text = "".join(self._texts)

    def _chunk(self, time: float, data: bytes) -> Chunk:
        if data.strip() == b"[DONE]":
            return Chunk(time, len(data), None, "done")
        try:
            body = json.loads(data)
            kind, tokens, text = self._classify(body)
        except (ValueError, TypeError, AttributeError, IndexError, KeyError):
            self.log.error = self.log.error or f"an event that is no completion chunk: {_line(data)}"
            return Chunk(time, len(data), None, "error")
        self._texts.append(text)
        return Chunk(time, len(data), tokens, kind, len(text))

    def _classify(self, body: dict[str, Any]) -> tuple[str, int | None, str]:
        if body.get("error"):
            error = body["error"]
            message = error.get("message", error) if isinstance(error, dict) else error
            self.log.error = self.log.error or f"the server reports within the stream: {_line(str(message).encode())}"
            return "error", None, ""
        running = self._usage(body.get("usage"))
        choices = body.get("choices") or []
        if not choices:
            return ("usage" if body.get("usage") else "other"), None, ""
        choice = choices[0]
        self.log.finish_reason = choice.get("finish_reason") or self.log.finish_reason
        delta = choice.get("delta")
        source = choice if delta is None else delta
        text = source.get("text" if delta is None else "content") or ""
        thought = source.get("reasoning_content") or source.get("reasoning") or ""
        ids = choice.get("token_ids")
        tokens = len(ids) if isinstance(ids, list) else running
        if thought and not text:
            return "reasoning", tokens, thought
        if text or tokens or source.get("tool_calls"):
            return "text", tokens, text
        if choice.get("finish_reason"):
            return "finish", tokens, ""
        return ("role" if source.get("role") else "other"), tokens, ""

    def _usage(self, usage: dict[str, Any] | None) -> int | None:
        """Take the server's counts; returns the tokens since the last running usage."""
        if not usage:
            return None
        self.log.prompt_tokens = usage.get("prompt_tokens", self.log.prompt_tokens)
        count = usage.get("completion_tokens")
        details = usage.get("prompt_tokens_details") or {}
        self.log.cached_tokens = details.get("cached_tokens", self.log.cached_tokens)
        if count is None:
            return None
        self.log.output_tokens = count
        new, self._counted = count - self._counted, count
        return new


def _line(data: bytes) -> str:
    return " ".join(data.decode("utf-8", "replace").split())[:160]
