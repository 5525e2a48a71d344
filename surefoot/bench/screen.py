"""A benchmark on one screen: what was measured, whether it is proven, the numbers, and what to mind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from surefoot.bench.definitions import table as definition_table
from surefoot.bench.result import PROVEN
from surefoot.cache.plan import format_bytes

Data = Mapping[str, Any]


def show(data: Data, path: str, tools: bool = False, console: Console | None = None) -> None:
    """Print the document."""
    console = console or _console()
    points = data["points"]
    body = _engine_table(points) if data["mode"] == "engine" else _server_table(points, data)
    parts: list[RenderableType] = [_head(data), body]
    if tools and data["mode"] == "server" and points:
        parts += [_tools(point) for point in points if "latency" in point]
    console.print(Group(*parts, _foot(data, path)))


def _head(data: Data) -> RenderableType:
    config = data["config"]
    grid = Table.grid(padding=(0, 2))
    proof = data["proof"]
    proven = proof["status"] == PROVEN
    grid.add_row("proof", Text(f"{proof['status']}: {proof['reason']}", style="green" if proven else "bold yellow"))
    grid.add_row(
        "model", f"{data['model']}, {config.get('architecture') or 'served'}, configuration {data['config_hash']}"
    )
    keys = (
        "backend",
        "device_name",
        "device",
        "dtype",
        "url",
        "owned_by",
        "num_threads",
        "prefix_caching",
        "attention",
    )
    grid.add_row("runs on", ", ".join(f"{k} {config[k]}" for k in keys if config.get(k)))
    if config.get("quant"):
        grid.add_row("quant", ", ".join(f"{k} {v}" for k, v in config["quant"].items()))
    if config.get("ops"):
        grid.add_row("kernels", ", ".join(f"{k.split('/')[0]} {v}" for k, v in config["ops"].items()))
    if config.get("versions"):
        grid.add_row("versions", ", ".join(f"{k} {v}" for k, v in config["versions"].items()))
    if data["mode"] == "engine":
        _engine_head(grid, data)
    else:
        if data.get("load"):
            grid.add_row("start", f"{data['load']['seconds']:.1f} s until the server answered")
        request = data["request"]
        fields = ", ".join(request["extra_fields"]) or "none"
        grid.add_row("requests", f"{request['endpoint']}, {request['prompt_form']}, extra fields: {fields}")
    return grid


def _engine_head(grid: Table, data: Data) -> None:
    memory, settings = data["memory"], data["settings"]
    grid.add_row("load", f"{data['load']['seconds']:.2f} s")
    parts = [f"weights {format_bytes(memory['weight_bytes'])}"]
    parts += [
        f"{n} {format_bytes(memory[k])}"
        for n, k in (("KV cache", "kv_cache_bytes"), ("states", "state_bytes"))
        if memory.get(k)
    ]
    if memory.get("peak_bytes"):
        parts.append(f"peak {format_bytes(memory['peak_bytes'])} ({memory['peak_of']})")
    if memory.get("device_highest_bytes"):
        parts.append(f"device {format_bytes(memory['device_highest_bytes'])} used")
    grid.add_row("memory", ", ".join(parts))
    if held := memory.get("capacity"):
        requests = ", ".join(f"{n} of {length}" for length, n in held["requests_of_length"].items())
        grid.add_row("capacity", f"{held['kv_tokens']:,} KV tokens; requests by length: {requests}")
    peak = memory["peaks"]
    grid.add_row("peak", f"{_flops(peak['flops_per_s'])}, {_rate(peak['bytes_per_s'])} ({peak['source']})")
    passes = f"{settings['repeats']} measured after {settings['warmup']} of warm-up, per shape"
    if first := (data.get("first_warmup") or {}).get("passes"):
        passes += f"; {first} of warm-up in {data['first_warmup']['seconds']:.1f} s before them all"
    grid.add_row("passes", passes)


def _engine_table(points: Sequence[Data]) -> Table:
    table = _table("batch", "prompt", "out", "prefill\nms", "\ntok/s", "decode\nms", "\np99", "\ntok/s", "all\ns",
                   "out\ntok/s")  # fmt: skip
    known = any(p["prefill"]["mfu"] or (p["decode"] or {}).get("mbu") for p in points)
    if known:
        table.add_column("prefill\nMFU", justify="right")
        table.add_column("decode\nMBU", justify="right")
    for p in points:
        decode = p["decode"] or {}
        step = decode.get("step_s", {})
        row = [
            str(p["batch"]), str(p["prompt_len"]), str(p["output_len"]),
            _median(p["prefill"]["seconds"]), _number(p["prefill"]["tokens_per_s"]),
            _median(step), _quantile(step, "p99"), _number(decode.get("tokens_per_s")),
            f"{p['generation_s']['median']:.3f}", _number(p["output_tokens_per_s"]),
        ]  # fmt: skip
        table.add_row(*row, *([_share(p["prefill"]["mfu"]), _share(decode.get("mbu"))] if known else []))
    return table


def _server_table(points: Sequence[Data], data: Data) -> Table:
    targets = bool(data["settings"].get("targets"))
    table = _table("load", "prompt", "out", "ok", "failed", "TTFT\np50", "\np99", "TPOT\np50", "ITL\np99", "E2E\np50",
                   "\np99", "\nreq/s", "out\ntok/s")  # fmt: skip
    if targets:
        table.add_column("good\nreq/s", justify="right")
    for p in points:
        load = f"c={p['concurrency']}" if p["concurrency"] else f"{p['rate_per_s']:g}/s" if p["rate_per_s"] else "trace"
        latency = p.get("latency", {})
        ttft, tpot, itl, e2e = (latency.get(f"{m}@surefoot", {}) for m in ("ttft", "tpot", "itl", "e2e"))
        row = [
            load, str(p["prompt_len"] or "-"), str(p["output_len"] or "-"), str(p["completed"]), str(p["failed"]),
            _median(ttft), _quantile(ttft, "p99"), _median(tpot), _quantile(itl, "p99"),
            _median(e2e), _quantile(e2e, "p99"),
            _number(p.get("requests_per_s")), _number(p.get("output_tokens_per_s")),
        ]  # fmt: skip
        table.add_row(*row, *([_number(p.get("goodput", {}).get("requests_per_s"))] if targets else []))
    return table


def _tools(point: Data) -> Table:
    """The same log in the words of each tool."""
    table = Table(title=f"{point['name']}: one log, everybody's definitions", title_justify="left", box=None)
    for name in ("metric", "tool", "formula", "mean", "median", "p99"):
        table.add_column(name, justify="left" if name in ("metric", "tool", "formula") else "right")
    for row in definition_table():
        found = point["latency"].get(f"{row['metric']}@{row['tool']}")
        if not found or not found["n"]:
            continue
        scale, unit = (1, " tok/s") if row["unit"] == "tok/s" else (1000, " ms")
        numbers = [f"{found[k] * scale:.2f}{unit}" for k in ("mean", "median")]
        table.add_row(row["metric"], row["tool"], row["formula"], *numbers, _quantile(found, "p99", scale))
    return table


def _foot(data: Data, path: str) -> RenderableType:
    lines = []
    if data.get("partial"):
        lines.append(f"PARTIAL: {data.get('ended_by', 'not finished')}")
    if data["mode"] == "server":
        lines.append("latencies in ms; ±: half of the median's 95 % interval; p99 '-' where n is too small for it")
        lines += _client_lines(data["points"])
        lines += [f"note: {n}" for n in data["request"]["notes"]]
    else:
        lines.append("decode: one step in which the whole batch decodes; all: from the prompts to the last token")
        lines.append("±: half of the median's 95 % interval; p99 '-' where n is too small for it")
    lines += [f"mind: {w}" for w in data["host"]["warnings"]]
    seen: dict[str, list[str]] = {}
    for p in data["points"]:
        for warning in [*p.get("warnings", []), *p.get("prefill", {}).get("warnings", [])]:
            seen.setdefault(warning, []).append(p["name"])
        for error, count in p.get("errors", {}).items():
            seen.setdefault(f"{count} failed: {error}", []).append(p["name"])
    lines += [f"mind: {w} ({names[0]}{' and others' if names[1:] else ''})" for w, names in seen.items()]
    lines.append(f"record {path}, samples {path.removesuffix('.json')}.raw.jsonl")
    return Text("\n".join(lines))


def _client_lines(points: Sequence[Data]) -> list[str]:
    costs = [p["client"]["cpu_s_per_request"] * 1000 for p in points]
    lags = [p["client"]["event_loop_lag_s"].get("median", 0.0) * 1000 for p in points]
    if not costs:
        return []
    return [f"client: at most {max(costs):.2f} ms CPU per request, median event-loop lag at most {max(lags):.2f} ms"]


def show_definitions(console: Console | None = None) -> None:
    """The definition table of every metric."""
    table = Table(box=None, title="What each number means (times are of one monotonic clock)", title_justify="left")
    for name in ("metric", "tool", "formula", "meaning"):
        table.add_column(name, overflow="fold")
    for row in definition_table():
        table.add_row(row["metric"], row["tool"], row["formula"], row["meaning"])
    legend = (
        "t0 sent; t1, tn first and last chunk that carries a token; n output tokens (the server's usage if it tells);\n"
        "k1 tokens in the first such chunk; c1 ... cm all chunks with a choice (role, finish too); end last byte"
    )
    (console or _console()).print(Group(table, Text(legend)))


def _console() -> Console:
    """The terminal; a file or a pipe gets lines that are wide enough."""
    console = Console()
    return console if console.is_terminal else Console(width=max(120, console.width))


def _table(*names: str) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _median(summary: Data) -> str:
    """Milliseconds, with half the width of the median's 95 % interval where there is one."""
    if not summary.get("n"):
        return "-"
    text, interval = f"{summary['median'] * 1000:.2f}", (summary.get("p50") or {}).get("ci95")
    if not interval or not summary["median"]:
        return text
    return f"{text} ±{(interval[1] - interval[0]) / 2 / summary['median']:.0%}"


def _quantile(summary: Data, name: str, scale: float = 1000) -> str:
    found = summary.get(name, {})
    return f"{found['value'] * scale:.2f}" if "value" in found else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _flops(value: float | None) -> str:
    if value is None:
        return "FLOP/s unknown"
    return f"{value / 1e12:.4g} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.4g} GFLOP/s"


def _rate(value: float | None) -> str:
    return "bandwidth unknown" if value is None else f"{value / 1e9:.4g} GB/s"
