"""A comparison on one screen: a row per figure, a column per side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from surefoot.compare.summary import scores_of

Record = Mapping[str, Any]
Figure = Callable[[Mapping[str, Any]], str]
OF_FACTS = ("runs on", "proof", "template", "load", "weights", "peak memory")
MISSED = 6  # failed checks that are listed


def show(record: Record, console: Console | None = None) -> None:
    console = console or Console()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    for name in record["sides"]:
        table.add_column(Text(name), justify="right", overflow="fold")
    for what, figure in _figures(record).items():
        cells = [figure(side) if _has(side, what) else "-" for side in record["sides"].values()]
        if any(cell != "-" for cell in cells):
            table.add_row(what, *(Text(cell, style=_style(cell)) for cell in cells))
    console.print(table)
    for line in _remarks(record):
        console.print(Text(line), soft_wrap=True)


def _has(side: Mapping[str, Any], what: str) -> bool:
    return bool(side.get("facts")) if what in OF_FACTS else "summary" in side


def _style(cell: str) -> str:
    return {"PROVEN": "green", "UNPROVEN": "bold yellow"}.get(cell.split(" ")[0], "")


def _figures(record: Record) -> dict[str, Figure]:
    figures: dict[str, Figure] = {
        "runs on": lambda s: _place(s["facts"]["info"]),
        "proof": lambda s: s["proof"]["status"],
        "template": lambda s: _template(s["facts"]["template"]),
        "load": lambda s: _unit(s["facts"]["load_s"], "s"),
        "weights": lambda s: _bytes(s["facts"]["memory"].get("weight_bytes")),
        "peak memory": lambda s: _bytes(s["facts"]["memory"].get("peak_bytes")),
        "per question, median": lambda s: _unit(s["summary"]["seconds_per_question"], "s"),
        "per completion, median": lambda s: _unit(s["summary"]["seconds_per_completion"], "s"),
        "per token, all in": lambda s: _ms(s["summary"]["seconds_per_token"]),
        "per token, decode": lambda s: _ms(s["summary"]["decode_seconds_per_token"]),
        "first token, median": lambda s: _ms(s["summary"]["ttft_s"]),
        "answer, mean": lambda s: _length(s["summary"]),
        "known answers": lambda s: _checks(s["summary"]["checks"]),
    }
    if record["scores"]:
        for dimension in record["rubric"]:
            figures[f"{dimension}, 1-5"] = _scored(record, dimension)
        figures["not scored"] = lambda s: str(_scores(record, s)["not_scored"] or "-")
    return figures


def _scores(record: Record, side: Mapping[str, Any]) -> dict[str, Any]:
    return scores_of(record["scores"], side["written"]["name"], record["rubric"])


def _scored(record: Record, dimension: str) -> Figure:
    def figure(side: Mapping[str, Any]) -> str:
        value = _scores(record, side)["dimensions"][dimension]
        return "-" if value["mean"] is None else f"{value['mean']:.2f} (n={value['n']})"

    return figure


def _remarks(record: Record) -> list[str]:
    lines = [f"failed: {side['error']}" for side in record["sides"].values() if side["error"]]
    unproven: dict[str, list[str]] = {}
    for name, side in record["sides"].items():
        if side.get("proof") and side["proof"]["status"] != "PROVEN":
            unproven.setdefault(side["proof"]["reason"], []).append(name)
    lines += [f"unproven: {', '.join(names)}: {reason}" for reason, names in unproven.items()]
    missed = [
        f"wrong: {name}, {prompt}: {check['why']}"
        for name, side in record["sides"].items()
        for prompt, p in side["summary"]["prompts"].items()
        for check in p["checks"]
        if check["passed"] is False
    ]
    lines += missed[:MISSED] + ([f"wrong: {len(missed) - MISSED} more in the record"] if len(missed) > MISSED else [])
    lines += [f"mind: {line}" for line in [*record["cautions"], *record["host"]["warnings"]]]
    if record["partial"]:
        lines.append("partial: this comparison was not finished")
    return lines


def _place(info: Mapping[str, Any]) -> str:
    quant = (info.get("quant") or {}).get("scheme")
    parts = [info.get("backend"), info.get("device"), info.get("dtype"), quant]
    return " ".join(str(p) for p in parts if p)


def _template(template: Mapping[str, Any]) -> str:
    """The file inside the model's folder and the beginning of its digest."""
    if template["sha256"] is None:
        return template["name"].split(" (")[0].split(":")[0]
    return f"its own, {template['sha256'][:8]}"


def _bytes(n: float | None) -> str:
    if not n:
        return "-"
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"


def _checks(checks: Mapping[str, int]) -> str:
    skipped = f", {checks['not_run']} not run" if checks["not_run"] else ""
    return f"{checks['passed']} of {checks['run']}{skipped}" if checks["run"] or skipped else "-"


def _length(summary: Mapping[str, Any]) -> str:
    tokens, characters = summary["tokens_per_answer"], summary["characters_per_answer"]
    if characters is None:
        return "-"
    return (f"{tokens:.1f} tokens, " if tokens is not None else "") + f"{characters:.0f} characters"


def _unit(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.3g} {unit}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value * 1e3:.3g} ms"
