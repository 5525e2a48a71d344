"""From the logs of one point to its numbers: latencies by every definition, rates, goodput, checks of the text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from surefoot.bench.definitions import DEFINITIONS, OURS
from surefoot.bench.rawlog import RequestLog
from surefoot.bench.stats import pooled, summary
from surefoot.core.errors import InputError

POOLED = {("itl", OURS), ("itl", "vllm"), ("itl", "evalscope")}
TARGETS = ("ttft", "tpot", "itl", "e2e")
AT_ONCE = (1e-4, 0.02)  # seconds per further token, and share of the request, below which no answer was streamed
IN_ONE_CHUNK = 8  # tokens that a server which streams may still send together (speculative decoding)
OVERDUE = 0.005  # seconds of send lag above which the client is named as a suspect


def point_metrics(logs: Sequence[RequestLog], targets: Mapping[str, float] | None = None) -> dict[str, Any]:
    """All numbers of one point. Failed requests count in nothing but `failed` and `errors`."""
    good = [log for log in logs if log.ok]
    result: dict[str, Any] = {
        "requests": len(logs),
        "completed": len(good),
        "failed": len(logs) - len(good),
        "errors": dict(Counter(log.error or "no token came" for log in logs if not log.ok).most_common(5)),
    }
    if not good:
        return result
    span = max(log.ended for log in good) - min(log.sent for log in good)
    output = sum(log.num_output_tokens for log in good)
    prompts = [log.prompt_tokens if log.prompt_tokens is not None else log.asked_prompt_tokens for log in good]
    known = [p for p in prompts if p is not None]
    result |= {
        "duration_s": span,
        "requests_per_s": len(good) / span,
        "output_tokens": output,
        "output_tokens_per_s": output / span,
        "tokens_counted_by": dict(Counter(log.counted_by for log in good)),
        "prompt_tokens": sum(known) if len(known) == len(good) else None,
        "total_tokens_per_s": (sum(known) + output) / span if len(known) == len(good) else None,
        "cached_prompt_tokens": _sum([log.cached_tokens for log in good]),
        "latency": latencies(good),
        "send_lag_s": summary([log.sent - log.scheduled for log in good]),
        "warnings": text_checks(good) + _stream_warning(good) + _lag_warning(good),
    }
    if targets:
        result["goodput"] = goodput(good, targets, span) | {"failed_count_as_missed": len(logs) - len(good)}
    return result


def latencies(logs: Sequence[RequestLog]) -> dict[str, Any]:
    """{"ttft@surefoot": summary, ...}, seconds (or tokens/s) throughout."""
    result = {}
    for definition in DEFINITIONS:
        groups = [definition.values(log) for log in logs]
        if (definition.metric, definition.tool) in POOLED:
            result[definition.key] = pooled(groups)
        else:
            result[definition.key] = summary([v for group in groups for v in group])
    return result


def goodput(logs: Sequence[RequestLog], targets: Mapping[str, float], span: float) -> dict[str, Any]:
    """Requests per second that met every target (seconds). A request's ITL is its largest gap."""
    by_name = {d.metric: d for d in DEFINITIONS if d.tool == OURS}
    met = sum(
        all(max(by_name[name].values(log), default=0.0) <= limit for name, limit in targets.items()) for log in logs
    )
    return {"targets_s": dict(targets), "met": met, "share": met / len(logs), "requests_per_s": met / span}


def parse_targets(text: str | None) -> dict[str, float]:
    """`ttft:200,tpot:50` in milliseconds -> seconds."""
    targets: dict[str, float] = {}
    for part in filter(None, (text or "").split(",")):
        name, _, value = part.strip().partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = 0.0
        if name not in TARGETS or not 0 < limit < float("inf"):
            raise InputError(f"--goodput {part!r}: write like ttft:200,tpot:50 (ms; {', '.join(TARGETS)})")
        targets[name] = limit / 1000
    return targets


def text_checks(logs: Sequence[RequestLog]) -> list[str]:
    """Signs that the speed was measured on an answer that nobody wants."""
    found = []
    total = len(logs)
    if lost := sum("\ufffd" in log.text for log in logs):
        found.append(f"{lost} of {total} answers hold the replacement character: bytes were lost or are no text")
    if empty := sum(not log.text.strip() for log in logs):
        found.append(f"{empty} of {total} answers are empty text")
    if stuck := sum(_repeats(log.text) for log in logs):
        found.append(f"{stuck} of {total} answers repeat one short piece to the end")
    texts = Counter(log.text for log in logs if log.text)
    if total >= 4 and texts and texts.most_common(1)[0][1] == total:
        found.append(f"all {total} answers are the same text")
    asked = [log for log in logs if log.asked_output_tokens is not None]
    if short := sum(log.num_output_tokens != log.asked_output_tokens for log in asked):
        found.append(f"{short} of {total} answers have another length than asked: compare times per token only")
    counted = [log for log in logs if log.prompt_tokens is not None and log.asked_prompt_tokens is not None]
    if other := [log for log in counted if log.prompt_tokens != log.asked_prompt_tokens]:
        extra = np.mean([(log.prompt_tokens or 0) - (log.asked_prompt_tokens or 0) for log in other])
        found.append(f"the server counts {extra:+.1f} prompt tokens against what was asked (template, special tokens)")
    return found


def _repeats(text: str, pieces: int = 12) -> bool:
    """Whether the text ends in the same 1 to 16 characters `pieces` times over."""
    return any(
        len(text) >= k * pieces and text.endswith(text[-k:] * pieces) and text[-k:].strip() for k in range(1, 17)
    )


def _stream_warning(logs: Sequence[RequestLog]) -> list[str]:
    """Long answers whose last token came with the first: nothing decodes that fast."""
    longer = [log for log in logs if log.num_output_tokens > IN_ONE_CHUNK]
    whole = sum(_at_once(log) for log in longer)
    if 2 * whole <= len(longer):
        return []
    said = "the server, or a proxy before it, does not stream: TTFT is the whole request, TPOT and ITL say nothing"
    return [f"{whole} of {len(logs)} answers came all at once: {said}"]


def _at_once(log: RequestLog) -> bool:
    chunks, (per_token, share) = log.token_chunks, AT_ONCE
    span = chunks[-1].time - chunks[0].time
    return span <= per_token * (log.num_output_tokens - 1) and span <= share * (log.ended - log.sent)


def _lag_warning(logs: Sequence[RequestLog]) -> list[str]:
    lag = float(np.quantile([log.sent - log.scheduled for log in logs], 0.9))
    late = f"this client sent a tenth of the requests {lag * 1000:.1f} ms late or more (connecting, or busy)"
    return [late] if lag > OVERDUE else []


def _sum(values: Sequence[int | None]) -> int | None:
    known = [v for v in values if v is not None]
    return sum(known) if known else None
