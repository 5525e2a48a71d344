"""`surefoot compare`: models or configurations side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surefoot.core.errors import InputError

if TYPE_CHECKING:
    from surefoot.bench.run import NamedProof
    from surefoot.compare.record import Files

Sides = Annotated[
    list[str] | None,
    typer.Argument(metavar="SIDE SIDE ...", help="MODEL[:KEY=VALUE,...] or URL[:model=NAME].", show_default=False),
]
Prompts = Annotated[Path | None, typer.Option(metavar="FILE", help="Prompts as JSON; default the built-in 16.")]
Repeats = Annotated[int, typer.Option(metavar="N", help="Passes over all prompts; times are medians.")]
MaxTokens = Annotated[int, typer.Option(metavar="N", help="Most tokens of an answer.")]
Proofs = Annotated[
    list[Path] | None, typer.Option("--proof", metavar="FILE", help="A proof.json; several, one for each side.")
]
Key = Annotated[str | None, typer.Option("--api-key", metavar="KEY", help="Key for sides that are servers.")]
RunCode = Annotated[bool, typer.Option("--run-code/--no-run-code", help="Run code in answers, with limits.")]
Rubric = Annotated[Path | None, typer.Option(metavar="FILE", help="JSON: dimension to what 1 and 5 mean.")]
Scores = Annotated[Path | None, typer.Option(metavar="FILE", help="Scores by hand: the filled-in .scores.csv.")]
Judge = Annotated[str | None, typer.Option(metavar="URL", help="A server whose model scores the answers.")]
JudgeModel = Annotated[str | None, typer.Option(metavar="NAME", help="Which model of that server.")]
JudgeKey = Annotated[str | None, typer.Option("--judge-api-key", metavar="KEY", help="Key for that server.")]
Again = Annotated[
    Path | None, typer.Option("--from", metavar="FILE", help="No measuring: score or show this record again.")
]
Output = Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Record; other files go beside it.")]
Charts = Annotated[bool, typer.Option("--charts/--no-charts", help="Draw FILE's .png and .svg.")]


def compare(
    sides: Sides = None,
    prompts: Prompts = None,
    repeats: Repeats = 3,
    max_tokens: MaxTokens = 128,
    proof: Proofs = None,
    api_key: Key = None,
    run_code: RunCode = True,
    rubric: Rubric = None,
    scores: Scores = None,
    judge: Judge = None,
    judge_model: JudgeModel = None,
    judge_api_key: JudgeKey = None,
    again: Again = None,
    output: Output = Path("compare.json"),
    charts: Charts = True,
) -> None:
    """Ask models or configurations the same prompts: load time, time per question and per token, length, memory,
    proof and quality, side by side.

    Questions go through each model's own chat template, completions as raw text. Each side runs in a process of its
    own, one after another, greedy, one request at a time.

    \b
    Examples:
      surefoot compare canary-llama canary-qwen3.5
      surefoot compare DIR DIR:quant=w8a8,name=int8 --proof bf16.json --proof int8.json
      surefoot compare DIR:device=cpu DIR:device=npu:0 DIR:backend=vllm,device=npu,tensor_parallel_size=2
      surefoot compare DIR http://localhost:8000:model=NAME --judge http://localhost:9000
      surefoot compare --from compare.json --scores compare.scores.csv      # scored by hand
    """
    from surefoot.compare.record import Files
    from surefoot.compare.rubric import load_rubric
    from surefoot.compare.screen import show

    if (judge_model or judge_api_key) and not judge:
        raise InputError("--judge-model and --judge-api-key belong to --judge URL: give it")
    if charts:
        _check_matplotlib()
    meaning = load_rubric(rubric)
    judging = _open_judge(judge, judge_model, judge_api_key)
    if again is not None:
        record, files = _again(again, sides, rubric), Files(again)
    else:
        if scores is not None:
            raise InputError("--scores are given after the answers: surefoot compare --from compare.json --scores FILE")
        files = Files(output)
        record = _measure(sides, prompts, (repeats, max_tokens, run_code), files, meaning, proof, api_key)
    _score(record, files, scores, judging)
    if charts:
        from surefoot.compare.charts import draw

        with files.disk(files.png):
            draw(record, files.png, files.svg)
    show(record)
    drawn = f", charts {files.png}" if charts else ""
    print(f"record {files.record}, answers {files.answers}{drawn}; to score by hand fill in {files.scores.name}")


def _check_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise InputError("charts need matplotlib: pip install matplotlib, or say --no-charts")


def _open_judge(url: str | None, model: str | None, key: str | None) -> Any:
    """Reached before anything is measured."""
    if url is None:
        return None
    from surefoot.backends.http import HttpBackend

    return HttpBackend(url, model, key, timeout=120.0)


def _again(path: Path, sides: list[str] | None, rubric: Path | None) -> dict[str, Any]:
    from surefoot.compare.record import load

    if sides or rubric:
        raise InputError("--from has its sides and its rubric in the record: leave them out")
    return load(path)


def _measure(
    sides: list[str] | None,
    prompts: Path | None,
    how: tuple[int, int, bool],
    files: Files,
    meaning: dict[str, str],
    proofs: list[Path] | None,
    api_key: str | None,
) -> dict[str, Any]:
    from surefoot.cli.progress import Progress
    from surefoot.compare import prompts as prompt_sets
    from surefoot.compare.run import CompareSettings, compare
    from surefoot.compare.sides import parse

    parsed, settings = parse(sides or []), CompareSettings(*how)
    asked = prompt_sets.read(prompts) if prompts else prompt_sets.built_in()
    named = [_named(path) for path in proofs or []]
    with Progress() as progress:
        return compare(parsed, asked, settings, files, meaning, proofs=named, api_key=api_key, progress=progress)


def _named(path: Path) -> NamedProof:
    from surefoot.bench.run import NamedProof
    from surefoot.verify.proof import Proof

    proof = Proof.load(path)
    return NamedProof(proof.data, str(path), proof.check())


def _score(record: dict[str, Any], files: Files, scores: Path | None, judge: Any) -> None:
    from surefoot.cli.progress import Progress
    from surefoot.compare import rubric
    from surefoot.compare.summary import to_judge

    if scores is not None and judge is not None:
        raise InputError("--scores and --judge both score: give one of the two")
    if scores is not None:
        ids = [p["id"] for p in record["prompts"]]
        record["scores"] = rubric.by_hand(scores, list(record["sides"]), ids, record["rubric"])
        record["judge"] = {"by": "hand", "file": str(scores)}
    elif judge is not None:
        with Progress() as progress:
            record["scores"] = rubric.by_judge(judge, to_judge(record), record["rubric"], progress)
        record["judge"] = {"by": "model", "url": judge.url, "model": judge.model}
    if scores is not None or judge is not None:
        files.save(record)
