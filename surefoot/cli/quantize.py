"""`surefoot quantize`: a quantised copy of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surefoot.cli.flags import Model

SchemeName = Annotated[
    str,
    typer.Option(
        "--scheme",
        metavar="SCHEME",
        help="w8a8 or w4a8: 8- or 4-bit weights, activations rounded to 8 bits, fastest; w8a16 or w4a16: as they are.",
    ),
]
Output = Annotated[
    Path, typer.Option("-o", "--output", metavar="DIR", help="Where to write it: a new folder, or an empty one.")
]
GroupSize = Annotated[int | None, typer.Option(metavar="N", help="Inputs per int4 scale: 32, 64 or 128; default 32.")]
LmHead = Annotated[
    bool,
    typer.Option("--lm-head", help="Quantise the output layer too (what is gained and lost: docs/quantisation.md)."),
]


def quantize(
    model: Model, scheme: SchemeName, output: Output, group_size: GroupSize = None, lm_head: LmHead = False
) -> None:
    """Write a quantised copy of a model, in the compressed-tensors format that vLLM reads too.

    \b
    Examples:
      surefoot quantize hf:Qwen/Qwen3.5-0.8B --scheme w8a8 -o qwen-w8a8
      surefoot quantize DIR --scheme w4a16 --group-size 128 -o DIR-w4a16
      surefoot run qwen-w8a8 "What is the capital of France?"

    Without a copy, `--quant SCHEME` of run and serve quantises while the weights load, with the same result.
    """
    from surefoot.cli.progress import Progress
    from surefoot.core.errors import InputError
    from surefoot.layers.quant_linear import quantised, shapes
    from surefoot.models.registry import build
    from surefoot.quant import schemes
    from surefoot.quant.folder import check_target, write_quantised
    from surefoot.quant.select import select, summarise
    from surefoot.weights.checkpoint import Checkpoint
    from surefoot.weights.hub import resolve

    chosen = schemes.scheme(scheme, group_size)
    check_target(output)
    with Progress() as progress:
        checkpoint = Checkpoint(resolve(model, progress=progress))
        built = build(checkpoint.config)
        if quantised(built):
            raise InputError(f"{checkpoint.folder} is quantised already: start from the full-precision model")
        selection = select(shapes(built), chosen, built.quant_exclude, lm_head)
        done = write_quantised(checkpoint, output, selection, tied=built.tied, progress=progress)
    kept = "; ".join(summarise(selection.excluded)) or "nothing"
    print(f"{done.folder}: {len(selection.modules)} layers in {chosen}, kept as they were: {kept}")
    print(f"{done.bytes_before / 1e6:,.1f} MB -> {done.bytes_after / 1e6:,.1f} MB")
