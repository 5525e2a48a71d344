"""Log-probabilities in the shapes of OpenAI's two APIs and of vLLM's `prompt_logprobs`."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from surefoot.core.outputs import TokenLogprob

LOWEST = -9999.0  # JSON has no -inf


class Pieces:
    """Text of single tokens. A token that is no whole UTF-8 text reads `bytes:\\xe4\\xbd`, as in OpenAI's API."""

    def __init__(self, tokenizer: Any | None):
        self._tokenizer = tokenizer
        self._cache: dict[int, tuple[str, bytes, bool]] = {}

    def _piece(self, token_id: int) -> tuple[str, bytes, bool]:
        piece = self._cache.get(token_id)
        if piece is None:
            piece = self._cache[token_id] = self._look_up(token_id)
        return piece

    def _look_up(self, token_id: int) -> tuple[str, bytes, bool]:
        if self._tokenizer is None:
            return f"token_id:{token_id}", b"", True
        data = self._tokenizer.token_bytes(token_id)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            text = "bytes:" + "".join(f"\\x{b:02x}" for b in data)
        if not data:  # an id beyond the tokenizer's vocabulary: the model's matrix is padded
            text = f"token_id:{token_id}"
        hidden = self._tokenizer.decode([token_id], skip_special_tokens=True) == ""
        return text, data, hidden

    def text(self, token_id: int, as_id: bool = False) -> str:
        return f"token_id:{token_id}" if as_id else self._piece(token_id)[0]

    def bytes_of(self, token_id: int) -> bytes:
        return self._piece(token_id)[1]

    def is_special(self, token_id: int) -> bool:
        """Whether the token leaves no trace in text that skips special tokens."""
        return self._piece(token_id)[2]


class Offsets:
    """Where in the answer's text each token begins, in characters. One object per choice, fed in order."""

    def __init__(self, pieces: Pieces, skip_special_tokens: bool):
        self._pieces = pieces
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.position = 0

    def next(self, token_id: int, known_text: str | None = None) -> int:
        """Offset of the token; with `known_text` (an echoed prompt) special tokens count only if they stand in it."""
        start = self.position
        if self._pieces.is_special(token_id):
            text = self._pieces.bytes_of(token_id).decode("utf-8", "replace")
            shown = not self._skip if known_text is None else known_text.startswith(text, start)
            self.position += len(text) if shown else 0
        else:
            self.position += len(self._decoder.decode(self._pieces.bytes_of(token_id)))
        return start


def clamp(logprob: float) -> float:
    return max(logprob, LOWEST)


def chat_logprobs(pieces: Pieces, entries: Sequence[TokenLogprob], k: int, as_ids: bool) -> dict[str, Any]:
    """`choices[].logprobs` of chat completions with k alternatives per token."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        data = list(pieces.bytes_of(token_id))
        return {"token": pieces.text(token_id, as_ids), "logprob": clamp(logprob), "bytes": data}

    content = [one(e.token_id, e.logprob) | {"top_logprobs": [one(t, lp) for t, lp in e.top[:k]]} for e in entries]
    return {"content": content, "refusal": None}


def completion_logprobs(
    pieces: Pieces,
    token_ids: Sequence[int],
    entries: Sequence[TokenLogprob | None],
    offsets: Sequence[int],
    k: int,
    as_ids: bool,
) -> dict[str, Any]:
    """`choices[].logprobs` of completions: parallel lists; the first prompt token has no entry (None)."""
    tops: list[dict[str, float] | None] = []
    for entry in entries:
        top: dict[str, float] = {}
        # most likely first and the first one wins, should two tokens read alike; the token itself is always there
        for token_id, logprob in (*entry.top[:k], (entry.token_id, entry.logprob)) if entry else ():
            top.setdefault(pieces.text(token_id, as_ids), clamp(logprob))
        tops.append(top if entry else None)
    return {
        "tokens": [pieces.text(t, as_ids) for t in token_ids],
        "token_logprobs": [None if e is None else clamp(e.logprob) for e in entries],
        "top_logprobs": tops,
        "text_offset": list(offsets),
    }


def vllm_prompt_logprobs(
    pieces: Pieces, entries: Sequence[TokenLogprob | None], k: int
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's `prompt_logprobs`: per prompt token {token id: {logprob, rank, decoded_token}}, None for the first."""
    table: list[dict[str, dict[str, Any]] | None] = []
    for entry in entries:
        if entry is None:
            table.append(None)
            continue
        ranked = {t: (lp, rank) for rank, (t, lp) in enumerate(entry.top[:k], start=1)}
        ranked[entry.token_id] = (entry.logprob, entry.rank)
        table.append(
            {
                str(t): {"logprob": clamp(lp), "rank": rank, "decoded_token": pieces.text(t)}
                for t, (lp, rank) in ranked.items()
            }
        )
    return table
