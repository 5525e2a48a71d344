"""Scores of 1 to 5 per dimension of a rubric: entered by hand in a file, or given by a judge model.

Nothing is scored that was not said: an answer that a judge's reply does not score properly is recorded with that reply.
The judge sees prompt and answer, never which side gave it.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from surefoot.backends.http import EndpointError, HttpBackend
from surefoot.compare.prompts import data_file
from surefoot.core.errors import InputError

Rubric = Mapping[str, str]
COLUMNS = ("side", "prompt", "dimension", "score")
JUDGE_TOKENS = 512
ASK = """You score an answer. Be strict; do not reward length.

Rubric, each from 1 to 5:
{rubric}

{kind}:
{prompt}

Answer to score:
{answer}

Reply with one JSON object and nothing else, such as {example}"""
KINDS = {"question": "Question", "completion": "Beginning of a text, which the answer is to continue"}
THINKING = re.compile(r"<think>.*?</think>", re.S)


def load_rubric(path: Path | None) -> dict[str, str]:
    """{dimension: what 1 and 5 mean}; built in, or a JSON file of that form."""
    if path is None:
        return json.loads(data_file("rubric.json"))
    try:
        rubric = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the rubric {path}: {error}") from error
    if not isinstance(rubric, dict) or not rubric or not all(isinstance(v, str) and v for v in rubric.values()):
        raise InputError(f'{path} must be a JSON object like {{"correctness": "1: wrong. 5: right."}}')
    return rubric


# ---- by hand


def sheet(sides: Sequence[str], prompts: Sequence[str], rubric: Rubric) -> str:
    """A CSV to fill in."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((side, prompt, dimension, "") for prompt in prompts for side in sides for dimension in rubric)
    return out.getvalue()


def by_hand(path: Path, sides: Sequence[str], prompts: Sequence[str], rubric: Rubric) -> list[dict[str, Any]]:
    """The filled-in CSV; rows without a score are left out."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the scores {path}: {error}") from error
    rows = csv.DictReader(io.StringIO(text))
    if tuple(rows.fieldnames or ()) != COLUMNS:
        raise InputError(f"{path} must begin with the line {','.join(COLUMNS)}")
    found: dict[tuple[str, str], dict[str, int]] = {}
    for number, row in enumerate(rows, 2):
        known = {"side": sides, "prompt": prompts, "dimension": list(rubric)}
        if wrong := next((k for k, values in known.items() if row[k] not in values), None):
            raise InputError(f"{path}:{number}: unknown {wrong} {row[wrong]!r}: it is one of {', '.join(known[wrong])}")
        score = (row["score"] or "").strip()
        if not score:
            continue
        if score not in ("1", "2", "3", "4", "5"):
            raise InputError(f"{path}:{number}: score {score!r}: write a whole number from 1 to 5")
        found.setdefault((row["side"], row["prompt"]), {})[row["dimension"]] = int(score)
    if not found:
        raise InputError(f"{path} holds no scores: write numbers from 1 to 5 into its last column")
    return [{"side": s, "prompt": p, "status": "scored", "scores": v} for (s, p), v in found.items()]


# ---- by a judge


def by_judge(
    judge: HttpBackend,
    answers: Sequence[Mapping[str, Any]],
    rubric: Rubric,
    progress: Callable[[str, float | None], None],
) -> list[dict[str, Any]]:
    """answers: side, prompt, kind, asked, text. A reply that is no score, or a failure, is recorded as such."""
    scored = []
    for i, answer in enumerate(answers):
        progress(f"judging {i + 1}/{len(answers)}", i / len(answers))
        scored.append({"side": answer["side"], "prompt": answer["prompt"]} | _judged(judge, answer, rubric))
    return scored


def _judged(judge: HttpBackend, answer: Mapping[str, Any], rubric: Rubric) -> dict[str, Any]:
    question = ASK.format(
        rubric="\n".join(f"- {name}: {meaning}" for name, meaning in rubric.items()),
        kind=KINDS[answer["kind"]],
        prompt=answer["asked"],
        answer=answer["text"] or "(empty)",
        example=json.dumps({name: 3 for name in rubric}),
    )
    try:
        reply = judge.chat([{"role": "user", "content": question}], JUDGE_TOKENS).text
    except EndpointError as error:
        return {"status": "failed", "why": str(error)}
    scores = read_scores(reply, rubric)
    if scores is None:
        return {
            "status": "no score",
            "why": "no JSON object with a number from 1 to 5 each",
            "reply": reply,
        }
    return {"status": "scored", "scores": scores, "reply": reply}


def read_scores(reply: str, rubric: Rubric) -> dict[str, int] | None:
    """The one JSON object in a reply that scores every dimension with a whole number from 1 to 5, and nothing else."""
    found = []
    for text in re.findall(r"\{[^{}]*\}", THINKING.sub("", reply)):
        try:
            value = json.loads(text)
        except ValueError:
            continue
        if set(value) == set(rubric) and all(type(v) is int and 1 <= v <= 5 for v in value.values()):
            found.append(value)
    return found[0] if len(found) == 1 else None
