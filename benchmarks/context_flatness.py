"""Decode time by kind of layer against the length of the context: what is linear stays flat, what attends grows.

    python benchmarks/context_flatness.py MODEL [--contexts 128 1024 4096 8192 16384] [--batch 1] -o flatness.json

MODEL is a folder (quantised or not) of a hybrid model such as Qwen3.5. Each number is the median, over `--repeats`
rounds that take the contexts in turn, of the milliseconds that a decode step through the engine spends in all layers of
a kind, their projections included, by hooks on the modules; a replayed graph calls no modules, so steps are eager.
Caches and states hold random numbers instead of computed ones (`cost_curve.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from bench_peers import machine
from cost_curve import STEPS, LayerClock, decode, fill_cache, show

from surefoot.core.config import EngineConfig
from surefoot.engine.engine import Engine

CONTEXTS = (128, 1024, 4096, 8192, 16384)
KINDS = ("linear_attn", "self_attn", "mlp", "lm_head")


def load(args: argparse.Namespace) -> Engine:
    longest = max(args.contexts) + 64
    config = EngineConfig(
        dtype="bfloat16",
        num_threads=args.threads,
        max_num_seqs=args.batch,
        max_model_len=longest,
        kv_cache_tokens=args.batch * longest,
        max_num_batched_tokens=args.batch * longest,
        enable_prefix_caching=False,
        graph="off",
    )
    engine = Engine.load(args.model, config)
    fill_cache(engine)
    return engine


def measure(engine: Engine, args: argparse.Namespace) -> dict[int, list[dict[str, float]]]:
    """Milliseconds of a step, and of it by kind of layer, for each context and round."""
    clock = LayerClock(engine, KINDS)
    found: dict[int, list[dict[str, float]]] = {context: [] for context in args.contexts}
    decode(engine, args.batch, min(args.contexts))
    for repeat in range(args.repeats):
        for context in args.contexts:
            clock.take(1)
            step = decode(engine, args.batch, context)
            parts = {"step": step, **clock.take(STEPS + 1)}  # `decode` computes one step before those it measures
            found[context].append({kind: seconds * 1e3 for kind, seconds in parts.items()})
            show(f"round {repeat + 1} of {args.repeats}: context {context}")
    show("")
    return found


def table(found: dict[int, list[dict[str, float]]]) -> str:
    kinds = list(next(iter(found.values()))[0])
    medians = {c: {k: statistics.median(r[k] for r in rounds) for k in kinds} for c, rounds in found.items()}
    first = medians[min(medians)]
    lines = ["| context | " + " | ".join(f"{k}, ms" for k in kinds) + " |", "| --- |" + " --- |" * len(kinds)]
    for context, row in medians.items():
        cells = [f"{row[k]:.2f} ({row[k] / first[k]:.2f}x)" for k in kinds]
        lines.append(f"| {context} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    engine = load(args)
    found = measure(engine, args)
    if args.output:
        record = {"model": args.model, "batch": args.batch, "threads": args.threads, "quant": engine.info.quant}
        args.output.write_text(json.dumps(record | {"machine": machine(), "milliseconds": found}, indent=1) + "\n")
    print(f"batch {args.batch}, {args.threads} threads; in brackets: against the shortest context\n\n{table(found)}")


if __name__ == "__main__":
    main()
