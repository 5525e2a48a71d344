"""An estimate as a table for people. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from surefoot.analyze.numbers import amount, seconds


def lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"estimate for {found['model']} on {found['device']['name']}"
    yield from _device(found["device"])
    for variant in found["variants"]:
        yield ""
        yield from _variant(variant)
    yield ""
    yield from _how(found)


def _device(device: dict[str, Any]) -> Iterator[str]:
    if device["method"] == "calibration":
        yield f"  calibrated       {device['calibrated']} on {device['device']}, {device['threads']} threads"
        for note in device["notes"]:
            yield f"  note             {note}"
        return
    peaks = ", ".join(f"{name} {amount(value, 'FLOP/s')}" for name, value in device["peak_flops"].items()) or "unknown"
    yield f"  peaks            {peaks}"
    bandwidth = device["memory_bandwidth"]
    yield f"  bandwidth        {amount(bandwidth, 'B/s')}"
    yield f"  source           {device['source']}"
    for what in ("memory", "power"):
        unit, value = {"memory": "B", "power": "W"}[what], device[what]
        known = f"{amount(value, unit)} ({device[what + '_source']})" if value else "unknown"
        yield f"  {what:17}{known}"


def _variant(v: dict[str, Any]) -> Iterator[str]:
    activations = f", activations {v['activations']}" if v["activations"] != v["name"] else ""
    yield f"{v['name']}{activations}: {amount(v['parameters'])} parameters, weights {amount(v['weight_bytes'], 'B')}"
    state = f", {amount(v['state_bytes_per_request'], 'B')} a request" if v["state_bytes_per_request"] else ""
    yield f"  cache            {amount(v['kv_bytes_per_token'], 'B')} a token{state}"
    for phase, classes in v["flops_per_token"].items():
        shares = ", ".join(f"{k} {amount(x)}" for k, x in classes.items() if k not in ("length", "total"))
        length = f"at {classes['length']} tokens"
        yield f"  FLOPs a token    {amount(classes['total'])} in {phase} {length} ({shares})"
    yield from _cache(v["cache"])
    for note in v["notes"]:
        yield f"  note             {note}"
    for phase, columns in (("prefill", ("prompt",)), ("decode", ("context", "batch"))):
        if rows := v.get(phase):
            yield "  " + "".join(f"{c:>9}" for c in columns) + f"  {phase + ' time':>30}  {'tok/s':>28}  J/token"
            for row in rows:
                points = "".join(f"{row[c]:>9,}" for c in columns)
                joules = row["joules_per_token_at_most"]
                energy = f"<= {joules:.3g}" if joules else "unknown"
                times, rate = span(row["seconds"], seconds), span(row["tokens_per_s"], amount)
                yield f"  {points}  {times:>30}  {rate:>28}  {energy}"


def _cache(cache: dict[str, Any]) -> Iterator[str]:
    plan = cache.get("plan")
    if plan:
        yield f"  engine's plan    {plan['kv_cache_tokens']:,} tokens of KV cache, {amount(plan['kv_bytes'], 'B')}"
    else:
        yield f"  engine's plan    none: {cache['why']}"
    if batches := cache.get("largest_batch"):
        parts = ", ".join(f"{n:,} of {length} tokens" for length, n in batches.items())
        yield f"  largest batch    {parts}"


def span(interval: dict[str, float | None], text: Any) -> str:
    """low ... expected ... high; `>= low` where the high end is unknown."""
    low, expected, high = interval["low"], interval["expected"], interval["high"]
    if low is None and high is None:
        return "unknown"
    if high is None:
        return f">= {text(low)}"
    if low is None:
        return f"<= {text(high)}"
    middle = f" ({text(expected)})" if expected is not None else ""
    return f"{text(low)} ... {text(high)}{middle}"


def _how(found: dict[str, Any]) -> Iterator[str]:
    if found["device"]["method"] == "calibration":
        yield "low: the roofline at the best rates seen while calibrating. high: the expected time (in brackets) times"
        yield "the largest error of the same sum on the calibration's own engine steps."
    else:
        yield "low: the roofline, all arithmetic at the peak or all compulsory bytes at full bandwidth. high: assumed,"
        yield "not measured: a quarter of the peak, 0.3 of the bandwidth, 200 us to start each op, 5 ms a step. A"
        yield "calibration (`surefoot calibrate` on the device) turns it into evidence."
