"""`--prompts FILE`: many prompts through one engine, results in the order of the input.

Every line is checked, and every prompt accepted by the engine, before the first step runs: a bad line means no result
at all. Results are flushed one by one into FILE.partial, which is renamed when it is whole; so a file under its final
name is always complete, and an interrupted run loses nothing that was finished.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from surefoot.core.errors import InputError, SurefootError
from surefoot.core.outputs import TokenLogprob
from surefoot.core.sampling import SamplingParams
from surefoot.run import ask
from surefoot.run.records import Record, parse

if TYPE_CHECKING:
    from surefoot.engine.engine import Engine


@dataclass(frozen=True)
class Job:
    records: list[Record]
    output: Path | None


def read(path: Path, defaults: SamplingParams, output: Path | None) -> Job:
    """Check the whole file and the place of the output."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    records = []
    for number, raw in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: not valid UTF-8 (byte {error.start + 1})") from error
        if line:
            records.append(parse(line, where, number, defaults))
    if not records:
        raise InputError(f'{path} holds no prompts: write one JSON object per line, like {{"prompt": "..."}}')
    if output is not None:
        _check_output(path, output)
    return Job(records, output)


def _check_output(path: Path, output: Path) -> None:
    folder = output.absolute().parent
    if not folder.is_dir():
        raise InputError(f"cannot write {output}: there is no folder {folder}")
    if output.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(
            f"cannot write {output}: " + ("it is a folder" if output.is_dir() else f"{folder} is read-only")
        )
    if output.resolve() == path.resolve():
        raise InputError("-o must not be the --prompts file itself")


def run(engine: Engine, job: Job, style: ask.Style) -> None:
    """Add all requests, step until done, write in order, end with one line of figures."""
    started = time.monotonic()
    index, answers = _submit(engine, job, style)
    with _sink(job.output) as write:
        written = 0
        try:
            while written < len(answers):
                for output in engine.step():
                    ask.add(answers[index[output.request_id]], output)
                while written < len(answers) and answers[written].finish_reason is not None:
                    write(result(job.records[written], answers[written]))
                    written += 1
        except KeyboardInterrupt:
            if job.output is not None:
                message = f"{written} of {len(answers)} results are in {_partial(job.output)}"
                print(message, file=sys.stderr)
            raise
    print(_summary(engine, answers, time.monotonic() - started), file=sys.stderr)


def _submit(engine: Engine, job: Job, style: ask.Style) -> tuple[dict[str, int], list[ask.Answer]]:
    """Hand all requests to the engine; none has run yet when a later one is refused."""
    index: dict[str, int] = {}
    answers = []
    for number, record in enumerate(job.records):
        try:
            token_ids = _encode(engine, record, style)
            answers.append(ask.Answer(num_prompt_tokens=len(token_ids), started=time.monotonic()))
            index[engine.add_request(token_ids, record.params)] = number
        except SurefootError as error:
            raise type(error)(f"{record.where}: {error}") from error
    return index, answers


def _encode(engine: Engine, record: Record, style: ask.Style) -> list[int]:
    if record.prompt_token_ids is not None:
        return record.prompt_token_ids
    if record.messages is not None:
        has_system = record.messages[0]["role"] == "system"
        return ask.encode_messages(engine, record.messages if has_system else style.messages(*record.messages), style)
    assert record.prompt is not None
    return ask.encode_prompt(engine, record.prompt, style)


def result(record: Record, answer: ask.Answer) -> dict[str, Any]:
    """One line of output. The id is the record's own, or its line number."""
    row: dict[str, Any] = {
        "id": record.id,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "token_ids": answer.token_ids,
        "num_prompt_tokens": answer.num_prompt_tokens,
        "num_output_tokens": len(answer.token_ids),
        "num_cached_tokens": answer.num_cached_tokens,
        "ttft_s": _rounded(answer.ttft_s),
        "decode_tokens_per_s": _rounded(answer.decode_tokens_per_s),
    }
    if record.params.logprobs is not None:
        row["logprobs"] = [_logprob(entry) for entry in answer.logprobs]
    if record.params.prompt_logprobs is not None:
        row["prompt_logprobs"] = [_logprob(entry) for entry in answer.prompt_logprobs]
    return row


def _logprob(entry: TokenLogprob | None) -> dict[str, Any] | None:
    if entry is None:
        return None
    return {
        "token_id": entry.token_id,
        "logprob": entry.logprob,
        "rank": entry.rank,
        "top": [list(t) for t in entry.top],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


@contextlib.contextmanager
def _sink(output: Path | None) -> Iterator[Any]:
    """A function that writes one row and flushes it; the final name appears only when all went well."""

    def write_to(file: IO[str], row: dict[str, Any]) -> None:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()

    if output is None:
        yield lambda row: write_to(sys.stdout, row)
        return
    partial = _partial(output)
    with open(partial, "w", encoding="utf-8") as file:
        yield lambda row: write_to(file, row)
    os.replace(partial, output)


def _summary(engine: Engine, answers: list[ask.Answer], seconds: float) -> str:
    prompt, out = sum(a.num_prompt_tokens for a in answers), sum(len(a.token_ids) for a in answers)
    ttft = sorted(a.ttft_s for a in answers if a.ttft_s is not None)
    median = f"{ttft[len(ttft) // 2]:.3f} s" if ttft else "-"
    return " | ".join(
        [
            f"{len(answers)} prompts: {prompt} prompt + {out} output tokens",
            f"median first token {median}",
            f"{out / seconds:.1f} output tok/s = output tokens / {seconds:.2f} s from first prompt to last answer",
            engine.info.device,
            engine.info.precision,
        ]
    )
