"""The feature matrix and the known limits, each from a record. A cell is green only where a record shows it."""

from __future__ import annotations

from dataclasses import dataclass

from surefoot.report.records import At, Records, find, known, value

GOOD, BAD, NONE = "good", "bad", "none"


@dataclass(frozen=True)
class Feature:
    """name: key of its words (f_...).  state: good, bad or none.  evidence: the recorded value that shows it."""

    name: str
    state: str
    evidence: At


def features(records: Records) -> list[Feature]:
    proof, answers, load = records["proof"], records["answers"], records["load"]
    findings = proof["findings"]

    def check(name: str, proven_by: str) -> Feature:
        found = find(findings, check=proven_by)
        return Feature(name, _state(found["status"]), found["summary"])

    def path(name: str, *prefixes: str) -> Feature:
        rows = [f for f in findings if f["check"] == "parity" and str(value(f["details"]["path"])).startswith(prefixes)]
        bad = [f for f in rows if f["status"] == "fail"]
        chosen = (bad or rows or [find(findings, check="none")])[0]
        return Feature(name, _state(chosen["status"]), chosen["summary"])

    quant = records["bench"]["config"]["quant"]
    coverage = records["coverage"]
    served = [p for p in load["points"] if p["completed"]]
    memory = records["estimate"]["memory_check"]
    close = memory and all(abs(value(row["error"]) or 0) <= 0.02 for row in memory)
    return [
        check("loads", "weights"),
        check("template", "template"),
        check("tokens", "tokens"),
        check("greedy", "sampler"),
        Feature("known", _of(answers["passed"]), answers["verdict"]),
        path("repeat", "repeat"),
        path("prefill_decode", "prefill = decode", "decode alone"),
        path("batching", "alone = batched", "decode batched"),
        path("chunked", "chunked = whole"),
        path("mixed", "prefill beside decodes"),
        path("prefix", "prefix miss = hit"),
        path("preemption", "before = after preemption"),
        path("graph", "graph = eager"),
        Feature("server", GOOD if served else NONE, served[0]["name"] if served else load["points"]),
        Feature("quant", _state(proof["verdict"]) if quant else NONE, quant["scheme"]),
        Feature("memory", GOOD if close else NONE, memory[0]["what"] if close else memory["what"]),
        Feature("npu", _of(coverage["runs"]), coverage["verdict"]),
    ]


def _state(status: At) -> str:
    return {"pass": GOOD, "proven": GOOD, "fail": BAD, "refuted": BAD}.get(str(value(status)), NONE)


def _of(passed: At) -> str:
    return NONE if not known(passed) else GOOD if passed else BAD


@dataclass(frozen=True)
class Limit:
    """Either words of the report (a key, with recorded values to fill in) or recorded text."""

    words: str | None = None
    fill: tuple[At, ...] = ()
    text: At | None = None


CACHE_BYTES = 64 << 20


def limits(records: Records) -> list[Limit]:
    """What a reader should know before believing more than was shown; each recorded sentence once."""
    stages, bench, load = records["manifest"]["stages"], records["bench"], records["load"]
    found = [
        Limit("known_failed", (stages[name]["command"], stages[name]["text"]))
        for name in value(stages) or {}
        if stages[name]["state"] == "failed"
    ]
    if "canary-" in str(value(records["manifest"]["settings"]["model"])):
        found.append(Limit("known_canary"))
    config = bench["config"]
    if config["device"] == "cpu" and 0 < (value(config["weight_bytes"]) or 0) < CACHE_BYTES:
        found.append(Limit("known_cache"))
    if any(p["latency"]["ttft@surefoot"]["p99"]["refused"] for p in load["points"]):
        found.append(Limit("known_p99"))
    found += [Limit(text=note) for note in records["calibration"]["notes"]]
    found += [Limit(text=warning) for warning in bench["host"]["warnings"]]
    seen: set[str] = set()
    for point in [*bench["points"], *load["points"]]:
        for warning in [*point["warnings"], *point["prefill"]["warnings"]]:
            sort = "".join(c for c in str(value(warning)) if not c.isdigit())
            found += [] if sort in seen else [Limit(text=warning)]
            seen.add(sort)
    found += [Limit(text=note) for note in records["audit"]["unchecked"]]
    found += [Limit(text=note) for note in records["proof"]["notes"]]
    if records["coverage"]["rows"]:
        found.append(Limit("known_coverage"))
    return found
