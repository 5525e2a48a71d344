"""From raw answers to the numbers of a side, and what must be minded before two sides are compared."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

UNEVEN = 1.5  # ratio of answer lengths above which seconds per question compare lengths

Answer = Mapping[str, Any]


def summarise(answers: Sequence[Answer]) -> dict[str, Any]:
    """seconds_per_token: all seconds / all tokens. decode: without the first token, where the backend tells it."""
    by_prompt: dict[str, list[Answer]] = {}
    for answer in answers:
        by_prompt.setdefault(answer["prompt"], []).append(answer)
    prompts = {name: _of_prompt(group) for name, group in by_prompt.items()}
    counted = [a for a in answers if a["tokens"]]
    decoding = [a for a in counted if a["ttft_s"] is not None and a["tokens"] > 1]
    first = [a["ttft_s"] for a in answers if a["ttft_s"] is not None]
    return {
        "prompts": prompts,
        "seconds_per_question": _median([p["seconds"] for p in prompts.values() if p["kind"] == "question"]),
        "seconds_per_completion": _median([p["seconds"] for p in prompts.values() if p["kind"] == "completion"]),
        "seconds_in_all": sum(p["seconds"] for p in prompts.values()) if prompts else None,
        "seconds_per_token": _ratio(sum(a["seconds"] for a in counted), sum(a["tokens"] for a in counted)),
        "decode_seconds_per_token": _ratio(
            sum(a["seconds"] - a["ttft_s"] for a in decoding), sum(a["tokens"] - 1 for a in decoding)
        ),
        "ttft_s": _median(first),
        "tokens_per_answer": _mean([p["tokens"] for p in prompts.values() if p["tokens"] is not None]),
        "characters_per_answer": _mean([p["characters"] for p in prompts.values()]),
        "cut_off": sum(p["finish_reason"] == "length" for p in prompts.values()),
        "unstable": sum(p["different_texts"] > 1 for p in prompts.values()),
        "checks": checks_of([c for p in prompts.values() for c in p["checks"]]),
    }


def _of_prompt(group: Sequence[Answer]) -> dict[str, Any]:
    """Of the passes over one prompt: the median time; the text and its checks are those of the first."""
    first = group[0]
    seconds = statistics.median(a["seconds"] for a in group)
    return {
        "kind": first["kind"],
        "seconds": seconds,
        "tokens": first["tokens"],
        "seconds_per_token": _ratio(seconds, first["tokens"]),
        "characters": len(first["text"]),
        "text": first["text"],
        "template": first["template"],
        "finish_reason": first["finish_reason"],
        "different_texts": len({a["text"] for a in group}),
        "checks": first.get("checks", []),
    }


def checks_of(checks: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    run = [c for c in checks if c["passed"] is not None]
    return {"passed": sum(c["passed"] for c in run), "run": len(run), "not_run": len(checks) - len(run)}


def scores_of(scores: Sequence[Mapping[str, Any]], side: str, rubric: Mapping[str, str]) -> dict[str, Any]:
    """Per dimension: mean and how many answers; how many were not scored."""
    mine = [s for s in scores if s["side"] == side]
    given = [s["scores"] for s in mine if s["status"] == "scored"]
    means = {}
    for dimension in rubric:
        values = [g[dimension] for g in given if dimension in g]
        means[dimension] = {"mean": _mean(values), "n": len(values)}
    return {"dimensions": means, "not_scored": sum(s["status"] != "scored" for s in mine)}


def cautions(sides: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What makes a comparison unfair, in a line each. sides: name -> the side's part of the record."""
    done = {name: side for name, side in sides.items() if side.get("summary", {}).get("prompts")}
    found = []
    lengths = {name: side["summary"]["tokens_per_answer"] for name, side in done.items()}
    known = {name: n for name, n in lengths.items() if n}
    if known and max(known.values()) > UNEVEN * min(known.values()):
        long, short = max(known, key=known.__getitem__), min(known, key=known.__getitem__)
        found.append(
            f"{long} answers {known[long] / known[short]:.1f} times as long as {short}: compare seconds per token, not "
            "per question"
        )
    vocabularies = {(s["facts"]["identity"].get("architecture"), s["facts"].get("vocab_size")) for s in done.values()}
    if len({v for _, v in vocabularies if v}) > 1:
        found.append("the tokenizers differ: a token is not the same amount of text on each side")
    for name, side in done.items():
        if cut := side["summary"]["cut_off"]:
            found.append(f"{name}: {cut} answers were cut off at the token limit")
        if unstable := side["summary"]["unstable"]:
            found.append(f"{name}: {unstable} greedy answers differ between passes")
        if side["facts"]["template"]["sha256"] is None and "server" not in side["facts"]["template"]["name"]:
            found.append(f"{name} has no chat template: its questions went in as raw text")
    if len({side["facts"]["info"].get("backend") in ("http", "vllm") for side in done.values()}) == 2:
        found.append("servers are timed over HTTP, models in their process: the times hold different things")
    return found


def _ratio(a: float, b: float | None) -> float | None:
    return a / b if b else None


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def to_judge(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every side's answer to every prompt, prompt by prompt, for a judge."""
    return [
        {"side": name, "prompt": p["id"], "kind": p["kind"], "asked": p["text"], "text": answers[p["id"]]["text"]}
        for p in record["prompts"]
        for name, side in record["sides"].items()
        if p["id"] in (answers := side["summary"]["prompts"])
    ]
