"""The screen of `surefoot shapes`."""

from __future__ import annotations

from typing import Any

from surefoot.bench.shapes import Played
from surefoot.bench.stats import quantile
from surefoot.cache.plan import format_bytes


def advice_lines(said: str, played: Played, modes: dict[str, dict[str, Any]], flight: int) -> list[str]:
    limits = played.limits
    left = (
        f"; {played.left_out:,} longer than max_model_len {limits.max_model_len:,} left out" if played.left_out else ""
    )
    steps = sum(played.decode.values()), sum(played.prefill.values())
    lines = [
        f"workload  {said}: {played.num_requests:,} requests, prompts {_spread(played.prompts)}, "
        f"outputs {_spread(played.outputs)} tokens{left}",
        f"played    by the engine's scheduler, {flight} in flight, at most {limits.max_num_batched_tokens:,} tokens a "
        f"step: {steps[0]:,} decode and {steps[1]:,} prefill steps",
        "",
        f"{'':16}{'shapes of':^20}{'captures or':>12}{'padding in':^20}{'':8}{'kept for':>10}",
        f"{'mode':16}{'decode':>10}{'prefill':>10}{'compiles':>12}{'decode':>10}{'prefill':>10}{'all':>8}{'padding':>10}",
    ]
    for name, mode in modes.items():
        shapes = mode["decode_shapes"] + mode["prefill_shapes"]
        lines.append(
            f"{name:16}{mode['decode_shapes']:>10,}{mode['prefill_shapes']:>10,}{shapes:>12,}"
            f"{mode['decode_waste']:>10.1%}{mode['prefill_waste']:>10.1%}{mode['waste']:>8.1%}"
            f"{format_bytes(mode['memory_bytes']):>10}"
        )
    best = modes["bucketed"]
    return [
        *lines,
        "",
        "dynamic is the number of different shapes that come up: what a device that compiles per shape would compile.",
        "start-up: each shape runs twice, to warm up and to capture; --run measures it.",
        f"take      --batch-buckets {_flag(best['batch_buckets'])} --token-buckets {_flag(best['token_buckets'])}",
    ]


def run_lines(result: dict[str, Any]) -> list[str]:
    modes = result["modes"]
    names = list(modes)
    lines = ["", f"{'':12}{'prefill, ms':^{12 * len(names)}}{'decode step, ms':^{12 * len(names)}}"]
    lines.append(f"{'prompt':12}" + "".join(f"{name:>12}" for name in names * 2))
    for i, length in enumerate(result["lengths"]):
        points = [modes[name]["points"][i] for name in names]
        cells = [p["prefill_s"] for p in points] + [p["decode_step_s"] for p in points]
        lines.append(f"{length:<12,}" + "".join(f"{'-' if c is None else f'{1000 * c:,.2f}':>12}" for c in cells))
    rows = {
        "start-up": [f"{m['start_up_s']:.2f} s" for m in modes.values()],
        "shapes": [f"{m['warmup_shapes'] + len(m['new_shapes'])}" for m in modes.values()],
        "captures": [f"{m['captures']}" for m in modes.values()],
        "new after": [f"{len(m['new_shapes'])}" for m in modes.values()],
        "for padding": [format_bytes(m["memory_bytes"]) for m in modes.values()],
        "peak memory": ["-" if m["peak_bytes"] is None else format_bytes(m["peak_bytes"]) for m in modes.values()],
    }
    lines += ["", f"{'':12}" + "".join(f"{name:>12}" for name in names)]
    lines += [f"{name:12}" + "".join(f"{cell:>12}" for cell in cells) for name, cells in rows.items()]
    lines += ["", *(f"FAIL      {problem}" for problem in result["problems"])]
    if result["ok"]:
        lines.append("PASS      the same tokens in every mode; nothing captured or compiled after the warm-up")
    return lines


def _spread(values: list[int]) -> str:
    p50, p95 = (f"{quantile(values, q):,.0f}" for q in (0.5, 0.95))
    return f"p50 {p50}, p95 {p95}, most {max(values):,}"


def _flag(sizes: list[int]) -> str:
    return ",".join(map(str, sizes))
