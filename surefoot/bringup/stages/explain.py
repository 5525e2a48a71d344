"""estimate, audit: what the model should take on this device against what it took, and whether the numbers agree.

estimate.json   the estimate as `surefoot estimate --chip calibration.json` makes it, and beside it:
                `points` predicted against measured for every point of the bench, `ops` the same by op class for one
                prefill and one decode step timed op by op, `roofline` each point's FLOP/s over FLOPs per byte
audit.json      findings of `surefoot audit claims.json`, where claims.json is this run's own bench as if published
"""

from __future__ import annotations

import statistics
from typing import Any

from surefoot.bringup.folder import write_json
from surefoot.bringup.settings import BringupSettings
from surefoot.bringup.stages.base import BAD, GOOD, WARN, Record, Work, plain

IN_CACHE = 64 << 20  # weights that a CPU may keep in its caches: the bandwidth of its memory is then no limit


def run_estimate(work: Work) -> Record:
    from surefoot.analyze.calibrate import load
    from surefoot.analyze.estimate import Question, calibrated_target, estimate
    from surefoot.bringup.stages.measure import dtype_of, variant_of
    from surefoot.weights.hub import resolve
    from surefoot.weights.jsonfile import read_json_object

    s, variant = work.settings, variant_of(work)
    calibration = load(work.path / "calibration.json")
    config = read_json_object(resolve(s.model, config_only=True) / "config.json")
    work.progress("estimating", 0.0)
    question = Question((variant,), batches=s.batch, lengths=s.prompt_lens)
    record = estimate(s.model, config, calibrated_target(calibration), question)
    bench = work.record("bench")
    if bench is None:
        return record | {"points": [], "ops": [], "roofline": None}
    work.progress("predicted against measured", 0.3)
    compared = _Comparison(config, dtype_of(work), variant, calibration, bench, s)
    record |= {"points": compared.points(), "memory_check": compared.memory()}
    record["summary"] = [_summary(record["points"], phase) for phase in ("prefill", "decode")]
    record["roofline"] = compared.roofline()
    work.progress("op by op", 0.6)
    record["ops"] = compared.ops(s)
    return plain(record)


class _Comparison:
    """Bench points against what a calibration predicts for the same steps."""

    def __init__(self, config: Record, dtype: str, variant: str, calibration: Any, bench: Record, s: BringupSettings):
        import torch

        from surefoot.analyze.estimate import sketch
        from surefoot.quant.schemes import scheme

        self.dtype = getattr(torch, dtype)
        self.paper = sketch(config, self.dtype, scheme(s.quant) if s.quant else None, s.quant_lm_head)
        self.calibration, self.rates = calibration, calibration.rates(variant)
        self.bench, self.info = bench, bench["config"]

    def _costs(self, point: Record) -> tuple[list[Any], Any]:
        """Costs of the steps of a point's prefill, and of its decode step half way through the answer."""
        from surefoot.analyze.roofline import decode_step, prefill_steps, step_cost

        batch, prompt, output = point["batch"], point["prompt_len"], point["output_len"]
        block, budget = self.info["block_size"], self.info["max_num_batched_tokens"]
        steps = prefill_steps(prompt, budget, batch)
        model = self.paper.model
        middle = decode_step(batch, prompt + output // 2)
        return [step_cost(model, s, self.dtype, block) for s in steps], step_cost(model, middle, self.dtype, block)

    def points(self) -> list[Record]:
        """Seconds, predicted (low, expected, high) and measured (median), one row per phase of a shape."""
        from functools import reduce

        rows, seen = [], set()
        for i, point in enumerate(self.bench["points"]):
            prefill, decode = self._costs(point)
            shape = (point["batch"], point["prompt_len"])
            if shape not in seen:
                parts = [self.rates.interval(cost, "prefill") for cost in prefill]
                rows.append(self._row(i, point, "prefill", reduce(lambda a, b: a + b, parts)))
                seen.add(shape)
            if point.get("decode"):
                rows.append(self._row(i, point, "decode", self.rates.interval(decode, "decode")))
        return rows

    def _row(self, index: int, point: Record, phase: str, predicted: Any) -> Record:
        measured = (point["prefill"]["seconds"] if phase == "prefill" else point["decode"]["step_s"])["median"]
        return {
            "phase": phase,
            "point": index,
            "batch": point["batch"],
            "prompt_len": point["prompt_len"],
            "output_len": point["output_len"],
            "predicted": vars(predicted),
            "measured": measured,
            "inside": predicted.holds(measured),
            "error": measured / predicted.expected - 1 if predicted.expected else None,
        }

    def memory(self) -> list[Record]:
        """Bytes that the estimate says, and that the engine allocated."""
        from surefoot.analyze.estimate import kv_bytes_per_token

        size = self.dtype.itemsize
        kv = sum(kv_bytes_per_token(spec, size) for spec in self.paper.model.state_specs())
        pages = self.info["num_blocks"] * self.info["block_size"]
        pairs = (
            ("weights", self.paper.weight_bytes, self.info["weight_bytes"]),
            ("KV cache", kv * pages, self.info["kv_cache_bytes"]),
        )
        return [
            {"what": what, "predicted": ours, "measured": theirs, "error": ours / theirs - 1 if theirs else None}
            for what, ours, theirs in pairs
        ]

    def roofline(self) -> Record:
        """Ceilings as calibrated, and per phase and point: FLOPs per compulsory byte, FLOP/s reached."""
        points, seen = [], set()
        for i, point in enumerate(self.bench["points"]):
            prefill, decode = self._costs(point)
            if (shape := (point["batch"], point["prompt_len"])) not in seen:
                seen.add(shape)
                points.append(self._reached(i, "prefill", point, prefill, point["prefill"]["seconds"]["median"]))
            if point.get("decode"):
                points.append(self._reached(i, "decode", point, [decode], point["decode"]["step_s"]["median"]))
        variant = self.rates.variant
        return {
            "peak_flops_per_s": variant.peak() if variant.linear else None,
            "bytes_per_s": self.calibration.bandwidth[1],
            "points": points,
        }

    def _reached(self, index: int, phase: str, point: Record, costs: list[Any], seconds: float) -> Record:
        flops = sum(cost.total(lambda call: call.flops) for cost in costs)
        moved = sum(cost.total(lambda call: call.must_move) for cost in costs)
        return {
            "phase": phase,
            "point": index,
            "batch": point["batch"],
            "prompt_len": point["prompt_len"],
            "flops": flops,
            "bytes": moved,
            "intensity": flops / moved,
            "flops_per_s": flops / seconds,
        }

    def ops(self, settings: Any) -> list[Record]:
        """One prefill and one decode step timed op by op, the median of three, beside the prediction by op class."""
        from surefoot.analyze import probes
        from surefoot.analyze.estimate import predicted_calls
        from surefoot.analyze.roofline import decode_step, prefill_steps, step_cost
        from surefoot.device import get_device
        from surefoot.engine.engine import Engine

        batch, prompt = max(settings.batch), max(n for n in settings.prompt_lens if n <= 2048)
        engine = Engine.load(settings.model, settings.engine(max_num_seqs=max(32, batch), enable_prefix_caching=False))
        device, rows = get_device(engine.info.device), []
        for phase, step in (("prefill", prefill_steps(prompt, prompt)[0]), ("decode", decode_step(batch, prompt))):
            probes.run(engine, phase, step)
            runs = [probes.op_seconds(engine, device, phase, step).by_class() for _ in range(3)]
            cost = step_cost(self.paper.model, step, self.dtype, engine.info.block_size)
            predicted = predicted_calls(cost, self.rates)
            for name in predicted:
                measured = statistics.median(run.get(name, 0.0) for run in runs)
                rows.append(
                    {
                        "phase": phase,
                        "batch": len(step.query_lens),
                        "length": step.seq_lens[0],
                        "op_class": name,
                        "predicted": predicted[name],
                        "measured": measured,
                        "error": measured / predicted[name] - 1,
                    }
                )
        return rows


def _summary(points: list[Record], phase: str) -> Record:
    mine = [p for p in points if p["phase"] == phase]
    errors = [abs(p["error"]) for p in mine if p["error"] is not None]
    return {
        "phase": phase,
        "points": len(mine),
        "inside": sum(p["inside"] for p in mine),
        "mean_error": statistics.fmean(errors) if errors else None,
    }


def estimate_outcome(record: Record) -> tuple[str, str]:
    summary = record.get("summary")
    if not summary:
        return WARN, "estimated; there is no bench to hold it against"
    text = "; ".join(f"{s['phase']}: {s['inside']} of {s['points']} points inside their interval" for s in summary)
    inside, total = sum(s["inside"] for s in summary), sum(s["points"] for s in summary)
    return (GOOD if inside >= 0.9 * total else WARN), text


def run_audit(work: Work) -> Record:
    from surefoot.analyze import audit, claims

    work.progress("auditing this run's own numbers", None)
    page = own_claims(work)
    write_json(work.path / "claims.json", page)
    found = claims.parse(page, "claims.json")
    findings = audit.audit(found)
    return audit.as_dict(found, findings) | {
        "num_rows": len(found.rows),
        "num_checks": len(audit.CHECKS),
        "impossible": sum(f.severity == "impossible" for f in findings),
        "suspicious": sum(f.severity == "suspicious" for f in findings),
    }


def own_claims(work: Work) -> Record:
    """This run's bench as a page of claims, against the peaks that this run has calibrated."""
    from surefoot.weights.hub import resolve
    from surefoot.weights.jsonfile import read_json_object

    bench, calibration, estimate = (work.record(n) for n in ("bench", "calibration", "estimate"))
    config = read_json_object(resolve(work.settings.model, config_only=True) / "config.json")
    bench = bench or {"points": [], "config": {}, "memory": {}}
    info = bench["config"]
    dtype = (info.get("quant") or {}).get("scheme") or info.get("dtype", "bfloat16")
    chip: Record = {"name": str(info.get("device_name", "this device"))}
    if calibration is not None:
        roof = (estimate or {}).get("roofline") or {}
        in_cache = info.get("device") == "cpu" and (info.get("weight_bytes") or 0) < IN_CACHE
        chip |= {"peak_flops": {dtype: roof["peak_flops_per_s"]}} if roof.get("peak_flops_per_s") else {}
        chip |= {} if in_cache else {"memory_bandwidth": calibration["bandwidth"][1]}
    return {
        "format": "surefoot-claims-1",
        "title": f"{work.settings.model} on {chip['name']}, as measured here",
        "source": "bench.json of this folder",
        "chip": chip,
        "models": {"model": {"name": work.settings.model, "dtype": dtype, "config": config}},
        "rows": [_claim(p) for p in bench["points"]],
    }


def _claim(point: Record) -> Record:
    """A point as ranges over its passes, because a page that prints one number means all of them."""
    wall = _range(point["generation_s"])
    made = point["batch"] * point["output_len"]
    row = {
        "id": point["name"],
        "batch": point["batch"],
        "prompt_tokens": point["prompt_len"],
        "output_tokens": point["output_len"],
        "seconds": wall,
        "tokens_per_s": [made / wall[1], made / wall[0]],
        "prefill_s": _range(point["prefill"]["seconds"]),
    }
    if point.get("decode"):
        row["decode_step_s"] = _step_range(point["decode"], point["batch"])
    return row


def _range(summary: Record) -> list[float]:
    """Of passes: the median's interval, else all of them, since the fewer there are the less each says."""
    interval = (summary.get("p50") or {}).get("ci95") or [summary["min"], summary["max"]]
    values = [summary["median"], summary["mean"], *interval]
    return [min(values), max(values)]


def _step_range(decode: Record, batch: int) -> list[float]:
    """Steps of one pass are not independent of each other: from the fastest step to the mean of the slowest pass."""
    steps, slowest = decode["step_s"], batch / decode["llama_bench_tg"]["min"]
    return [steps["min"], max(steps["mean"], slowest)]


def audit_outcome(record: Record) -> tuple[str, str]:
    if record["impossible"]:
        first = record["findings"][0]["statement"]
        again = "if the machine was disturbed while measuring, measure again"
        return BAD, f"{record['impossible']} contradictions in this run's own numbers ({again}): {first}"
    if record["suspicious"]:
        return WARN, f"{record['suspicious']} suspicious: {record['findings'][0]['statement']}"
    return GOOD, f"nothing contradicts in {record['num_rows']} rows"
