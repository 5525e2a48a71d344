"""The plots of a report: from records to matplotlib figures, every axis with its unit.

for name, figure in draw(records, "en"): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from surefoot.report.records import At, Records, known, value
from surefoot.report.style import GRID, INK, MARKERS, PAPER, SERIES, SOFT, settings
from surefoot.report.texts import Texts

SIZE = (6.2, 3.35)


def draw(records: Records, texts: Texts) -> Iterator[tuple[str, Any]]:
    """(name, figure) of every plot for which there are numbers."""
    import logging
    import warnings

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    with pyplot.rc_context(settings()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*missing from font")
        for name, plot in PLOTS.items():
            figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
            if plot(axes, records, texts):
                axes.set_title(texts[f"plot_{name}"])
                yield name, figure
            pyplot.close(figure)


def _axes(axes: Any, x: str, y: str, log: str = "") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xlabel(x)
    axes.set_ylabel(y)
    for side, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if side in log:
            (axes.set_xscale if side == "x" else axes.set_yscale)("log")
            low, high = axes.get_xlim() if side == "x" else axes.get_ylim()
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
            axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axis.set_minor_formatter(NullFormatter())


def _steps(axes: Any, values: Sequence[float]) -> None:
    """Powers-of-two like values, evenly apart, each with its own tick."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(values))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def _series(axes: Any, number: int, points: list[tuple[Any, Any]], label: str, **style: Any) -> None:
    points = sorted(p for p in points if p[0] is not None and p[1] is not None)
    look = {"color": SERIES[number % 4], "marker": MARKERS[number % 4], "markeredgecolor": PAPER} | style
    axes.plot([p[0] for p in points], [p[1] for p in points], label=label, **look)


def _points(records: Records) -> list[At]:
    return [p for p in records["bench"]["points"] if p["decode"]]


def _by(points: list[At], name: str) -> list[Any]:
    return sorted({value(p[name]) for p in points})


def kl_by_position(axes: Any, records: Records, t: Texts) -> bool:
    rows = list(records["precision"]["kl_by_position"])
    if not rows:
        return False
    middle = [(value(r["position"]) + value(r["to"])) / 2 for r in rows]
    styles: dict[str, dict[str, Any]] = {"mean": {}, "dtype": {"linestyle": "--"}, "max": {"linewidth": 0}}
    for number, (name, style) in enumerate(styles.items()):
        points = [(x, value(r[name]) or None) for x, r in zip(middle, rows)]
        _series(axes, number, points, t[f"kl_{name}"], **style)
    _axes(axes, t["position_tokens"], t["kl_nats"], "y")
    axes.legend()
    return True


def error_by_layer(axes: Any, records: Records, t: Texts) -> bool:
    rows = list(records["precision"]["error_by_module"])
    if not rows:
        return False
    allowed = [value(r["null_most"]) for r in rows]
    axes.axhline(1.0, color=SOFT, linewidth=1, linestyle=":")
    layer = [i for i, r in enumerate(rows) if value(r["path"]).rpartition(".")[2].isdigit()]
    axes.plot(range(len(rows)), [value(r["error"]) for r in rows], color=SERIES[0], linewidth=1.2, alpha=0.5)
    for name, chosen, number in (("modules", sorted(set(range(len(rows))) - set(layer)), 0), ("layers", layer, 1)):
        points = [(i, value(rows[i]["error"])) for i in chosen]
        _series(axes, number, points, t[f"error_{name}"], linewidth=0)
    if all(a is not None for a in allowed):
        axes.plot(range(len(rows)), allowed, color=SOFT, linewidth=1.2, linestyle="--", label=t["error_null"])
    _axes(axes, t["modules_in_order"], t["error_unit"])
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return True


def decode_by_batch(axes: Any, records: Records, t: Texts) -> bool:
    points = _points(records)
    longest = max((value(p["output_len"]) for p in points), default=0)
    batches = _by(points, "batch")
    for number, length in enumerate(_by(points, "prompt_len")):
        mine = [p for p in points if p["prompt_len"] == length and p["output_len"] == longest]
        rates = [(value(p["batch"]), value(p["decode"]["tokens_per_s"])) for p in mine]
        _series(axes, number, rates, t["prompt_of"].format(length))
    if batches:
        _axes(axes, t["batch_sequences"], t["decode_tok_s"])
        _steps(axes, batches)
        axes.set_ylim(bottom=0)
        axes.legend()
    return bool(batches)


def prefill_by_length(axes: Any, records: Records, t: Texts) -> bool:
    points = _points(records)
    lengths = _by(points, "prompt_len")
    for number, batch in enumerate(_by(points, "batch")):
        mine = {value(p["prompt_len"]): value(p["prefill"]["tokens_per_s"]) for p in points if p["batch"] == batch}
        _series(axes, number, list(mine.items()), t["batch_of"].format(batch))
    if lengths:
        _axes(axes, t["prompt_tokens"], t["prefill_tok_s"])
        _steps(axes, lengths)
        axes.set_ylim(bottom=0)
        axes.legend()
    return bool(lengths)


def time_by_output(axes: Any, records: Records, t: Texts) -> bool:
    points = _points(records)
    lengths = _by(points, "output_len")
    shortest = min((value(p["prompt_len"]) for p in points), default=0)
    for number, batch in enumerate(_by(points, "batch")):
        mine = [p for p in points if p["batch"] == batch and p["prompt_len"] == shortest]
        times = [(value(p["output_len"]), value(p["generation_s"]["median"])) for p in mine]
        _series(axes, number, times, t["batch_of"].format(batch))
    if lengths:
        _axes(axes, t["output_tokens"], t["generation_s"])
        axes.set_ylim(bottom=0)
        axes.legend()
    return len(lengths) > 1


def _load(records: Records) -> list[At]:
    return [p for p in records["load"]["points"] if p["latency"]]


def latency_by_concurrency(axes: Any, records: Records, t: Texts) -> bool:
    points = _load(records)
    for number, metric in enumerate(("ttft", "tpot")):
        times = [(value(p["concurrency"]), p["latency"][f"{metric}@surefoot"]) for p in points]
        _series(axes, number, [(c, 1e3 * (value(s["median"]) or 0)) for c, s in times], t[f"{metric}_median"])
        high = [(c, 1e3 * value(s["p90"]["value"])) for c, s in times if known(s["p90"]["value"])]
        _series(axes, number, high, t[f"{metric}_p90"], linestyle="--", alpha=0.6)
    if points:
        _axes(axes, t["concurrency_requests"], t["latency_ms"], "y")
        _steps(axes, [value(p["concurrency"]) for p in points])
        axes.legend(ncols=2)
    return bool(points)


def throughput_by_concurrency(axes: Any, records: Records, t: Texts) -> bool:
    points = _load(records)
    rates = [(value(p["concurrency"]), value(p["output_tokens_per_s"])) for p in points]
    _series(axes, 2, rates, t["server_output"])
    if points:
        _axes(axes, t["concurrency_requests"], t["output_tok_s"])
        _steps(axes, [value(p["concurrency"]) for p in points])
        axes.set_ylim(bottom=0)
        axes.legend()
    return bool(points)


def roofline(axes: Any, records: Records, t: Texts) -> bool:
    roof = records["estimate"]["roofline"]
    peak, bandwidth = value(roof["peak_flops_per_s"]), value(roof["bytes_per_s"])
    points = list(roof["points"])
    if not (peak and bandwidth and points):
        return False
    xs = [value(p["intensity"]) for p in points]
    low, high = min(*xs, peak / bandwidth) / 3, max(*xs, peak / bandwidth) * 3
    grid = [low, peak / bandwidth, high]
    axes.plot(grid, [min(peak, x * bandwidth) / 1e9 for x in grid], color=INK, linewidth=1.6, label=t["roof"])
    axes.axvline(peak / bandwidth, color=GRID, linewidth=1)
    for number, phase in enumerate(("prefill", "decode")):
        mine = [(value(p["intensity"]), value(p["flops_per_s"]) / 1e9) for p in points if p["phase"] == phase]
        _series(axes, number, mine, t[f"measured_{phase}"], linewidth=0)
    _axes(axes, t["intensity"], t["gflops"], "xy")
    axes.legend(loc="lower right")
    return True


def predicted_measured(axes: Any, records: Records, t: Texts) -> bool:
    points = [p for p in records["estimate"]["points"] if known(p["predicted"]["expected"])]
    if not points:
        return False
    every: list[float] = []
    for number, phase in enumerate(("prefill", "decode")):
        mine = [p for p in points if p["phase"] == phase]
        x = [1e3 * value(p["measured"]) for p in mine]
        low, mid, high = ([1e3 * value(p["predicted"][k]) for p in mine] for k in ("low", "expected", "high"))
        bars = [[m - a for m, a in zip(mid, low)], [b - m for m, b in zip(mid, high)]]
        look = {"color": SERIES[number], "marker": MARKERS[number], "linestyle": "none", "elinewidth": 1, "capsize": 2}
        axes.errorbar(x, mid, yerr=bars, label=t[f"measured_{phase}"], **look)
        every += [*x, *low, *high]
    ends = [min(every) * 0.8, max(every) * 1.25]
    axes.plot(ends, ends, color=SOFT, linewidth=1, linestyle=":", label=t["exact"])
    _axes(axes, t["measured_ms"], t["predicted_ms"], "xy")
    axes.legend(loc="upper left")
    return True


PLOTS: dict[str, Callable[[Any, Records, Texts], bool]] = {
    "kl_by_position": kl_by_position,
    "error_by_layer": error_by_layer,
    "decode_by_batch": decode_by_batch,
    "prefill_by_length": prefill_by_length,
    "time_by_output": time_by_output,
    "latency_by_concurrency": latency_by_concurrency,
    "throughput_by_concurrency": throughput_by_concurrency,
    "roofline": roofline,
    "predicted_measured": predicted_measured,
}
