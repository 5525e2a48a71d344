"""`surefoot shapes`: the batch and token sizes to capture or compile for a workload, and what padding to them costs."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from surefoot.cli.flags import ENGINE, Model, flags, integers
from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError

Workload = Annotated[
    str,
    typer.Option(
        metavar="TRACE|DIST",
        help="A trace (CSV or Mooncake JSONL), or uniform:16,4096, lognormal:MEDIAN,SIGMA, fixed:N; outputs after a /.",
    ),
]
Requests = Annotated[
    int, typer.Option("-n", "--requests", metavar="N", min=1, help="Requests of the workload to play.")
]
Concurrency = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Requests in flight; default --max-num-seqs.")
]
Captures = Annotated[int, typer.Option("--max-captures", metavar="N", help="Most shapes to capture or compile.")]
Run = Annotated[bool, typer.Option("--run", help="Also run dynamic, bucketed and fixed, and compare them.")]
Lengths = Annotated[str, typer.Option(metavar="N,N", help="--run: prompt lengths.", parser=integers)]
Batch = Annotated[int, typer.Option(metavar="N", min=1, help="--run: prompts at once.")]
OutputLen = Annotated[int, typer.Option(metavar="N", min=1, help="--run: tokens to generate for each.")]
Repeats = Annotated[int, typer.Option(metavar="N", min=1, help="--run: passes per length.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Of the distribution and of --run's prompts.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")]


@flags(EngineConfig, "config", ENGINE)
def shapes(
    model: Model,
    workload: Workload = "uniform:16,4096/fixed:128",
    requests: Requests = 1000,
    concurrency: Concurrency = None,
    max_captures: Captures = 16,
    run: Run = False,
    lengths: Lengths = "16,64,256,1024,4096",  # type: ignore[assignment]
    batch: Batch = 3,
    output_len: OutputLen = 16,
    repeats: Repeats = 3,
    seed: Seed = 0,
    as_json: Json = False,
    *,
    config: EngineConfig,
) -> None:
    """Choose the batch and token sizes to pad to, for a workload and a number of captures; needs config.json only.

    --run loads the model and compares dynamic, bucketed and fixed shapes: latency, start-up, memory, and whether they
    give the same tokens. --batch-buckets and --token-buckets put your own sizes in place of the chosen ones. Exit
    code 1: other tokens, or something was captured or compiled after the warm-up.

    \b
    Examples:
      surefoot shapes DIR --workload trace.csv --max-captures 12
      surefoot shapes DIR --workload lognormal:500,0.8/lognormal:150,0.6 --max-num-seqs 64
      surefoot shapes canary-llama --run --lengths 16,256,1024
    """
    from surefoot.bench import shapes as plan
    from surefoot.bench.shapes_text import advice_lines, run_lines
    from surefoot.cli.progress import Progress

    with Progress() as progress:
        limits = plan.limits_of(model, config)
        played = plan.play(plan.requests(workload, requests, seed), limits, concurrency, progress)
        modes = plan.advise(played, max_captures)
        plan.add_memory(model, config, modes)
        if run and not as_json:
            progress.pause()
        result = _run(model, config, modes, lengths, batch, output_len, repeats, seed, progress) if run else None  # type: ignore[arg-type]
    if as_json:
        print(json.dumps({"workload": workload, "requests": played.num_requests, "modes": modes, "run": result}))
    else:
        flight = concurrency or limits.max_num_seqs
        print("\n".join(advice_lines(workload, played, modes, flight)))
        if result is not None:
            print("\n".join(run_lines(result)))
    if result is not None and not result["ok"]:
        raise typer.Exit(1)


def _run(
    model: str,
    config: EngineConfig,
    modes: dict[str, dict[str, Any]],
    lengths: tuple[int, ...],
    batch: int,
    output_len: int,
    repeats: int,
    seed: int,
    progress: Any,
) -> dict[str, Any]:
    from surefoot.bench.shapes_run import MODES, RunSettings, compare

    if not lengths or min(lengths) < 1:
        raise InputError("--lengths takes prompt lengths of at least 1")
    buckets: dict[str, tuple[Any, Any]] = {}
    for mode in MODES:
        chosen = modes[mode]["batch_buckets"], modes[mode]["token_buckets"]
        buckets[mode] = tuple(tuple(c) if c else None for c in chosen)  # type: ignore[assignment]
    own = config.batch_buckets, config.token_buckets
    buckets["bucketed"] = (own[0] or buckets["bucketed"][0], own[1] or buckets["bucketed"][1])
    settings = RunSettings(tuple(sorted(lengths)), batch, output_len, repeats, seed)
    return compare(model, config, buckets, settings, progress)
