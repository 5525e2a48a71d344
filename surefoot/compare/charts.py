"""The comparison as grouped bars: per prompt time, time per token and length; per side load, memory, checks, scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surefoot.compare.summary import scores_of

COLOURS = ("#0f62c0", "#c2410c", "#117a50", "#8250df", "#59636e", "#b58900")
FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "PingFang SC", "Microsoft YaHei"]
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#d8dee4",
    "legend.frameon": False,
    "svg.hashsalt": "surefoot",
}
Groups = list[tuple[str, list["float | None"]]]  # (label under the group, a value per side)


def draw(record: Mapping[str, Any], *files: Path) -> None:
    """One figure into every file; the suffix says the form."""
    import logging

    from matplotlib import font_manager
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.style import context

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    have = {font.name for font in font_manager.fontManager.ttflist}
    with context({**STYLE, "font.family": [f for f in FONTS if f in have]}):
        figure = Figure(figsize=(11, 10), layout="constrained")
        FigureCanvasAgg(figure)
        _fill(figure, record)
        for file in files:
            figure.savefig(file, dpi=130, facecolor="white", metadata={"Date": None} if file.suffix == ".svg" else None)


def _fill(figure: Any, record: Mapping[str, Any]) -> None:
    names = list(record["sides"])
    grid = figure.add_gridspec(4, 4)
    per_prompt = (
        ("Time per question or completion, median of the passes", "seconds", lambda p: p["seconds"]),
        ("Time per output token, prompt included", "ms per token", lambda p: _times(p["seconds_per_token"], 1e3)),
        ("Length of answers", "tokens", lambda p: p["tokens"]),
    )
    for row, (title, unit, value) in enumerate(per_prompt):
        axes = figure.add_subplot(grid[row, :])
        _bars(axes, names, _by_prompt(record, value), title, unit, "prompt")
        if row == 0:
            axes.legend(names, ncols=min(4, len(names)), loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    sides = list(record["sides"].values())
    small: list[tuple[str, str, Groups]] = [
        ("Load time", "seconds", [("", [(s.get("facts") or {}).get("load_s") for s in sides])]),
        ("Memory", "MiB", _memory(sides)),
        ("Known answers", "% right", [("", [_share(s["summary"]["checks"]) for s in sides])]),
        ("Scores, mean", "1 (worst) to 5", _scores(record)),
    ]
    for column, (title, unit, groups) in enumerate(small):
        axes = figure.add_subplot(grid[3, column])
        _bars(axes, names, groups, title, unit, "")
        axes.tick_params(axis="x", length=0)
        if title == "Known answers":
            axes.set_ylim(0, 110)
        if title == "Scores, mean" and groups:
            axes.set_ylim(0, 5.5)


def _bars(axes: Any, names: Sequence[str], groups: Groups, title: str, unit: str, across: str) -> None:
    width = 0.8 / len(names)
    for i, _ in enumerate(names):
        offset = (i - (len(names) - 1) / 2) * width
        places = [g + offset for g in range(len(groups))]
        heights = [values[i] or 0.0 for _, values in groups]
        axes.bar(places, heights, width * 0.92, color=COLOURS[i % len(COLOURS)])
        for place, (_, values) in zip(places, groups):
            if values[i] is None or not across:  # a few bars have their value on them
                said = "n/a" if values[i] is None else f"{values[i]:.3g}"
                axes.text(place, values[i] or 0.0, said, ha="center", va="bottom", fontsize=7)
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.set_xlabel(across)
    axes.set_xticks(range(len(groups)), [label for label, _ in groups])
    if not groups:
        axes.text(0.5, 0.5, "none given", ha="center", va="center", transform=axes.transAxes, color="#59636e")
        axes.set_yticks([])


def _by_prompt(record: Mapping[str, Any], value: Any) -> Groups:
    sides = [side["summary"]["prompts"] for side in record["sides"].values()]
    ids = [p["id"] for p in record["prompts"]]
    return [(i, [value(s[i]) if i in s else None for s in sides]) for i in ids]


def _memory(sides: Sequence[Mapping[str, Any]]) -> Groups:
    held = [(s.get("facts") or {}).get("memory") or {} for s in sides]
    rows = (("weights", "weight_bytes"), ("peak", "peak_bytes"))
    return [(label, [_times(m.get(key), 2**-20) for m in held]) for label, key in rows]


def _scores(record: Mapping[str, Any]) -> Groups:
    if not any(s["status"] == "scored" for s in record["scores"]):
        return []
    each = [scores_of(record["scores"], name, record["rubric"])["dimensions"] for name in record["sides"]]
    return [(dimension[:6], [e[dimension]["mean"] for e in each]) for dimension in record["rubric"]]


def _share(checks: Mapping[str, int]) -> float | None:
    return 100 * checks["passed"] / checks["run"] if checks["run"] else None


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
