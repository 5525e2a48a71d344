"""The page that a drill leaves: totals, each fault with what was said of it, the confusion matrix, the sound runs."""

from __future__ import annotations

from surefoot.verify.drill import DETECTED, RIGHT_CAUSE, RIGHT_MODULE, DrillResult, Outcome
from surefoot.verify.faults import CAUSE_CLASSES, catalogue

HEAD = """\
# The drill

Faults planted in the canaries, in random models and in the engine's paths, and sound runs beside them. Each goes
through the same proof as a user's model, which knows nothing of the fault. Made by `make drill`; do not edit.

A cause is named only if that very mistake, made in the reference, gives the target's output down to the noise. The
catalogue of mistakes and the faults come from the same list of field reports, so the table says that the list works; a
fault that is not on it is found and placed all the same, and gets no name."""


def page(result: DrillResult) -> str:
    """Markdown."""
    parts = [HEAD, _totals(result), _by_class(result), _smallest(result), _sound(result)]
    parts += [_faults(result), _confusion(result)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _totals(result: DrillResult) -> str:
    planted, sound = result.planted, result.sound
    faults = {o.case.fault.id for o in planted if o.case.fault}
    alarms = len(result.false_alarms)
    bound = 1 - 0.05 ** (1 / len(sound)) if sound and not alarms else None
    note = f"at most {bound:.1%} in truth (95 %)" if bound is not None else "too many"
    rows = [
        ("faults detected", f"{result.share(lambda o: o.detected):.1%}", f"{DETECTED:.0%}"),
        ("right module", f"{result.share(lambda o: o.right_module):.1%}", f"≥ {RIGHT_MODULE:.0%}"),
        ("right cause", f"{result.share(lambda o: o.right_cause):.1%}", f"≥ {RIGHT_CAUSE:.0%}"),
        ("false alarms", f"{alarms} of {len(sound)} sound runs: {note}", "0"),
    ]
    undecided = sum(o.verdict == "undecided" for o in result.outcomes)
    lines = [f"{len(planted)} runs with one of {len(faults)} faults, {len(sound)} sound runs, {undecided} undecided."]
    lines += ["", "| | found | must be |", "| --- | --- | --- |", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]
    return "\n".join(lines)


def _by_class(result: DrillResult) -> str:
    lines = [
        "## By class of cause",
        "",
        "| class | runs | detected | module | cause |",
        "| --- | --- | --- | --- | --- |",
    ]
    for number, name in CAUSE_CLASSES.items():
        runs = [o for o in result.planted if o.case.fault and o.case.fault.cause == number]
        counts = [sum(good) for good in zip(*((o.detected, o.right_module, o.right_cause) for o in runs))] or [0, 0, 0]
        lines.append(f"| {number} {name} | {len(runs)} | {counts[0]} | {counts[1]} | {counts[2]} |")
    return "\n".join(lines)


def _smallest(result: DrillResult) -> str:
    """What is just seen; and what 16 bits hide."""
    if not result.smallest:
        return ""
    lines = ["## The smallest faults that are seen", ""]
    lines.append("Faults made smaller until the measured checks let them pass, step by step of about a factor of two.")
    for where, faults in result.smallest.items():
        lines += ["", f"{where}:", "", *(f"- {fault['text']}" for fault in faults)]
    hidden = ", ".join(f.id for f in catalogue().values() if f.subtle)
    lines += ["", f"Not planted in bf16, whose own noise is larger than they are: {hidden}."]
    return "\n".join(lines)


def _faults(result: DrillResult) -> str:
    lines = ["## Every fault", "", "| fault | in | first check that failed | module | op | cause named |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for outcome in result.planted:
        lines.append(_row(outcome))
    return "\n".join(lines)


def _row(outcome: Outcome) -> str:
    fault = outcome.case.fault
    assert fault is not None
    module = f"`{outcome.module}`" if outcome.module else "–"
    marks = ("" if outcome.right_module else " ✗", "" if outcome.right_cause else " ✗")
    check = outcome.check if outcome.detected else f"**{outcome.verdict}**"
    said = f"{outcome.cause or '–'}{marks[1]}: {outcome.sentence}" if outcome.cause else f"–{marks[1]}"
    where = f"{outcome.case.specimen.name}, {outcome.case.dtype}"
    cells = [fault.id, where, check, module + marks[0], outcome.op or "–", said]
    return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"


def _confusion(result: DrillResult) -> str:
    """Rows that hold more than the right name; the rest is diagonal."""
    table = result.confusion()
    lines = ["## Confusion", "", "Planted fault, then what it was called and how often.", ""]
    lines += ["| planted | called |", "| --- | --- |"]
    for fault, row in table.items():
        called = ", ".join(f"{name} × {count}" for name, count in sorted(row.items(), key=lambda e: -e[1]))
        lines.append(f"| {fault} | {called} |")
    return "\n".join(lines)


def _sound(result: DrillResult) -> str:
    dtypes = sorted({o.case.dtype for o in result.sound})
    lines = ["## Sound runs", "", "| model | " + " | ".join(dtypes) + " |", "| --- |" + " --- |" * len(dtypes)]
    for name in dict.fromkeys(o.case.specimen.name for o in result.sound):
        cells = []
        for dtype in dtypes:
            runs = [o for o in result.sound if o.case.specimen.name == name and o.case.dtype == dtype]
            cells.append(f"{sum(o.verdict == 'proven' for o in runs)} of {len(runs)} proven")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    ways = "Each in four ways: plain; chunks of 7; chunks of 64 with two requests at a time; reference ops."
    schemes = sorted({str(o.case.quant) for o in result.sound if o.case.quant})
    lines += ["", ways + (f" Some also quantised: {', '.join(schemes)}." if schemes else "")]
    lines += [f"- **{o.verdict}**: {o.case.name}: {o.line}" for o in result.sound if o.verdict != "proven"]
    return "\n".join(lines)
