"""Claims against the chip: arithmetic above its peak, bytes above its bandwidth."""

from __future__ import annotations

from collections.abc import Iterator

from surefoot.analyze.claims import Claims, Facts, Row
from surefoot.analyze.findings import ABOVE_LIMIT, SHORTEST_ANSWER, Finding, impossible
from surefoot.analyze.numbers import amount, seconds


def shortest_answer(claims: Claims) -> int:
    """Tokens that an answer is taken to have where its row does not say: as few as anywhere on the page."""
    return min([SHORTEST_ANSWER, *(row.output_tokens for row in claims.rows if row.output_tokens)])


def token_rates(row: Row, least: int) -> Iterator[tuple[str, float, int | None]]:
    """(what is stated, output tokens/s that follow at the ambitious end, tokens per request that were assumed)."""
    if row.tokens_per_s:
        yield f"{amount(row.tokens_per_s.high)} tok/s", row.tokens_per_s.high, None
    if row.requests_per_s:
        tokens, assumed = (row.output_tokens, None) if row.output_tokens else (least, least)
        yield f"{amount(row.requests_per_s.high)} requests/s", row.requests_per_s.high * tokens, assumed


def _of(assumed: int | None) -> str:
    return f" with answers of {assumed} tokens or more" if assumed else ""


def _fit(assumed: int | None, tokens: float) -> str:
    return f"; only answers of up to {tokens:.0f} tokens would fit" if assumed else ""


def beyond_peak(claims: Claims) -> Iterator[Finding]:
    """Tokens/s times FLOPs per token against the chip's peak."""
    for row in claims.rows:
        facts = claims.facts(row)
        peak = claims.chip.peak_flops.get(_multiplies_in(facts.dtype)) if claims.chip and facts else None
        if not peak or not facts:
            continue
        for stated, rate, assumed in token_rates(row, shortest_answer(claims)):
            need = rate * facts.token_flops
            if need > peak * row.devices * ABOVE_LIMIT:
                yield impossible(
                    "peak",
                    row.id,
                    f"{stated}{_of(assumed)} and the chip's peak of {amount(peak * row.devices, 'FLOP/s')}",
                    f"{amount(rate)} tok/s x {amount(facts.token_flops, 'FLOP')} = {amount(need, 'FLOP/s')}",
                )
        if row.prefill_s and row.prompt_tokens:
            tokens, fastest = row.prompt_tokens * (row.batch or 1), row.prefill_s.low
            # Only the last token of a prompt needs logits, so the layers alone count.
            need = tokens * facts.layer_flops / fastest
            if need > peak * row.devices * ABOVE_LIMIT:
                each, limit = amount(facts.layer_flops, "FLOP"), amount(peak * row.devices, "FLOP/s")
                yield impossible(
                    "peak",
                    row.id,
                    f"a prefill of {tokens} tokens in {seconds(fastest)} and a peak of {limit}",
                    f"{tokens} x {each} / {seconds(fastest)} = {amount(need, 'FLOP/s')}",
                )


def _multiplies_in(dtype: str) -> str:
    return {"w8a8": "int8", "w4a8": "int8", "w8a16": "float16", "w4a16": "float16"}.get(dtype, dtype)


def beyond_bandwidth(claims: Claims) -> Iterator[Finding]:
    """Weights and cache read per step, times steps per second, against the chip's memory bandwidth."""
    bandwidth = claims.chip.memory_bandwidth if claims.chip else None
    for row in claims.rows:
        facts = claims.facts(row)
        if not bandwidth or not facts:
            continue
        limit = bandwidth * row.devices
        context = row.prompt_tokens or 1
        batch = row.batch or 0
        for stated, rate, assumed in token_rates(row, shortest_answer(claims)) if batch else ():
            steps, size = rate / batch, facts.step_bytes(batch, context)
            if steps * size > limit * ABOVE_LIMIT:
                yield impossible(
                    "bandwidth",
                    row.id,
                    f"{stated} at batch {batch}{_of(assumed)} and the bandwidth of {amount(limit, 'B/s')}",
                    f"{amount(rate)} / {batch} = {amount(steps)} steps/s x {amount(size, 'B')} = "
                    f"{amount(steps * size, 'B/s')}{_fit(assumed, limit / size * batch * (assumed or 1) / rate)}",
                )
        yield from _times_beyond_bandwidth(row, facts, limit, context, shortest_answer(claims))


def _times_beyond_bandwidth(row: Row, facts: Facts, limit: float, context: int, least_tokens: int) -> Iterator[Finding]:
    step = row.decode_step_s or row.tpot_s
    size = facts.step_bytes(row.batch or 1, context)
    if step and size / step.low > limit * ABOVE_LIMIT:
        yield impossible(
            "bandwidth",
            row.id,
            f"a decode step of {seconds(step.low)} and the bandwidth of {amount(limit, 'B/s')}",
            f"{amount(size, 'B')} / {seconds(step.low)} = {amount(size / step.low, 'B/s')}",
        )
    if row.request_s:
        tokens = row.output_tokens or least_tokens
        least = tokens * size / limit
        if row.request_s.low * ABOVE_LIMIT < least:
            assumed = None if row.output_tokens else least_tokens
            yield impossible(
                "bandwidth",
                row.id,
                f"{seconds(row.request_s.low)} per request{_of(assumed)} and the bandwidth of {amount(limit, 'B/s')}",
                f"{tokens} steps x {amount(size, 'B')} / {amount(limit, 'B/s')} = {seconds(least)}"
                f"{_fit(assumed, row.request_s.low * limit / size)}",
            )
