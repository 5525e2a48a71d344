"""`surefoot estimate`: size, memory and speed of a model on a chip, without its weights and without the chip."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surefoot.cli.flags import Model
from surefoot.core.errors import InputError

if TYPE_CHECKING:
    from surefoot.analyze.estimate import Target

ChipName = Annotated[
    str,
    typer.Option(
        "--chip", metavar="CHIP", help="910B1 ... 910B4, 910C, 310P, 950, H200, H100, A100; this; a calibration file."
    ),
]
Dtypes = Annotated[
    list[str] | None,
    typer.Option("--dtype", metavar="DTYPE", help="fp32, fp16, bf16, w8a8, w8a16, w4a16, w4a8; several allowed."),
]
Batches = Annotated[str, typer.Option("--batch", metavar="N,N", help="Batches of decode.")]
Lengths = Annotated[str, typer.Option("--length", metavar="N,N", help="Prompt lengths, and cached tokens in decode.")]
Memory = Annotated[str | None, typer.Option(metavar="SIZE", help="Device memory, such as 64GB or 32GiB.")]
Peak = Annotated[float | None, typer.Option(metavar="TFLOPS", help="Dense 16-bit peak, if the table does not know it.")]
Bandwidth = Annotated[float | None, typer.Option(metavar="GB/S", help="Memory bandwidth, likewise.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")]


def estimate(
    model: Model,
    chip: ChipName = "this",
    dtype: Dtypes = None,
    batch: Batches = "1,2,4,8,16,32",
    length: Lengths = "128,1024",
    memory: Memory = None,
    peak: Peak = None,
    bandwidth: Bandwidth = None,
    as_json: Json = False,
) -> None:
    """Parameters, FLOPs, bytes, largest batch, and the time of prefill and decode as intervals. Needs config.json only.

    \b
    Examples:
      surefoot estimate hf:Qwen/Qwen3.5-0.8B --chip 910B4 --bandwidth 800 --peak 280
      surefoot estimate DIR --chip H200 --dtype bf16 --dtype w4a16 --batch 1,8,64
      surefoot calibrate && surefoot estimate DIR --chip this
    """
    import json

    from surefoot.analyze.estimate import DEFAULT_VARIANTS, Question
    from surefoot.analyze.estimate import estimate as run
    from surefoot.analyze.estimate_text import lines
    from surefoot.weights.hub import resolve
    from surefoot.weights.jsonfile import read_json_object

    question = Question(
        tuple(dtype or DEFAULT_VARIANTS),
        integers(batch, "--batch"),
        integers(length, "--length"),
        memory=size(memory) if memory else None,
    )
    target = _target(chip, peak, bandwidth)
    folder = resolve(model, config_only=True)
    found = run(model, read_json_object(folder / "config.json"), target, question)
    print(json.dumps(found, indent=2, ensure_ascii=False) if as_json else "\n".join(lines(found)))


def _target(chip: str, peak: float | None, bandwidth: float | None) -> Target:
    from dataclasses import replace

    from surefoot.analyze.calibrate import default_path, load
    from surefoot.analyze.estimate import calibrated_target, chip_target
    from surefoot.device.chips import CHIPS, lookup

    kind, _, device = chip.partition(":")
    if kind == "this" or chip.endswith(".json"):
        if peak or bandwidth:
            raise InputError("--peak and --bandwidth are for chips of the table; a calibration has measured both")
        path = Path(chip) if chip.endswith(".json") else default_path(device or "cpu")
        return calibrated_target(load(path))
    row = lookup(chip)
    if row is None:
        known = ", ".join(alias for c in CHIPS for alias in c.aliases)
        raise InputError(f"no chip {chip!r} in the table: choose one of {known}, this, or a calibration file")
    if peak or bandwidth:
        floats = {name: peak * 1e12 for name in ("float16", "bfloat16") if name in row.dtypes} if peak else {}
        row = replace(
            row,
            peak_flops=dict(row.peak_flops) | floats,
            memory_bandwidth=bandwidth * 1e9 if bandwidth else row.memory_bandwidth,
            source=f"given on the command line; the rest: {row.source}",
        )
    return chip_target(row)


def integers(text: str, flag: str) -> tuple[int, ...]:
    """ "1,2,4" -> (1, 2, 4)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{flag} takes whole numbers separated by commas, got {text!r}") from None


UNITS = {"": 1, "b": 1, "mb": 10**6, "gb": 10**9, "tb": 10**12, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def size(text: str) -> int:
    """ "64GB" -> 64 * 10**9, "32GiB" -> 32 * 2**30."""
    digits = text.strip().rstrip("bBiIkKmMgGtT ")
    unit = text.strip()[len(digits) :].strip().lower()
    try:
        found = int(float(digits) * UNITS[unit])
    except (ValueError, KeyError):
        raise InputError(f"cannot read the size {text!r}: write 64GB, 32GiB or a number of bytes") from None
    if found < 1:
        raise InputError(f"a memory of {text!r} holds nothing: write 64GB, 32GiB or a number of bytes")
    return found
