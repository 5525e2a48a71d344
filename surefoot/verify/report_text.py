"""A proof on one screen, and the difference between two."""

from __future__ import annotations

import textwrap
from typing import Any

from surefoot.verify.proof import Proof
from surefoot.verify.shapes import Finding

MARKS = {"pass": "ok", "fail": "FAIL", "undecided": "?", "not_possible": "-", "not_reached": "."}
WIDTH = 118


def lines(proof: Proof) -> list[str]:
    """Verdict, checks, module and cause, sensitivity."""
    data = proof.data
    out = [headline(proof)]
    for finding in _merged(_grouped(proof.findings)):
        mark = "" if finding.check == "cost" else MARKS[finding.status]  # nothing is judged there
        out += _wrapped(f"  {mark:4} {finding.check:9} ", finding.summary)
    place, cause = data.get("localisation"), data.get("cause")
    if place:
        op = f", op {place['op']}" if place.get("op") else ""
        out.append(f"  where    {place['module']}{op}: its own error is {_times(place)} its budget")
    if cause:
        out += _wrapped("  cause    ", cause["sentence"])
    elif place:
        out.append("  cause    not in the catalogue: no known mistake gives this output")
    out += [line for note in data.get("notes", []) for line in _wrapped("  note     ", note)]
    out += _sensitivity(data.get("sensitivity") or {}) + _took(data)
    target, prompts = data["target"], data["prompts"]
    versions = target.get("versions") or {}
    stack = ", ".join(f"{k} {v}" for k, v in versions.items() if k in ("surefoot", "torch", "transformers"))
    out.append(f"  over     {prompts['count']} prompts ({prompts['source']}), {prompts['tokens']} tokens; {stack}")
    return out


def _grouped(findings: list[Finding]) -> list[Finding]:
    """Checks with several findings: those that passed in one line, the others as they are."""
    out: list[Finding] = []
    for check in dict.fromkeys(f.check for f in findings):
        mine = [f for f in findings if f.check == check]
        good = [f for f in mine if f.status == "pass"]
        if len(good) > 1:
            closest = max((float(f.details.get("ratio", 0.0)) for f in good), default=0.0)
            near = f"; the closest used {closest:.0%} of what is allowed" if closest else ""
            skipped = [str(f.details.get("path", f.summary)) for f in mine if f.status == "not_possible"]
            near += f"; not possible: {', '.join(skipped)}" if skipped else ""
            out.append(Finding(check, "pass", f"{len(good)} paths lead to the same numbers{near}"))
            mine = [f for f in mine if f.status not in ("pass", "not_possible")]
        out += mine
    return out


def _merged(findings: list[Finding]) -> list[Finding]:
    """Neighbours of which the same is said, in one line."""
    out: list[Finding] = []
    for finding in findings:
        if out and (out[-1].status, out[-1].summary) == (finding.status, finding.summary) and finding.status != "fail":
            out[-1] = Finding(f"{out[-1].check}, {finding.check}", finding.status, finding.summary)
        else:
            out.append(finding)
    return out


def headline(proof: Proof) -> str:
    data = proof.data
    target = data["target"]
    scheme = (target.get("quant") or {}).get("scheme")
    kind = ", ".join([str(target.get("dtype", "?")), *([scheme] if scheme else [])])
    where = f"{target.get('device', '?')} in {kind} ({target.get('backend', '?')})"
    name = data["model"]["name"]
    if proof.partial:
        return f"PARTIAL: the verification of {name} on {where} was interrupted; what was found until then:"
    says = {
        "proven": "computes what the reference computes, within the noise of its dtype",
        "refuted": "does NOT compute what the reference computes",
        "undecided": "could not be decided",
    }[proof.verdict]
    return f"{proof.verdict.upper()}: {name} on {where} {says}"


def _times(place: dict[str, Any]) -> str:
    own, budget = place.get("own_error"), place.get("budget")
    if not isinstance(own, (int, float)) or not isinstance(budget, (int, float)) or not budget:
        return "beyond"
    return f"{own / budget:.3g} times"


def _sensitivity(found: dict[str, Any]) -> list[str]:
    parts = []
    if "logit_scale" in found:
        parts.append(f"logits {_percent(found['logit_scale'])} too large or small")
        parts.append(f"one token's logits off by {_percent(found['one_token'])} of their spread (RMS)")
    parts += [str(f["text"]) for f in found.get("faults", [])]
    return [f"  {'catches' if i == 0 else '':7}  {part}" for i, part in enumerate(parts)]


def _took(data: dict[str, Any]) -> list[str]:
    """The time of the whole, and what it costs to keep the activations of a pass."""
    seconds = sum((data.get("seconds") or {}).values())
    capture = (data.get("calibration") or {}).get("capture")
    if not seconds:
        return []
    line = f"{seconds:.0f} s"
    if capture:
        plain, kept = capture["plain_s"], capture["capturing_s"]
        line += f"; a pass over {capture['tokens']} tokens {plain:.3g} s, {kept:.3g} s with its activations kept"
    return [f"  took     {line}"]


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head)) or [head]


def _cut(text: str) -> str:
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."


def diff(a: Proof, b: Proof) -> list[str]:
    """What differs: verdict, checks, what was compared, and the figures of the logits."""
    out = []
    if a.verdict != b.verdict:
        out.append(f"verdict: {a.verdict} -> {b.verdict}")
    out += _diff_tree("", _facts(a), _facts(b))
    ours, theirs = ({(f.check, i): f for i, f in enumerate(p.findings)} for p in (a, b))
    for key in sorted(ours.keys() | theirs.keys(), key=lambda k: k[1]):
        x, y = ours.get(key), theirs.get(key)
        if x is None or y is None or (x.status, x.summary) != (y.status, y.summary):
            out.append(f"{key[0]}: {_status(x)} -> {_status(y)}")
    return out


def _facts(proof: Proof) -> dict[str, Any]:
    data = proof.data
    keys = ("model", "reference", "target", "settings", "rules", "calibration", "localisation", "cause", "sensitivity")
    return {k: data.get(k) for k in keys} | {"prompts": {k: data["prompts"][k] for k in ("source", "sha256", "tokens")}}


def _diff_tree(path: str, a: Any, b: Any) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        found: list[str] = []
        for key in sorted(a.keys() | b.keys()):
            found += _diff_tree(f"{path}.{key}" if path else key, a.get(key), b.get(key))
        return found
    return [] if a == b else [f"{path}: {_cut(str(a))} -> {_cut(str(b))}"]


def _status(finding: Any) -> str:
    return "absent" if finding is None else f"{finding.status} ({_cut(finding.summary)})"
