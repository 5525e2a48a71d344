"""Prompts and traces: what is asked. Exact token lengths, a file of prompts, or the lengths and times of a trace.

Random prompts differ from each other from the first token on, so that no server can answer them from its prefix cache;
only the Mooncake form names shared blocks (`hash_ids`), which become equal tokens here.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from surefoot.core.errors import InputError

MOONCAKE_BLOCK = 512  # tokens per hash id
CSV_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
TEXT_KEYS = ("prompt", "text", "question", "turns")


@dataclass(frozen=True)
class Ask:
    """One request to make. Exactly one of text, messages and token_ids; tokens: prompt length if known beforehand."""

    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    token_ids: list[int] | None = None
    tokens: int | None = None
    max_tokens: int | None = None
    at: float | None = None


@dataclass(frozen=True)
class TraceRow:
    """A request of a trace: seconds after the first one, lengths in tokens, shared blocks if named."""

    at: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()


def random_ids(pool: list[int], length: int, draw: random.Random) -> list[int]:
    return draw.choices(pool, k=length)


def trace_ids(row: TraceRow, pool: list[int], draw: random.Random) -> list[int]:
    """Tokens of a trace row: equal hash ids give equal blocks, the rest is random."""
    ids: list[int] = []
    for hash_id in row.hash_ids:
        ids += random_ids(pool, MOONCAKE_BLOCK, random.Random(hash_id))
    ids = ids[: row.prompt_tokens]
    return ids + random_ids(pool, row.prompt_tokens - len(ids), draw)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from ((n, line) for n, line in enumerate(file, 1) if line.strip())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None


# ---- prompts


def read_prompts(path: Path, chat: bool) -> list[Ask]:
    """A prompt a line, or JSONL with prompt, text, question, turns, messages or prompt_token_ids (and max_tokens)."""
    asks = [_prompt(line.strip(), f"{path}:{number}", path.suffix == ".jsonl", chat) for number, line in _lines(path)]
    if not asks:
        raise InputError(f"{path} holds no prompt")
    return asks


def _prompt(line: str, where: str, is_json: bool, chat: bool) -> Ask:
    if not is_json:
        return _ask(line, None, chat)
    try:
        data = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f'{where}: must be a JSON object like {{"prompt": "..."}}')
    limit = data.get("max_tokens")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise InputError(f"{where}: max_tokens must be a positive integer")
    if isinstance(data.get("messages"), list):
        if not chat:
            raise InputError(f"{where}: messages need --endpoint chat")
        return Ask(messages=data["messages"], max_tokens=limit)
    ids = data.get("prompt_token_ids")
    if isinstance(ids, list) and ids and all(type(i) is int for i in ids):
        if chat:
            raise InputError(f"{where}: prompt_token_ids need --endpoint completions")
        return Ask(token_ids=ids, tokens=len(ids), max_tokens=limit)
    value = next((data[k] for k in TEXT_KEYS if data.get(k)), None)
    value = value[0] if isinstance(value, list) else value
    if not isinstance(value, str):
        raise InputError(f"{where}: needs one of {', '.join(TEXT_KEYS)}, messages, prompt_token_ids")
    return _ask(value, limit, chat)


def _ask(text: str, limit: int | None, chat: bool) -> Ask:
    if chat:
        return Ask(messages=[{"role": "user", "content": text}], max_tokens=limit)
    return Ask(text=text, max_tokens=limit)


# ---- traces


def read_trace(path: Path, limit: int | None = None) -> list[TraceRow]:
    """`TIMESTAMP,ContextTokens,GeneratedTokens` as CSV, or Mooncake's JSONL; the first `limit` requests."""
    lines = _lines(path)
    first = next(lines, None)
    if first is None:
        raise InputError(f"{path} is empty: it should be a trace")
    if first[1].lstrip().startswith("{"):
        parsed = (_mooncake(line, f"{path}:{number}") for number, line in _chain(first, lines))
    else:
        header = [name.strip() for name in next(csv.reader([first[1]]))]
        if missing := [c for c in CSV_COLUMNS if c not in header]:
            raise InputError(f"{path}:{first[0]}: the header lacks {', '.join(missing)}")
        places = [header.index(c) for c in CSV_COLUMNS]
        parsed = (_csv_row(line, places, f"{path}:{number}") for number, line in lines)
    rows: list[TraceRow] = []
    for row in parsed:
        if rows and row[1].at < rows[-1].at:
            raise InputError(f"{row[0]}: the time goes backwards")
        rows.append(row[1])
        if len(rows) == limit:
            break
    if not rows:
        raise InputError(f"{path} holds no request")
    start = rows[0].at
    return [TraceRow(r.at - start, r.prompt_tokens, r.output_tokens, r.hash_ids) for r in rows]


def _chain(first: tuple[int, str], rest: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield first
    yield from rest


def _csv_row(line: str, places: list[int], where: str) -> tuple[str, TraceRow]:
    cells = next(csv.reader([line]))
    try:
        when, prompt, output = (cells[p].strip() for p in places)
    except IndexError:
        raise InputError(f"{where}: {len(cells)} cells, the header has more") from None
    return where, TraceRow(_time(when, where), _count(prompt, where), _count(output, where))


def _mooncake(line: str, where: str) -> tuple[str, TraceRow]:
    try:
        data = json.loads(line)
        hashes = tuple(int(h) for h in data.get("hash_ids") or ())
        at = float(data["timestamp"]) / 1000
        lengths = data["input_length"], data["output_length"]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(
            f'{where}: needs {{"timestamp": ms, "input_length": n, "output_length": n}} with numbers'
        ) from None
    return where, TraceRow(at, _count(lengths[0], where), _count(lengths[1], where), hashes)


def _time(text: str, where: str) -> float:
    """Seconds, from a number or a date such as 2023-11-16 18:15:46.6805900."""
    try:
        return float(text)
    except ValueError:
        pass
    whole, _, fraction = text.partition(".")
    try:
        seconds = datetime.fromisoformat(whole).timestamp()
        return seconds + float(f"0.{fraction or 0}")
    except ValueError:
        raise InputError(f"{where}: {text!r} is no time: seconds, or 2023-11-16 18:15:46.68") from None


def _count(value: Any, where: str) -> int:
    try:
        count = int(value)
    except (ValueError, TypeError):
        count = 0
    if count < 1:
        raise InputError(f"{where}: {value!r} is no number of tokens (1 or more)")
    return count
