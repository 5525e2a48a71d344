"""`surefoot bringup`: does it run, is it right, how fast, against what limit; one folder with records and a report."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surefoot.cli.flags import ENGINE, flags
from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError

if TYPE_CHECKING:
    from surefoot.bringup.folder import RunFolder

QUIET_S = 10.0  # between two lines of progress where there is no terminal
TARGET = {
    name: ENGINE[name]
    for name in ("device", "dtype", "ops", "quant", "quant_group_size", "quant_lm_head", "graph", "random_weights")
} | {"num_threads": ENGINE["num_threads"]}
Model = Annotated[str | None, typer.Argument(metavar="MODEL", help="As for `surefoot run`.", show_default=False)]
Resume = Annotated[Path | None, typer.Option(metavar="DIR", help="Go on with this run folder instead.")]
Runs = Annotated[Path, typer.Option(metavar="DIR", help="Where run folders are made.")]
Lang = Annotated[str | None, typer.Option(metavar="LANG", help="Language of the report: en, zh or both [both].")]
Quick = Annotated[bool, typer.Option("--quick", help="Small sizes: for tiny models, or a first look.")]
Batch = Annotated[str | None, typer.Option(metavar="N,N,...", help="Sequences together [1,2,4,8].")]
PromptLen = Annotated[
    str | None, typer.Option(metavar="N,N,...", help="Prompt lengths [16,64,256,1024; quick 16,128].")
]
OutputLen = Annotated[str | None, typer.Option(metavar="N,N,...", help="Output lengths [10,20,50,100; quick 10,50].")]
Concurrency = Annotated[str | None, typer.Option(metavar="N,N,...", help="Requests in flight at the server [1,4,16].")]
Requests = Annotated[
    int | None, typer.Option(metavar="N", help="Requests per concurrency [4 x, at least 32; quick 40].")
]


@flags(EngineConfig, "config", TARGET)
def bringup(
    model: Model = None,
    resume: Resume = None,
    quick: Quick = False,
    lang: Lang = None,
    runs: Runs = Path("runs"),
    batch: Batch = None,
    prompt_len: PromptLen = None,
    output_len: OutputLen = None,
    concurrency: Concurrency = None,
    requests: Requests = None,
    *,
    config: EngineConfig,
) -> None:
    """Check, prove, measure and estimate a model on a device, and write the report.

    Doctor, operator coverage, known answers, proof, calibration, bench, server load, estimate, audit, report. What ends
    it in between loses nothing that was finished: go on with --resume. Exit code 1: a stage failed or found a fault.

    \b
    Examples:
      surefoot bringup canary-llama --quick
      surefoot bringup DIR --device npu:0 --dtype bfloat16 --lang zh
      surefoot bringup --resume runs/canary-llama-cpu-bfloat16-20261121-090000
    """
    from surefoot.bringup.folder import RunFolder
    from surefoot.bringup.run import Run
    from surefoot.bringup.stages.order import STAGES

    sizes = {"batch": batch, "prompt_lens": prompt_len, "output_lens": output_len, "concurrency": concurrency}
    if (model is None) == (resume is None):
        raise InputError("give a MODEL to bring up, or --resume DIR to go on with a run folder: one of the two")
    if resume is not None:
        if quick or requests or lang or any(sizes.values()) or config != EngineConfig():
            raise InputError("a resumed run keeps its settings: leave out everything but --resume DIR")
        folder = RunFolder.open(resume)
    else:
        given: dict[str, Any] = {name: _numbers(name, text) for name, text in sizes.items() if text is not None}
        given |= {name: x for name, x in (("requests", requests), ("lang", lang)) if x is not None}
        engine = {name: getattr(config, name) for name in TARGET}
        folder = _new(str(model), runs, quick, engine | given)
    with _Screen() as screen:
        print(f"bringing up {folder.manifest['settings']['model']}: {folder.path}", flush=True)
        try:
            good = Run(folder, screen, STAGES).go()
        except KeyboardInterrupt:
            raise InterruptedRun(folder.path) from None
    _close(folder)
    if not good:
        raise typer.Exit(1)


class InterruptedRun(InputError):
    """Ctrl-C in the middle of a run."""

    exit_code = 130

    def __init__(self, path: Path):
        super().__init__(f"interrupted; nothing finished is lost, go on with: surefoot bringup --resume {path}")


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        flag = {"prompt_lens": "prompt-len", "output_lens": "output-len"}.get(name, name)
        raise InputError(f"--{flag} {text!r}: write positive numbers like 1,2,4") from None


def _new(model: str, runs: Path, quick: bool, given: dict[str, Any]) -> RunFolder:
    """Check what can be checked at once, fit the sizes to the model, make the folder."""
    from surefoot import __version__
    from surefoot.bench.result import command_line
    from surefoot.bringup.folder import RunFolder
    from surefoot.bringup.settings import QUICK, BringupSettings, fitted, folder_name
    from surefoot.weights.hub import resolve
    from surefoot.weights.jsonfile import read_json_object

    settings = BringupSettings(model, **((QUICK if quick else {}) | given))
    if settings.device != "cpu":
        from surefoot.device import get_device

        get_device(settings.device)  # an absent device is one clear line, not ten failed stages
    with _Screen() as screen:
        folder = resolve(model, progress=screen.plain)
    config = read_json_object(folder / "config.json")
    text = config.get("text_config") or config
    settings = fitted(settings, text.get("max_position_embeddings"))
    stored = str(text.get("dtype") or text.get("torch_dtype") or "auto").removeprefix("torch.")
    name = folder_name(settings, settings.dtype if settings.dtype != "auto" else stored)
    from surefoot.bringup.stages.order import STAGES

    facts = {"surefoot": __version__, "command": command_line(), "model_folder": str(folder)}
    return RunFolder.create(runs / name, settings.as_dict(), [stage.name for stage in STAGES], facts)


def _close(folder: RunFolder) -> None:
    """The last lines: where the report is."""
    stages = folder.stages
    total = sum(s.get("seconds") or 0.0 for s in stages.values())
    bad = [name for name, s in stages.items() if s.get("level") == "bad"]
    print(f"{'done' if not bad else 'done, with faults in ' + ', '.join(bad)} in {total:.0f} s")
    for name in ("report.html", "README.md", "README.zh.md"):
        if (folder.path / name).exists():
            print(f"  {folder.path / name}")


class _Screen:
    """A line per stage on stdout; while it runs, a bar with the time left (a terminal) or a line now and then."""

    MARKS = {"good": "ok  ", "warn": "note", "bad": "BAD "}

    def __init__(self) -> None:
        from surefoot.cli.progress import Progress

        self._bar, self._head, self._told = Progress(patience_s=1.0), "", time.monotonic()

    def plain(self, what: str, fraction: float | None = None) -> None:
        self._bar(what, fraction)

    def begin(self, stage: str, number: int, total: int) -> None:
        self._head = f"[{number}/{total}] {stage}"

    def progress(self, what: str, fraction: float | None, left: float) -> None:
        if sys.stderr.isatty():
            self._bar(f"{self._head}: {what[:48]}, about {_span(left)} left", fraction)
        elif time.monotonic() > self._told + QUIET_S:
            self._told = time.monotonic()
            self._bar(f"{self._head}: {what[:60]}, about {_span(left)} left", fraction)

    def end(self, stage: str, state: str, level: str, text: str, seconds: float, reused: bool) -> None:
        self._bar.pause()
        mark = "FAIL" if state == "failed" else self.MARKS[level]
        took = "kept" if reused else f"{seconds:.1f} s"
        print(f"  {mark}  {stage:11} {took:>7}  {text[:400]}", flush=True)

    def __enter__(self) -> _Screen:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.pause()


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
