"""`surefoot calibrate`: measure this machine, so that `surefoot estimate --chip this` rests on evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Device = Annotated[
    str, typer.Option(metavar="DEVICE", help="The device to measure: cpu, cuda, cuda:1, npu, npu:0, ...")
]
Dtypes = Annotated[
    list[str] | None,
    typer.Option("--dtype", metavar="DTYPE", help="fp32, fp16, bf16, w8a8, w8a16, w4a16, w4a8; default all."),
]
Threads = Annotated[int | None, typer.Option(metavar="N", help="CPU threads.")]
Repeats = Annotated[int, typer.Option(metavar="N", help="Repeats of each measurement; the median counts.", min=2)]
Output = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="FILE", help="Default ~/.cache/surefoot/calibration-DEVICE.json."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the file's content as well.")]


def calibrate(
    device: Device = "cpu",
    dtype: Dtypes = None,
    threads: Threads = None,
    repeats: Repeats = 5,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Measure bandwidth, matrix peaks, launch cost and small engine steps. Do it while nothing else runs.

    \b
    Examples:
      surefoot calibrate
      surefoot calibrate --device npu:0 --dtype fp16 --dtype w8a8
    """
    import json

    from surefoot.analyze import calibrate as measure
    from surefoot.analyze.estimate import Question
    from surefoot.analyze.numbers import amount, seconds
    from surefoot.cli.progress import Progress

    variants = Question(tuple(dtype)).variants if dtype else measure.Settings().variants
    with Progress() as progress:
        found = measure.calibrate(
            measure.Settings(device=device, variants=variants, threads=threads, repeats=repeats), progress
        )
    path = output or measure.default_path(found.device)
    measure.save(found, path)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
        return
    print(f"{found.device_name}, {found.threads} threads")
    print(f"  read bandwidth   {amount(found.bandwidth[0], 'B/s')}, best {amount(found.bandwidth[1], 'B/s')}")
    again = f"; in a recorded step {seconds(found.replay)}" if found.replay is not None else ""
    print(f"  start of an op   {seconds(found.launch)}{again}")
    for name, variant in found.variants.items():
        worst = ", ".join(
            f"{phase} {low / mid:.2f} ... {high / mid:.2f}" for phase, (low, mid, high) in variant.error.items()
        )
        print(f"  {name:17}peak {amount(variant.peak(), 'FLOP/s')}; measured over expected: {worst}")
    for note in found.notes:
        print(f"  note             {note}")
    print(f"  saved in         {path}")
