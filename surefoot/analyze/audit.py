"""`surefoot audit`: which of the numbers on a page cannot be true at the same time, and which say nothing.

Each check looks at what the page states and at the least that the model must compute and move; a finding names the two
numbers and shows the arithmetic in one line. Where something is not stated, the reading that favours the page is taken.

impossible    the numbers contradict each other, the chip or arithmetic
suspicious    not impossible, but it does not mean what the page makes of it
missing       a number that says nothing without another one
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from surefoot.analyze import audit_chip, audit_page
from surefoot.analyze.claims import Claims, Range, Row
from surefoot.analyze.findings import ROUNDING, Check, Finding, impossible, suspicious
from surefoot.analyze.numbers import amount, seconds

FORMAT = "surefoot-audit-1"


def audit(claims: Claims) -> list[Finding]:
    """All findings, the worst first."""
    order = ("impossible", "suspicious", "missing")
    found = [finding for check in CHECKS for finding in check(claims)]
    return sorted(found, key=lambda finding: order.index(finding.severity))


def unchecked(claims: Claims) -> list[str]:
    """What could not be checked at all, and why."""
    notes = []
    chip = claims.chip
    if chip is None or not chip.peak_flops:
        notes.append(f"the peak of {claims.chip_name or 'the chip'} is not known: compute was not checked")
    if chip is None or chip.memory_bandwidth is None:
        notes.append(f"the bandwidth of {claims.chip_name or 'the chip'} is not known: bandwidth was not checked")
    if any(claims.facts(row) is None for row in claims.rows):
        notes.append("rows of models without config or parameters were checked against other rows only")
    return notes


def as_dict(claims: Claims, findings: list[Finding]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "title": claims.title,
        "findings": [asdict(finding) for finding in findings],
        "unchecked": unchecked(claims),
    }


def throughput(claims: Claims) -> Iterator[Finding]:
    """Tokens/s and requests/s against batch, tokens and seconds of the same row."""
    for row in claims.rows:
        if not (row.batch and row.output_tokens and row.seconds):
            continue
        if row.tokens_per_s:
            made = _over(row.batch * row.output_tokens, row.seconds)
            both = _over(row.batch * (row.output_tokens + (row.prompt_tokens or 0)), row.seconds)
            arithmetic = f"{row.batch} x {row.output_tokens} tokens / {seconds(row.seconds.low)} = {amount(made.high)}"
            stated = f"{amount(row.tokens_per_s.high)} tok/s and {seconds(row.seconds.low)} for the batch"
            if _meet(made, row.tokens_per_s):
                continue
            if row.prompt_tokens and _meet(both, row.tokens_per_s):
                yield suspicious("throughput", row.id, f"{stated}: prompt tokens are counted as output", arithmetic)
            elif row.tokens_per_s.low > made.high:
                yield impossible("throughput", row.id, stated, arithmetic)
            else:
                yield suspicious("throughput", row.id, stated, arithmetic)
    for row in claims.rows:
        if row.requests_per_s and row.tokens_per_s and row.output_tokens:
            made = Range(row.requests_per_s.low * row.output_tokens, row.requests_per_s.high * row.output_tokens)
            if not _meet(made, row.tokens_per_s):
                yield impossible(
                    "throughput",
                    row.id,
                    f"{amount(row.requests_per_s.high)} requests/s and {amount(row.tokens_per_s.high)} tok/s",
                    f"{amount(row.requests_per_s.high)} x {row.output_tokens} tokens = {amount(made.high)} tok/s",
                )


def _over(tokens: int, time: Range) -> Range:
    return Range(tokens / time.high, tokens / time.low)


def _meet(a: Range, b: Range) -> bool:
    return a.low <= b.high * ROUNDING and b.low <= a.high * ROUNDING


def _group(row: Row) -> tuple:
    return row.model, row.dtype, row.batch, row.devices


def _same_prompt(a: Row, b: Row) -> bool:
    """Whether both may be about prompts of one length: a step over a longer cache takes longer."""
    return None in (a.prompt_tokens, b.prompt_tokens) or a.prompt_tokens == b.prompt_tokens


def decode_step(claims: Claims) -> Iterator[Finding]:
    """A stated decode step (or time per output token) against the throughput and the times at the same batch."""
    for row in claims.rows:
        step = row.decode_step_s or row.tpot_s
        if not step or not row.batch:
            continue
        rate = _over(row.batch, step)
        same = [r for r in claims.rows if _group(r) == _group(row) and _same_prompt(r, row)]
        timed = sorted((r for r in same if r.seconds and r.output_tokens), key=lambda r: r.output_tokens or 0)
        slope = _slope(timed[0], timed[-1]) if len(timed) > 1 else None
        said = f"a decode step of {seconds(step.low)}"
        for other in sorted(same, key=lambda r: -(r.output_tokens or 0)):
            stated = other.tokens_per_s
            if not stated:
                continue
            implied = f"{row.batch} / {seconds(step.low)} = {amount(rate.high)} tok/s"
            statement = f"{said} and {amount(stated.high)} tok/s at batch {row.batch}"
            if stated.low > rate.high * ROUNDING:
                yield impossible("decode-step", (row.id, other.id), statement, implied)
            elif slope and not _meet(slope[0], step):
                yield impossible("decode-step", (row.id, other.id), statement, f"{implied}; {slope[1]}")
            elif not slope and (left := _unexplained(row, other, step)):
                yield suspicious("decode-step", (row.id, other.id), statement, f"{implied}; {left}")
            else:
                continue
            break


def _slope(short: Row, long: Row) -> tuple[Range, str] | None:
    """Seconds per further token, from two answers of different length: what prefill takes drops out."""
    more = (long.output_tokens or 0) - (short.output_tokens or 0)
    if more <= 0 or not short.seconds or not long.seconds or short.prompt_tokens != long.prompt_tokens:
        return None
    low, high = (long.seconds.low - short.seconds.high) / more, (long.seconds.high - short.seconds.low) / more
    text = f"{more} tokens more took {long.seconds.high:g} - {short.seconds.low:g} s, {seconds(high)} a step"
    return (Range(low, high), text) if low > 0 else None


def _unexplained(row: Row, other: Row, step: Range) -> str | None:
    """Most of a time that is neither decode steps nor the prefill, which takes at most a step for each prompt token."""
    if not (other.seconds and other.output_tokens and row.batch):
        return None
    prefills = [r.high for r in (row.prefill_s, row.ttft_s, other.prefill_s, other.ttft_s) if r]
    prompt = other.prompt_tokens or row.prompt_tokens
    if not prefills and prompt is None:
        return None  # a long prompt may have taken all of it
    prefill = max(prefills) if prefills else row.batch * (prompt or 0) * step.high
    known = other.output_tokens * step.high + prefill
    if known > 0.5 * other.seconds.low:
        return None
    parts = f"{other.output_tokens} steps and the prefill"
    return f"{parts} take {'' if prefills else 'at most '}{seconds(known)} of the stated {seconds(other.seconds.low)}"


def first_token(claims: Claims) -> Iterator[Finding]:
    """Time to first token against prefill and the whole."""
    for row in claims.rows:
        whole = row.request_s or row.seconds
        for part, name in ((row.ttft_s, "first token"), (row.prefill_s, "prefill")):
            if part and whole and part.low > whole.high * ROUNDING:
                stated = f"{name} after {seconds(part.low)} and a whole request in {seconds(whole.high)}"
                yield impossible("first-token", row.id, stated, f"{part.low:g} s > {whole.high:g} s")
        if row.ttft_s and row.prefill_s and row.ttft_s.high * ROUNDING < row.prefill_s.low:
            yield impossible(
                "first-token",
                row.id,
                f"the first token after {seconds(row.ttft_s.high)} and a prefill of {seconds(row.prefill_s.low)}",
                f"{row.ttft_s.high:g} s < {row.prefill_s.low:g} s, and no token comes before its prefill",
            )
        step = row.tpot_s or row.decode_step_s
        if row.ttft_s and step and row.request_s and row.output_tokens:
            n = row.output_tokens - 1
            made = Range(row.ttft_s.low + n * step.low, row.ttft_s.high + n * step.high)
            if not _meet(made, row.request_s):
                yield impossible(
                    "first-token",
                    row.id,
                    f"{seconds(row.request_s.high)} per request and {seconds(step.high)} per token",
                    f"{row.ttft_s.high:g} s + {n} x {step.high:g} s = {made.high:g} s",
                )


def characters(claims: Claims) -> Iterator[Finding]:
    """Tokens against characters: a token is at least one byte, and a character at most four."""
    for row in claims.rows:
        tokens, chars = row.output_tokens, row.output_characters
        if not tokens or not chars:
            continue
        stated = f"{tokens} tokens and {chars} characters"
        if tokens > 4 * chars:
            yield impossible(
                "characters", row.id, stated, f"{chars} characters are at most {4 * chars} bytes and tokens"
            )
        elif tokens == chars and tokens > 8:
            yield suspicious(
                "characters", row.id, f"{stated}: characters were counted as tokens", f"{tokens} = {chars}"
            )
        elif chars > 12 * tokens:
            yield suspicious("characters", row.id, stated, f"{chars} / {tokens} = {chars / tokens:.1f} a token")


def speed_up(claims: Claims) -> Iterator[Finding]:
    """Throughput that grows faster than the batch or the number of devices."""
    rows = [r for r in claims.rows if r.tokens_per_s]
    for a, b in itertools.permutations(rows, 2):
        alike = (a.model, a.dtype, a.prompt_tokens, a.output_tokens) == (
            b.model,
            b.dtype,
            b.prompt_tokens,
            b.output_tokens,
        )
        if not alike or not a.tokens_per_s or not b.tokens_per_s:
            continue
        gain = b.tokens_per_s.low / a.tokens_per_s.high
        more, what = 1.0, ""
        if a.batch and b.batch and a.devices == b.devices:
            more, what = b.batch / a.batch, f"batch {a.batch} to {b.batch}"
        elif a.batch == b.batch:
            more, what = b.devices / a.devices, f"{a.devices} to {b.devices} devices"
        if more > 1 and gain > more * ROUNDING:
            stated = f"{amount(a.tokens_per_s.high)} and {amount(b.tokens_per_s.low)} tok/s from {what}"
            yield suspicious("speed-up", (a.id, b.id), stated, f"{gain:.2f}x the speed with {more:g}x as much")


def in_flight(claims: Claims) -> Iterator[Finding]:
    """Little's law: requests/s times seconds per request are the requests in flight, at most the batch."""
    for row in claims.rows:
        if row.requests_per_s and row.request_s and row.batch:
            flying = row.requests_per_s.low * row.request_s.low
            if flying > row.batch * row.devices * ROUNDING:
                yield impossible(
                    "in-flight",
                    row.id,
                    f"{amount(row.requests_per_s.low)} requests/s of {seconds(row.request_s.low)} at batch {row.batch}",
                    f"{row.requests_per_s.low:g} /s x {row.request_s.low:g} s = {flying:.3g} requests in flight",
                )


CHECKS: tuple[Check, ...] = (
    audit_chip.beyond_peak,
    audit_chip.beyond_bandwidth,
    throughput,
    decode_step,
    first_token,
    characters,
    speed_up,
    in_flight,
    audit_page.memory,
    audit_page.answer_length,
    audit_page.template,
    audit_page.incomplete,
)
