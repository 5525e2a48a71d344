"""Text from tokens that arrive one at a time; the pieces together are exactly what decoding all tokens at once gives.

A character can be split over tokens, so text is held back until it is final. Two ways:

- Byte-level BPE (Llama 3, Qwen, GPT): a token is a string of bytes, and an incremental UTF-8 decoder does the rest, in
  constant time per token.
- Everything else (SentencePiece with byte fallback, Metaspace, slow tokenizers): decode a short window twice, without
  and with the new tokens, and take what was added.

NOTE: tokenizers' own DecodeStream is no help for the second: it raises "Invalid prefix encountered" when byte tokens do
not form valid UTF-8, because then *all* bytes of the run turn into U+FFFD, also those already emitted as a character.
So a run of byte tokens is held back until it ends.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class DecodeStream(Protocol):
    """Token ids in, newly final text out."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str:
        """What is still held back; incomplete characters come out as U+FFFD. Ends the stream."""
        ...


class ByteLevelStream:
    """For tokenizers whose tokens are bytes: `token_bytes` gives b"" for tokens that are left out."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowStream:
    """For any other tokenizer. `_given`: the tokens last turned into text, as context; `_pending`: those not yet.

    `is_hidden(id)`: this token gives no text (a special token that is skipped; it does not end a run of bytes either).
    `is_open(id)`: the text of this token depends on its successors (a byte of a run).
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        is_hidden: Callable[[int], bool],
        is_open: Callable[[int], bool],
    ) -> None:
        self._decode = decode
        self._is_hidden = is_hidden
        self._is_open = is_open
        self._given: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        if self._is_hidden(token_id):
            return ""
        self._pending.append(token_id)
        return "" if self._is_open(token_id) else self._emit(final=False)

    def flush(self) -> str:
        return self._emit(final=True)

    def _emit(self, final: bool) -> str:
        before = self._decode(self._given)
        text = self._decode(self._given + self._pending)
        if len(text) <= len(before) or (text.endswith(REPLACEMENT) and not final):
            return ""
        self._given, self._pending = self._pending, []
        return text[len(before) :]
