"""The verdict as a pure function of the evidence that is stored in the proof, so that anyone can repeat it offline.

`decide(evidence)` goes through the checks in their order. After the first that fails the later ones are "not reached".
Refuted: a check failed. Undecided: none failed, but one could not tell, or the logits could not be compared.
Proven: the logits passed and nothing else failed; checks that were not possible are named in the findings.
A server is a black box: what endpoint.py found on it is evidence as it stands, but its logits are judged here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from surefoot.verify.judge import Judgement, Series, judge, logit_series
from surefoot.verify.pack import unpack, unpack_index, unpack_rows
from surefoot.verify.shapes import CHECKS, Finding, Verdict
from surefoot.verify.summary import summary

LEAST_TOKENS = 64
Evidence = dict[str, Any]


def decide(evidence: Evidence) -> tuple[Verdict, list[Finding]]:
    findings = [_of_server(Finding(**f)) for f in evidence.get("endpoint", {}).get("findings", ())]
    for check in CHECKS if "endpoint" not in evidence else ():
        findings += examine(check, evidence, stopped=any(f.status == "fail" for f in findings))
    if "cost" in evidence:
        findings.append(cost_finding(evidence["cost"]))
    statuses = {f.status for f in findings}
    if "fail" in statuses:
        return "refuted", findings
    logits = next((f for f in findings if f.check == "logits"), None)
    if "undecided" in statuses or logits is None or logits.status != "pass":
        return "undecided", findings
    return "proven", findings


def examine(check: str, evidence: Evidence, stopped: bool = False) -> list[Finding]:
    """Findings of one check; usually one, several for parity."""
    given = evidence.get(check)
    if stopped or given is None:
        return [Finding(check, "not_reached", "an earlier check failed" if stopped else "not run")]
    if "not_possible" in given:
        return [Finding(check, "not_possible", str(given["not_possible"]))]
    found = _EXAMINE[check](given)
    return found if isinstance(found, list) else [found]


def _of_server(told: Finding) -> Finding:
    """What endpoint.py found; logits are judged anew, from the raw numbers that came with them."""
    if "raw" not in told.details:
        return told
    (found,) = examine("logits", {"logits": told.details["raw"]})
    kept = {k: v for k, v in told.details.items() if k not in ("raw", *found.details)}
    return Finding(told.check, found.status, f"{found.summary} ({told.details['source']})", kept | found.details)


# ---- exact checks


def _template(given: Evidence) -> Finding:
    items = given["items"]
    wrong = [i for i in items if i["reference"] != i["target"]]
    if not wrong:
        return Finding("template", "pass", f"{len(items)} rendered chats equal byte for byte")
    first = wrong[0]
    line = f"{len(wrong)} of {len(items)} chats are rendered differently, first at byte {first['at']}: {first['shows']}"
    return Finding("template", "fail", line, {"wrong": wrong})


def _tokens(given: Evidence) -> Finding:
    items = given["items"]
    wrong = [i for i in items if i["reference"] != i["target"]]
    if not wrong:
        return Finding("tokens", "pass", f"{len(items)} prompts have the same token ids, BOS included")
    first = wrong[0]
    line = f"{len(wrong)} of {len(items)} prompts have other token ids: {first['shows']}"
    return Finding("tokens", "fail", line, {"wrong": wrong})


def _weights(given: Evidence) -> Finding:
    items, missing, unexpected = given["items"], given["missing"], given["unexpected"]
    wrong = [name for name, source, target in items if source != target]
    ties = [f"{alias} is {_tied(is_)} to {name}" for alias, name, should, is_ in given["tied"] if should != is_]
    parts = (
        [f"{len(wrong)} of {len(items)} parameters differ from the {given['source']}: {_some(wrong)}"] if wrong else []
    )
    parts += [f"{len(missing)} parameters were never filled: {_some(missing)}"] if missing else []
    parts += (
        [f"{len(unexpected)} tensors of the {given['source']} are not used: {_some(unexpected)}"] if unexpected else []
    )
    parts += [f"{_some(ties)}, the config says otherwise"] if ties else []
    steps = given.get("steps") or []
    coarse = [f"{name} ({_short(off)} steps)" for name, off, most in steps if not float(off) <= most]
    parts += [f"{len(coarse)} quantised weights are not the nearest: {_some(coarse)}"] if coarse else []
    if parts:
        return Finding("weights", "fail", "; ".join(parts), {"wrong": wrong, "missing": missing, "ties": ties})
    line = f"{len(items)} parameters equal the {given['source']} bit for bit in their dtype"
    if steps:
        furthest = max(float(off) for _, off, _ in steps)
        line += f", {len(steps)} of them quantised, at most {furthest:.2f} steps off"
    return Finding("weights", "pass", line)


def _tied(yes: bool) -> str:
    return "tied" if yes else "not tied"


def _config(given: Evidence) -> Finding:
    items = given["items"]
    wrong = [i for i in items if not _near(i["reference"], i["target"], i.get("rtol", 0.0), i.get("atol", 0.0))]
    if not wrong:
        return Finding("config", "pass", f"{len(items)} settings in effect equal the reference's")
    first = wrong[0]
    shows = [
        f"{i['module']}.{i['key']} is {_short(i['target'])}, should be {_short(i['reference'])}" for i in wrong[:1]
    ]
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return Finding("config", "fail", shows[0] + more, {"wrong": wrong, "module": first["module"], "key": first["key"]})


def _near(a: Any, b: Any, rtol: float, atol: float) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_near(x, y, rtol, atol) for x, y in zip(a, b))
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (a, b))
    return abs(a - b) <= atol + rtol * abs(a) if numbers else a == b


def _sampler(given: Evidence) -> Finding:
    wrong = [i for i in given["items"] if i["rank"] != 1]
    reference, target = given["eos"]
    if wrong:
        first = wrong[0]
        line = (
            f"greedy decoding did not take the most likely token in {len(wrong)} of {len(given['items'])} steps "
            f"(prompt {first['prompt']}, step {first['step']}: rank {first['rank']}): something changes the logits"
        )
        return Finding("sampler", "fail", line, {"wrong": wrong})
    if missing := sorted(set(reference) - set(target)):
        return Finding("sampler", "fail", f"token ids {missing} must end an answer but do not", {"eos": given["eos"]})
    return Finding("sampler", "pass", f"{len(given['items'])} greedy steps took the most likely token; same end tokens")


def _parity(given: Evidence) -> list[Finding]:
    found = [_path(Finding(**f)) for f in given["findings"]]
    return found or [Finding("parity", "not_possible", "the target has no paths to compare")]


def _path(found: Finding) -> Finding:
    """A path that passed must have numbers that pass."""
    facts = found.details
    wrong = float(facts.get("ratio") or 0) > 1 or facts.get("problem") or facts.get("first") or facts.get("flips")
    if found.status == "pass" and wrong:
        return Finding("parity", "fail", f"{facts.get('path')}: its numbers do not pass", facts)
    return found


# ---- quantisation


def cost_finding(given: Evidence) -> Finding:
    """The figures of `cost_evidence`; it passes whatever they are."""
    sequence = unpack_index(given["sequence"])
    # Not the mixed text, which is the last sequence; and nothing follows the last token of a sequence.
    followed = np.r_[np.diff(sequence) == 0, False]
    text = followed & ((sequence < sequence.max()) | (sequence.max() == 0))
    before = _perplexity(unpack(given["base_nll"])[text])
    sides = {}
    for name, rows in given["sides"].items():
        kl, flip = unpack(rows["kl"]), unpack(rows["flip"])
        sides[name] = summary(kl, sequence) | {
            "agreement": float(np.mean(flip == 0)),
            "perplexity": _perplexity(unpack(rows["nll"])[text]),
        }
    target = sides["target"]
    line = (
        f"against the unquantised model: KL {target['mean']:.2g} +- {target['se']:.1g}, same first choice "
        f"{target['agreement']:.2%}, perplexity of prompts and answers {before:.4g} -> {target['perplexity']:.4g}; "
    )
    alone = [f"the scheme by itself {sides['scheme']['mean']:.2g}"]
    alone += [f"the dtype {sides['dtype']['mean']:.2g}"] if "dtype" in sides else []
    return Finding("cost", "pass", line + "KL of " + ", of ".join(alone), {"perplexity": before, "sides": sides})


def _perplexity(nll: np.ndarray) -> float:
    return math.exp(min(float(nll.mean()), 700.0)) if len(nll) else 1.0


# ---- measured checks


def _layers(given: Evidence) -> Finding:
    sequence, position = unpack_index(given["sequence"]), unpack_index(given["position"])
    judged: list[Judgement] = []
    for module in given["modules"]:
        run, nulls = unpack_rows(module["run"]), [unpack_rows(n) for n in module["nulls"]]
        series = Series(module["path"], run, nulls, sequence, position, module["noise"], given["device"])
        judged.append(judge(series))
    table = [{"path": j.name, "status": j.status, "ratio": j.ratio, **_first(j)} for j in judged]
    details = {"table": table, "tokens": len(position)}
    bad = next((j for j in judged if j.status == "fail"), None) or next((j for j in judged if j.complaints), None)
    if bad is None:
        worst = max(judged, key=lambda j: j.ratio)
        line = f"{len(judged)} modules within the noise of the dtype; largest {worst.ratio:.2f} times it, {worst.name}"
        return Finding("layers", "pass", line, details)
    return Finding("layers", bad.status, f"{bad.name}: {bad.complaints[0].text}", details | {"module": bad.name})  # type: ignore[arg-type]


def _first(judged: Judgement) -> dict[str, Any]:
    return {"test": judged.complaints[0].test, "text": judged.complaints[0].text} if judged.complaints else {}


def _logits_like(check: str) -> Callable[[Evidence], Finding]:
    def examine_logits(given: Evidence) -> Finding:
        reference, run = unpack_rows(given["reference"]), unpack_rows(given["run"])
        nulls = [unpack_rows(n["rows"]) for n in given["nulls"]]
        sequence, position = unpack_index(given["sequence"]), unpack_index(given["position"])
        series = logit_series(
            run, nulls, reference, sequence, position, eps=given["eps"], device=given["device"], name=check
        )
        judged = judge(series)
        details = judged.as_dict() | _numbers(reference, run, nulls, series)
        if len(position) < LEAST_TOKENS and check == "logits" and judged.status == "pass":
            line = f"only {len(position)} tokens compared, at least {LEAST_TOKENS} are needed"
            return Finding(check, "undecided", line, details)
        if excuse := _unfit(reference, nulls, judged):
            return Finding(check, "undecided", excuse, details)
        if judged.complaints:
            worst = next((c for c in judged.complaints if c.serious), judged.complaints[0])
            return Finding(check, judged.status, worst.text, details)  # type: ignore[arg-type]
        return Finding(check, "pass", _good_line(check, judged, details), details)

    return examine_logits


def _unfit(reference: dict[str, np.ndarray], nulls: list[dict[str, np.ndarray]], judged: Judgement) -> str | None:
    """The reference is no measure: it is not finite itself, or not in this dtype."""
    if reference["bad"].any():
        return "the reference's own logits hold NaN or inf: nothing can be decided from them"
    if any(n["odd"].any() for n in nulls) and judged.status == "pass":
        return "the reference overflows in this dtype: choose another dtype"
    return None


def _good_line(check: str, judged: Judgement, details: Evidence) -> str:
    kl = details["kl"]
    if check == "head":
        return f"the head's own error is {judged.ratio:.2f} times the noise of the dtype"
    return (
        f"{kl['count']} tokens: error {judged.ratio:.2f} times the dtype's, KL {kl['mean']:.2g} +- {kl['se']:.1g} "
        f"(dtype {details['expected_kl']:.2g}), max {kl['max']:.2g}, same first choice {details['agreement']:.2%}"
    )


def _numbers(reference: Any, run: Any, nulls: list[Any], series: Series) -> Evidence:
    sequence, position = series.sequence, series.position
    edges = [0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 1 << 30]
    curve = []
    for low, high in zip(edges, edges[1:]):
        inside = (position >= low) & (position < high)
        if inside.any():
            errors = [float(np.sqrt(np.mean(n["err"][inside] ** 2))) for n in nulls]
            curve.append([low, float(np.sqrt(np.mean(run["err"][inside] ** 2))), float(np.mean(errors))])
    return {
        "kl": summary(run["kl"], sequence),
        "expected_kl": float(np.mean([n["kl"].mean() for n in nulls])),
        "agreement": float(np.mean(run["flip"] == 0)),
        "expected_agreement": float(np.mean([np.mean(n["flip"] == 0) for n in nulls])),
        "curve": curve,
        "non_finite": int(run["odd"].sum()),
        "signed_zeros": int(run["zeros"].sum()),
        "noise": series.noise,
    }


def _some(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_short(v) for v in value[:3])}{', ...' if len(value) > 3 else ''}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


_EXAMINE: dict[str, Callable[[Evidence], Finding | list[Finding]]] = {
    "template": _template,
    "tokens": _tokens,
    "weights": _weights,
    "config": _config,
    "layers": _layers,
    "head": _logits_like("head"),
    "logits": _logits_like("logits"),
    "sampler": _sampler,
    "parity": _parity,
}
