"""`surefoot ops`: which operators a model needs, and whether an NPU has them. Needs neither weights nor a device."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from surefoot.cli.flags import Model

Device = Annotated[str, typer.Option(metavar="DEVICE", help="The device to ask about; npu is the one with a registry.")]
Version = Annotated[
    str, typer.Option("--torch-npu", metavar="VERSION", help="Release of torch-npu, or a registry file (.json).")
]
Through = Annotated[
    str,
    typer.Option(metavar="ENGINE", help="native (Surefoot's engine), transformers, or auto: native where it can."),
]
Dtype = Annotated[str, typer.Option(metavar="DTYPE", help="auto (the config's), float32, bfloat16 or float16.")]
Format = Annotated[str, typer.Option("--format", metavar="FORMAT", help="table, json or markdown.")]
Batch = Annotated[int, typer.Option(metavar="N", min=1, help="Largest batch to trace.")]
Prompt = Annotated[int, typer.Option(metavar="N", min=2, help="Longest prompt to trace, in tokens.")]
Problems = Annotated[bool, typer.Option("--problems", help="In the table, only what is not native.")]


def ops(
    model: Model,
    device: Device = "npu",
    release: Version = "2.13",
    through: Through = "auto",
    dtype: Dtype = "auto",
    output: Format = "table",
    batch: Batch = 8,
    prompt: Prompt = 512,
    problems: Problems = False,
) -> None:
    """List the operators that a model needs in prefill and decode, and say whether it runs on an NPU.

    The model is traced without weights, so a folder with a config.json is enough. Exit code 0: runs, with or without
    fallbacks; 1: will not run, or cannot be told.

    \b
    Examples:
      surefoot ops canary-qwen3.5 --device npu
      surefoot ops DIR --through transformers --format markdown > coverage.md
      surefoot ops DIR --problems
    """
    from surefoot.analyze import show
    from surefoot.analyze.check import check_operators
    from surefoot.core.errors import InputError

    if output not in ("table", "json", "markdown"):
        raise InputError(f"unknown format {output!r}: choose table, json or markdown")
    if problems and output != "table":
        raise InputError("--problems shortens the table; json and markdown are always whole")
    coverage = check_operators(model, device, release, through=through, dtype=dtype, batch=batch, prompt=prompt)
    if output == "json":
        print(json.dumps(coverage.as_dict(), indent=2, ensure_ascii=False))
    else:
        print(show.markdown(coverage) if output == "markdown" else show.table(coverage, everything=not problems))
    if coverage.runs is not True:
        raise typer.Exit(1)
