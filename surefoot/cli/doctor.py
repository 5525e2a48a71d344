"""`surefoot doctor`: what is installed, what does not fit, and what to do about it; exit code 0 or 1."""

from __future__ import annotations

import json
from typing import Annotated

import typer

Device = Annotated[str, typer.Option(metavar="DEVICE", help="What must work: npu, cuda or cpu; auto guesses.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")]


def doctor(device: Device = "auto", as_json: Json = False) -> None:
    """Check driver, CANN, PyTorch, torch-npu, vLLM, vLLM-Ascend and the device against versions known to work together.

    \b
    Examples:
      surefoot doctor
      surefoot doctor --device npu
      surefoot doctor --json > machine.json
    """
    from surefoot.bringup.doctor import examine
    from surefoot.bringup.machine import look
    from surefoot.core.errors import InputError
    from surefoot.device.probe import probe

    if device not in ("auto", "npu", "cuda", "cpu"):
        raise InputError(f"unknown device {device!r}: choose auto, npu, cuda or cpu")
    report = examine(look(), probe, device)
    if as_json:
        print(json.dumps(report.as_dict(), indent=2, ensure_ascii=False))
    else:
        for f in report.findings:
            print(f"  {f.level:7} {f.component:15} {f.text}")
            if f.mend and f.level in ("wrong", "note"):
                print(f"  {'':7} {'':15} -> {f.mend}")
        print(report.verdict)
    if report.wrong:
        raise typer.Exit(1)
