"""Claims about memory, comparisons of rows, prompts, and numbers that say nothing alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from surefoot.analyze import audit_text
from surefoot.analyze.claims import Claims, Comparison, Facts, Memory, Row
from surefoot.analyze.findings import ROUNDING, Finding, impossible, missing, suspicious
from surefoot.analyze.numbers import amount, seconds


def memory(claims: Claims) -> Iterator[Finding]:
    """Weights and cache against what is stated and what the model needs."""
    for i, said in enumerate(claims.memory):
        where, facts = f"memory[{i}]", claims.facts(said)
        yield from _weights(said, facts, where)
        each = facts.kv_bytes_per_token if facts else None
        if each and said.cache_tokens and said.cache_bytes and said.cache_tokens * each > said.cache_bytes * ROUNDING:
            yield impossible(
                "memory",
                where,
                f"{said.cache_tokens:,} tokens and {amount(said.cache_bytes, 'B')} of cache",
                f"{said.cache_tokens:,} x {amount(each, 'B')} = {amount(said.cache_tokens * each, 'B')}",
            )
        if said.requests and said.tokens_per_request and said.cache_tokens:
            need = said.requests * said.tokens_per_request
            if need > said.cache_tokens * ROUNDING:
                stated = f"{said.requests:,} requests of {said.tokens_per_request:,} and {said.cache_tokens:,} tokens"
                yield impossible("memory", where, stated, f"the requests need {need:,} tokens")
        total = said.total_bytes or (claims.chip.memory if claims.chip else None)
        used = (said.weight_bytes or 0) + (said.cache_bytes or 0)
        if total and used > total * ROUNDING:
            stated = f"{amount(used, 'B')} of weights and cache and a memory of {amount(total, 'B')}"
            parts = (
                f"{amount(said.weight_bytes or 0, 'B')} + {amount(said.cache_bytes or 0, 'B')} > {amount(total, 'B')}"
            )
            yield impossible("memory", where, stated, parts)


def _weights(said: Memory, facts: Facts | None, where: str) -> Iterator[Finding]:
    if facts and said.weight_bytes and said.weight_bytes * ROUNDING < facts.weight_bytes:
        yield impossible(
            "memory",
            where,
            f"{amount(said.weight_bytes, 'B')} of weights and the model in {facts.dtype}",
            f"its parameters take {amount(facts.weight_bytes, 'B')}",
        )


def answer_length(claims: Claims) -> Iterator[Finding]:
    """Times per question say nothing about speed where the answers differ in length."""
    for comparison in claims.comparisons:
        rows = [claims.row(name) for name in comparison.rows]
        for a, b in itertools.combinations(rows, 2):
            yield from _compare(claims, comparison, a, b)


def _compare(claims: Claims, comparison: Comparison, a: Row, b: Row) -> Iterator[Finding]:
    times = getattr(a, comparison.metric), getattr(b, comparison.metric)
    if comparison.metric not in ("seconds", "request_s") or None in times:
        return
    stated = (
        f"{seconds(times[0].low)} ({_name(claims, a)}) and {seconds(times[1].low)} ({_name(claims, b)}) per question"
    )
    if a.output_tokens and b.output_tokens:
        if max(a.output_tokens, b.output_tokens) > ROUNDING * min(a.output_tokens, b.output_tokens):
            each = [seconds(t.low / (r.output_tokens or 1)) for t, r in zip(times, (a, b))]
            lengths = f"{a.output_tokens} and {b.output_tokens} tokens: {each[0]} and {each[1]} a token"
            yield suspicious("answer-length", (a.id, b.id), f"{stated} compare answers of different length", lengths)
        return
    if (slower := _per_token(claims, a, b)) is None:
        yield missing("answer-length", f"{a.id}, {b.id}", f"{stated}: the answers' lengths are not stated")
        return
    factor, why = slower  # b's time per token over a's, at least
    if times[1].low / times[0].high * ROUNDING < factor:
        equal = f"at equal length the second needs {factor:.2g} x {times[0].high:g} = {factor * times[0].high:.3g} s"
        yield suspicious(
            "answer-length", (a.id, b.id), f"{stated} compare answers of different length", f"{why}, so {equal}"
        )
    else:
        yield missing("answer-length", f"{a.id}, {b.id}", f"{stated}: the answers' lengths are not stated")


def _per_token(claims: Claims, a: Row, b: Row) -> tuple[float, str] | None:
    """How many times longer b's model takes for the same tokens, as the page's own rows of equal length say."""
    found = []
    for x, y in itertools.product(claims.rows, claims.rows):
        same = x.prompt_tokens and (x.prompt_tokens, x.batch) == (y.prompt_tokens, y.batch)
        if x.model == a.model and y.model == b.model and same and x.prefill_s and y.prefill_s:
            why = f"{seconds(x.prefill_s.high)} and {seconds(y.prefill_s.low)} for the same {x.prompt_tokens} tokens"
            found.append((y.prefill_s.low / x.prefill_s.high, why))
    return min(found, default=None)


def _name(claims: Claims, row: Row) -> str:
    return claims.models[row.model].name if row.model else row.id


def template(claims: Claims) -> Iterator[Finding]:
    """Prompts in another model's chat template."""
    for prompt in claims.prompts:
        model = claims.models[prompt.model]
        own, used = audit_text.family_of(model.name, model.template_family), audit_text.family_in(prompt.template)
        if own and used and own != used:
            stated = f"{model.name} is asked in the template of {used}, its own is that of {own}"
            marks = f"{audit_text.MARKS[used]} in the prompt, {audit_text.MARKS[own]} in the model's template"
            yield suspicious("template", f"prompts of {prompt.model}", stated, marks)


def incomplete(claims: Claims) -> Iterator[Finding]:
    """Numbers that say nothing without another one."""
    compared = {name for comparison in claims.comparisons for name in comparison.rows}
    for row in claims.rows:
        if row.requests_per_s and not row.output_tokens:
            yield missing("tokens", row.id, f"{amount(row.requests_per_s.high)} requests/s without tokens per answer")
        if row.request_s and not row.output_tokens:
            yield missing("tokens", row.id, f"{seconds(row.request_s.low)} per request without tokens per answer")
        if row.seconds and not row.output_tokens and row.id not in compared:
            yield missing("tokens", row.id, f"{seconds(row.seconds.low)} without the number of tokens")
        if (row.tokens_per_s or row.requests_per_s) and not row.batch:
            yield missing("batch", row.id, "a throughput without the batch or the number of requests in flight")
