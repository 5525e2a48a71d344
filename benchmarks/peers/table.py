"""Results of `bench_peers.py` as a line on the screen and as Markdown."""

from __future__ import annotations

import statistics

# What is asked for: least ratio to each family, least share of the machine's limit.
TARGETS: dict[tuple[str, str], dict[str, float]] = {
    ("int8", "decode-1"): {"llama.cpp Q8_0": 1.3, "transformers": 3.3, "limit": 0.85},
    ("int4", "decode-1"): {"llama.cpp Q4_0": 1.5, "transformers": 6, "limit": 0.80},
    ("int8", "decode-8"): {"llama.cpp Q8_0": 2.2, "transformers": 9, "limit": 0.75},
    ("int4", "decode-8"): {"llama.cpp Q4_0": 2.3, "transformers": 8},
    ("int4-a8", "decode-1"): {"llama.cpp Q4_0": 1.5, "transformers": 6, "limit": 0.80},
    ("int4-a8", "decode-8"): {"llama.cpp Q4_0": 2.3, "transformers": 8},
    ("bf16", "decode-1"): {"llama.cpp F16": 1.0, "transformers": 1.8, "limit": 0.80},
    ("int8", "prefill-512"): {"llama.cpp Q8_0": 1.8, "llama.cpp best": 1.2, "transformers": 1.6, "limit": 0.75},
    ("int8", "load"): {"llama.cpp Q8_0": 1.0, "transformers": 3},
}
TARGETS_OF = "Llama family"
# Which multiply-adds a group's kernels do, and hence which peak they are held against.
PEAK = {"int8": "int8", "int4": "int16", "int4-a8": "int8", "bf16": "bf16"}


def ours(run: dict) -> str:
    return next(name for name, family in run["families"].items() if family == "surefoot")


def ratios(run: dict, name: str) -> list[float]:
    return sorted(theirs / mine for mine, theirs in zip(run["seconds"][ours(run)], run["seconds"][name]))


def speed(run: dict, name: str) -> str:
    middle = statistics.median(run["seconds"][name])
    return f"{middle:.2f} s" if run["case"] == "load" else f"{run['tokens'] / middle:.1f} tok/s"


def limit(run: dict) -> dict[str, float] | None:
    """Shares of the bandwidth and of the multiply-add peak, each with its turn's own limits, as medians; `share` is the
    time that the binding limit needs, divided by the time taken."""
    if "limits" not in run:
        return None
    work = run["about"][ours(run)]["work"]
    rows = 1 if run["case"].startswith("prefill") else run["tokens"]
    need_bytes = work["bytes"] + work["head_bytes"] + rows * work.get("state_bytes", 0)
    need_macs = work["macs"] * run["tokens"] + work["head_macs"] * rows
    found: dict[str, list[float]] = {"bandwidth": [], "peak": [], "share": []}
    for took, limits in zip(run["seconds"][ours(run)], run["limits"]):
        read, multiply = need_bytes / limits["read"] / took, need_macs / limits[PEAK[run["group"]]] / took
        for key, value in (("bandwidth", read), ("peak", multiply), ("share", max(read, multiply))):
            found[key].append(value)
    return {key: statistics.median(values) for key, values in found.items()}


def line(run: dict) -> str:
    cells = [f"{run['group']} {run['case']}: {ours(run)} {speed(run, ours(run))}"]
    for name in list(run["seconds"])[1:]:
        r = ratios(run, name)
        cells.append(f"{name} {speed(run, name)} -> {statistics.median(r):.2f}x ({r[0]:.2f}..{r[-1]:.2f})")
    if shares := limit(run):
        cells.append(f"{shares['bandwidth']:.0%} of bandwidth, {shares['peak']:.0%} of {PEAK[run['group']]} peak")
    return " | ".join(cells)


def render(runs: list[dict]) -> str:
    newest: dict[tuple[str, str, str], dict] = {(r["model"], r["group"], r["case"]): r for r in runs}
    return "\n\n".join(
        _model(m, [r for r in newest.values() if r["model"] == m]) for m in {r["model"]: 0 for r in runs}
    )


def _model(model: str, runs: list[dict]) -> str:
    judged = model.startswith("llama")
    lines = [
        f"{model}, {runs[-1]['threads']} threads, {runs[-1]['machine']['cpu']}",
        "",
        "| | Surefoot | against | ratio, median (min..max of the pairs) | asked for |",
        "| --- | --- | --- | --- | --- |",
    ]
    for run in sorted(runs, key=lambda r: (list(PEAK).index(r["group"]), r["case"])):
        asked = TARGETS.get((run["group"], run["case"]), {}) if judged else {}
        mine = f"{run['group']} {run['case']} | {speed(run, ours(run))}"
        for name in list(run["seconds"])[1:]:
            r = ratios(run, name)
            middle, want = statistics.median(r), asked.get(run["families"][name])
            verdict = "" if want is None else f"≥ {want:g}: {'met' if middle >= want else 'not met'}"
            lines.append(f"| {mine} | {name} {speed(run, name)} | {middle:.2f} ({r[0]:.2f}..{r[-1]:.2f}) | {verdict} |")
            mine = " | "
        if shares := limit(run):
            want = asked.get("limit")
            verdict = "" if want is None else f"≥ {want:.0%}: {'met' if shares['share'] >= want else 'not met'}"
            what = f"{shares['bandwidth']:.0%} of bandwidth, {shares['peak']:.0%} of {PEAK[run['group']]} peak"
            lines.append(f"| | | the machine's limit | {what} | {verdict} |")
    return "\n".join(lines)
