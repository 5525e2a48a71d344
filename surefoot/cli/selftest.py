"""`surefoot selftest`: known answers and stored logits on a device; exit code 0 or 1."""

from __future__ import annotations

from typing import Annotated

import typer

from surefoot.core.config import EngineConfig

Device = Annotated[str, typer.Option(metavar="DEVICE", help="The device to test: cpu, cuda, cuda:1, npu, npu:0, ...")]
Dtypes = Annotated[
    list[str] | None,
    typer.Option("--dtype", metavar="DTYPE", help="May be given several times; default float32 and auto."),
]
Ops = Annotated[
    str, typer.Option(metavar="POLICY", help="auto, or reference to force the readable op implementations.")
]
Threads = Annotated[int, typer.Option(metavar="N", help="CPU threads; the models are so small that more hardly help.")]


def selftest(device: Device = "cpu", dtype: Dtypes = None, ops: Ops = "auto", threads: Threads = 1) -> None:
    """Check that a device computes right: both built-in models, exact answers and logits, about ten seconds.

    \b
    Examples:
      surefoot selftest
      surefoot selftest --device npu:0 --dtype float16
      surefoot selftest --device cuda --ops reference
    """
    from surefoot.bringup import selftest as test
    from surefoot.cli.progress import Progress
    from surefoot.device import get_device

    name = get_device(device).name()
    dtypes = tuple(dict.fromkeys(dtype or ("float32", "auto")))
    config = EngineConfig(device=device, ops=ops, num_threads=threads)
    print(f"selftest on {device} ({name})", flush=True)
    with Progress() as progress:
        checks = test.run(config, dtypes, progress)
    for c in checks:
        print(
            f"  {'ok  ' if c.passed else 'FAIL'}  {c.canary:15} {c.dtype:9} {c.what:8} {c.seconds:5.1f} s  {c.detail}"
        )
    passed, line = test.verdict(checks, device)
    print(line)
    if not passed:
        raise typer.Exit(1)
