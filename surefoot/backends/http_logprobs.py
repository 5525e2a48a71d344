"""Log-probabilities in the shapes that servers report them, read back into `TokenLogprob`.

Prompts: vLLM's `prompt_logprobs` (a table by token id), or OpenAI's `echo` (parallel lists). Outputs: the lists of
/v1/completions, or the entries of /v1/chat/completions. Tokens may come as ids, as "token_id:7", or as text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from surefoot.core.outputs import TokenLogprob

LOWEST = -9000.0  # JSON has no -inf: servers write -9999


class TokenNames:
    """Token strings to ids, where that is unambiguous. `tokenizer`: a weights.tokenizer.Tokenizer or None."""

    def __init__(self, tokenizer: Any | None, vocab_size: int = 0):
        self.tokenizer = tokenizer
        self.vocab_size = max(vocab_size, tokenizer.vocab_size if tokenizer is not None else 0)

    @cached_property
    def _of_bytes(self) -> dict[bytes, int | None]:
        """None for what several tokens are called."""
        table: dict[bytes, int | None] = {}
        for token_id in range(self.vocab_size if self.tokenizer is not None else 0):
            data = self.tokenizer.token_bytes(token_id)  # type: ignore[union-attr]
            table[data] = None if data in table else token_id
        table.pop(b"", None)
        return table

    def id_of(self, token: Any, data: Any = None) -> int | None:
        """`data`: the token's bytes as a list of numbers, where the server gives them."""
        if isinstance(token, int) and not isinstance(token, bool):
            return token
        if not isinstance(token, str):
            return None
        if token.startswith("token_id:"):
            number = token.removeprefix("token_id:")
            return int(number) if number.isdigit() else None
        if isinstance(data, list) and data:
            return self._of_bytes.get(bytes(data))
        return None if "\ufffd" in token else self._of_bytes.get(token.encode("utf-8", "replace"))

    def spell(self, ids: Sequence[int], text: str) -> bool:
        """Whether these tokens can be the text: servers strip spaces, and leave out the last, stopping token."""
        if self.tokenizer is None:
            return True
        return any(self.text_of(part).strip() == text.strip() for part in (ids, ids[:-1]))

    def text_of(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids) if self.tokenizer is not None else ""

    def ids_of(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False) if self.tokenizer is not None else []


def prompt_entries(body: dict[str, Any], ids: Sequence[int], names: TokenNames) -> list[TokenLogprob | None] | None:
    """Entries of the prompt `ids` from an answer, or None if it does not hold them."""
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    table = choice.get("prompt_logprobs") or body.get("prompt_logprobs")
    if isinstance(table, list) and len(table) == len(ids):
        found = [_from_table(row, token) for row, token in zip(table[1:], ids[1:])]
    else:
        lists = choice.get("logprobs")
        if not isinstance(lists, dict) or not isinstance(lists.get("token_logprobs"), list):
            return None
        told = [names.id_of(t) for t in lists.get("tokens") or []]
        values, tops = lists["token_logprobs"], lists.get("top_logprobs") or []
        # An echo of the prompt comes first; without one there are only the generated tokens.
        if len(values) < len(ids) or any(t not in (None, i) for t, i in zip(told, ids)):
            return None
        rows = zip(ids[1:], values[1:], [*tops, *[None] * len(ids)][1:])
        found = [_entry(token, value, _pairs(top, names)) for token, value, top in rows]
    return None if any(e is None for e in found) else [None, *found]


def _from_table(row: Any, token: int) -> TokenLogprob | None:
    """One position of vLLM's `prompt_logprobs`: {"7": {"logprob": -1.5, "rank": 2}, ...}."""
    if not isinstance(row, dict) or not isinstance(row.get(str(token)), dict):
        return None
    own = row[str(token)]
    others = [(int(t), float(v["logprob"])) for t, v in row.items() if _is_number(v.get("logprob"))]
    entry = _entry(token, own.get("logprob"), others)
    if entry is None or not own.get("rank"):
        return entry
    return TokenLogprob(token, entry.logprob, int(own["rank"]), entry.top)


def output_entries(logprobs: Any, names: TokenNames, text: str) -> list[TokenLogprob] | None:
    """Entries of the greedily generated tokens of `text`, or None if there are none or if a token cannot be told.

    NOTE: mlx-lm (0.32) names, beside its alternatives, any one of them as the token. Such entries are read as being
    about the most likely alternative, which is the one that greedy decoding took.
    """
    if not isinstance(logprobs, dict):
        return None
    found: list[TokenLogprob | None] = []
    if isinstance(logprobs.get("content"), list):
        for item in logprobs["content"]:
            token = _told(item, names)
            tops = [(_told(t, names), t.get("logprob")) for t in item.get("top_logprobs") or []]
            pairs = [(t, float(v)) for t, v in tops if t is not None and _is_number(v)]
            found.append(None if token is None else _entry(token, item.get("logprob"), pairs))
    elif isinstance(logprobs.get("tokens"), list):
        lists = (logprobs["tokens"], logprobs.get("token_logprobs") or [], logprobs.get("top_logprobs") or [])
        for name, value, top in zip(lists[0], lists[1], [*lists[2], *[None] * len(lists[0])]):
            token = names.id_of(name)
            found.append(None if token is None else _entry(token, value, _pairs(top, names)))
    entries = [e for e in found if e is not None]
    if not entries or len(entries) != len(found):
        return None
    if names.spell([e.token_id for e in entries], text):
        return entries
    likeliest = [TokenLogprob(*e.top[0], 1, e.top) for e in entries if e.top]
    return likeliest if names.spell([e.token_id for e in likeliest], text) else None


def _told(item: dict[str, Any], names: TokenNames) -> int | None:
    return item["id"] if isinstance(item.get("id"), int) else names.id_of(item.get("token"), item.get("bytes"))


def _pairs(top: Any, names: TokenNames) -> list[tuple[int, float]]:
    """A table of alternatives by token; those whose id cannot be told are left out."""
    told = [(names.id_of(t), v) for t, v in top.items()] if isinstance(top, dict) else []
    return [(t, float(v)) for t, v in told if t is not None and _is_number(v)]


def _entry(token: int, value: Any, others: Iterable[tuple[int, float]]) -> TokenLogprob | None:
    if not _is_number(value):
        return None
    logprob = _floored(float(value))
    top = sorted(((t, _floored(v)) for t, v in others), key=lambda pair: -pair[1])
    known = any(t == token for t, _ in top)
    rank = 1 + sum(v > logprob for _, v in top) if known else 0
    return TokenLogprob(token, logprob, rank, tuple(top))


def _floored(value: float) -> float:
    return float("-inf") if value <= LOWEST else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
