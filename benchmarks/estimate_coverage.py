"""How often measured steps lie within the estimate's interval, on this machine: a batch x length grid, held back.

    surefoot calibrate && python benchmarks/estimate_coverage.py [MODEL] [--dtype bfloat16] [--batches 1,2,4,8]

MODEL is a folder with a config.json; its weights are random. Inside the timed region: `Engine.step()`, with scheduling,
the forward pass, the head and the choice of the token. Prints coverage and mean absolute error by phase, and what was
expected beside what was measured for each op class (the latter with a wait after each op). Run it on a quiet machine,
after a calibration on the same quiet machine: a busy one measures its neighbours. In pieces of a few minutes:

    for n in 32 128 512; do python benchmarks/estimate_coverage.py --lengths $n --output points.json; done
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch

from surefoot.analyze import calibrate, probes
from surefoot.analyze.estimate import predicted_calls, sketch
from surefoot.analyze.roofline import Step, decode_step, prefill_steps, step_cost
from surefoot.core.config import QUANT_SCHEMES, EngineConfig
from surefoot.device import get_device
from surefoot.engine.engine import Engine
from surefoot.quant.schemes import scheme

Point = tuple[str, dict[str, int], Step]


def measured(engine: Engine, args: argparse.Namespace) -> Iterator[tuple[Point, float]]:
    """Every point with its median seconds. One prefill per length: the batch is thinned out from the largest down."""
    for length in args.lengths:
        step = prefill_steps(length, length)[0]
        seconds = statistics.median(probes.seconds(engine, "prefill", step, args.repeats))
        yield ("prefill", {"prompt": length}, step), seconds
        with probes.decoding(engine, decode_step(max(args.batches), length)) as ids:
            for batch in sorted(args.batches, reverse=True):
                probes.drop(engine, ids[batch:])
                probes.timed(engine)
                seconds = statistics.median(probes.timed(engine) for _ in range(args.repeats))
                yield ("decode", {"batch": batch, "context": length}, decode_step(batch, length)), seconds


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="../shared/data/models/llama-3.2-1b-instruct")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", help="a float dtype, or w8a8, w8a16, w4a16")
    parser.add_argument("--batches", type=integers, default=[1, 2, 4, 8])
    parser.add_argument("--lengths", type=integers, default=[32, 128, 512])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--calibration", type=Path, help="default: the one that `surefoot calibrate` saved")
    parser.add_argument("--output", type=Path, help="add the points to this JSON file, and sum up all")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    calibration = calibrate.load(args.calibration or calibrate.default_path(args.device))
    rates = calibration.rates(args.dtype)
    if rates is None:
        raise SystemExit(f"the calibration did not measure {args.dtype}")
    torch.set_num_threads(calibration.threads)
    quant = args.dtype if args.dtype in QUANT_SCHEMES else None
    longest, most = max(args.lengths), max(args.batches)
    asked = EngineConfig(
        device=args.device,
        dtype="bfloat16" if quant else args.dtype,
        quant=quant,
        random_weights=0,
        max_model_len=longest + 64,
        max_num_seqs=most,
        max_num_batched_tokens=max(longest + 16, 2048),
        kv_cache_tokens=(longest + 256) * most,
        enable_prefix_caching=False,
        num_threads=calibration.threads,
    )
    engine = Engine.load(args.model, asked)
    config = json.loads((Path(args.model) / "config.json").read_text())
    paper = sketch(config, getattr(torch, asked.dtype), scheme(quant) if quant else None)
    records = []
    print(f"{'phase':8}{'point':32}{'low':>10}{'expected':>10}{'high':>10}{'measured':>10}  ms")
    for (phase, point, step), seconds in measured(engine, args):
        interval = rates.interval(step_cost(paper.model, step, paper.dtype, engine.info.block_size), phase)
        held = interval.holds(seconds)
        record = {"dtype": args.dtype, "phase": phase, **point, **vars(interval), "measured": seconds, "held": held}
        records.append(record)
        numbers = "".join(f"{1e3 * (record[k] or 0):10.2f}" for k in ("low", "expected", "high", "measured"))
        print(f"{phase:8}{point!s:32}{numbers}{'' if held else '  outside'}", flush=True)
    if args.output:
        before = json.loads(args.output.read_text())["points"] if args.output.is_file() else []
        records = before + records
        args.output.write_text(json.dumps({"calibration": calibration.as_dict(), "points": records}, indent=1))
    summary(records)
    by_class(engine, paper, rates, args)


def summary(records: list[dict]) -> None:
    for phase in ("prefill", "decode"):
        own = [r for r in records if r["phase"] == phase]
        errors = [abs(r["expected"] / r["measured"] - 1) for r in own]
        held = sum(r["held"] for r in own)
        print(f"{phase}: {held} of {len(own)} within the interval, mean absolute error {statistics.mean(errors):.1%}")


def by_class(engine: Engine, paper, rates, args: argparse.Namespace) -> None:
    """Where the time goes in one decode step at the largest batch and the shortest length: expected beside measured."""
    step = decode_step(max(args.batches), min(args.lengths))
    whole = probes.op_seconds(engine, get_device(args.device), "decode", step)
    expected = predicted_calls(step_cost(paper.model, step, paper.dtype, engine.info.block_size), rates)
    measured = whole.by_class()
    for name in sorted(expected.keys() | measured.keys()):
        print(
            f"  {name:14}{1e3 * expected.get(name, 0):10.2f} expected{1e3 * measured.get(name, 0):10.2f} measured  ms"
        )


if __name__ == "__main__":
    main()
