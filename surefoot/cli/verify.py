"""`surefoot verify`: prove that a model computes the right thing; exit code 0 proven, 1 refuted, 3 undecided."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surefoot.cli.flags import ENGINE, VLLM, flags
from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError, SurefootError
from surefoot.core.vllm import VllmSettings

if TYPE_CHECKING:
    from surefoot.verify.proof import Proof
    from surefoot.verify.shapes import VerifySettings

TARGET = {
    name: ENGINE[name]
    for name in ("device", "dtype", "ops", "quant", "quant_group_size", "quant_lm_head", "graph", "random_weights")
} | {"num_threads": ENGINE["num_threads"]}
OptionalModel = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="A model folder, canary-..., hf:ORG/NAME or modelscope:ORG/NAME."),
]
Backend = Annotated[str, typer.Option(metavar="NAME", help="The target: native, transformers or vllm.")]
Url = Annotated[str | None, typer.Option(metavar="URL", help="An OpenAI-compatible server as the target instead.")]
Name = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="Which model of the server; default its only.")
]
Key = Annotated[str | None, typer.Option("--api-key", metavar="KEY", help="Key for the server.")]
Prompts = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Prompts, a line each or JSONL; default the built-in set.")
]
Streamed = Annotated[
    bool, typer.Option("--streamed-reference", help="Reference layer by layer, for models larger than the memory.")
]
SkipParity = Annotated[bool, typer.Option("--skip-parity", help="Leave out batched = alone, cached = fresh, ...")]
Sensitivity = Annotated[
    bool,
    typer.Option(
        "--sensitivity/--no-sensitivity", help="After a proof, find the smallest faults it would have caught."
    ),
]
Drill = Annotated[
    bool, typer.Option("--drill", help="Instead of a proof: plant faults and see whether each is found and named.")
]
Output = Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Where the proof goes.")]
Thorough = Annotated[bool, typer.Option("--thorough", help="Paths at all lengths up to 2049 tokens, not up to 129.")]
Base = Annotated[
    str | None, typer.Option(metavar="MODEL", help="What a quantised folder was made from, to count the cost.")
]


@flags(VllmSettings, "vllm", VLLM)
@flags(EngineConfig, "config", TARGET)
def verify(
    model: OptionalModel = None,
    backend: Backend = "native",
    url: Url = None,
    url_model: Name = None,
    api_key: Key = None,
    prompts: Prompts = None,
    streamed_reference: Streamed = False,
    skip_parity: SkipParity = False,
    thorough: Thorough = False,
    base: Base = None,
    sensitivity: Sensitivity = True,
    drill: Drill = False,
    output: Output = Path("proof.json"),
    *,
    config: EngineConfig,
    vllm: VllmSettings,
) -> None:
    """Compare a model on a device, token by token, with transformers in fp32 on the CPU.

    The checks go from the template to the engine's paths and stop where the first fails; then the module at fault is
    sought and its cause named. Exit code 0 proven, 1 refuted, 3 undecided, 2 bad input.

    \b
    Examples:
      surefoot verify canary-llama
      surefoot verify DIR --device npu:0 --dtype bfloat16 -o proof.json
      surefoot verify DIR --quant w8a8 --dtype bfloat16  # against what the scheme must give, and what it costs
      surefoot verify DIR --random-weights 0             # a folder with only a config.json
      surefoot verify DIR --url http://localhost:8000    # any OpenAI-compatible server of the same model
      surefoot verify DIR --backend vllm --device npu    # a `vllm serve` of its own
      surefoot verify --drill                            # does the proof find what it should?
    """
    if drill:
        raise typer.Exit(_drill())
    if model is None:
        raise InputError("which MODEL? give a folder, canary-llama, canary-qwen3.5, hf:ORG/NAME or modelscope:ORG/NAME")
    from surefoot.verify.shapes import VerifySettings

    settings = VerifySettings(
        model,
        backend=backend,
        **{name: getattr(config, name) for name in TARGET},
        url=url,
        url_model=url_model,
        api_key=api_key,
        prompts=prompts,
        streamed_reference=streamed_reference,
        skip_parity=skip_parity,
        thorough=thorough,
        base=base,
        measure_sensitivity=sensitivity,
    )
    if backend != "vllm":
        vllm.check_unused(backend)
    elif url is not None:
        raise InputError("--url is a server that runs already, --backend vllm starts one: give one of the two")
    if code := _prove(settings, output, (config, vllm)):
        raise typer.Exit(code)


def _prove(settings: VerifySettings, output: Path, vllm: tuple[EngineConfig, VllmSettings]) -> int:
    from surefoot.verify import report_text

    if output.is_dir() or not output.parent.is_dir():
        raise InputError(f"cannot write {output}: give a file in a folder that exists")
    partial = output.with_suffix(".partial" + output.suffix)
    try:
        proof = _work(settings, partial, vllm)
    except SurefootError as error:
        if partial.exists():
            raise type(error)(f"{error}; what was found until then is in {partial}") from error
        raise
    proof.save(output)
    partial.unlink(missing_ok=True)
    print("\n".join(report_text.lines(proof)))
    print(f"  proof    {output}, sha256 {proof.data['seal'][:16]}")
    return proof.exit_code


def _work(settings: VerifySettings, partial: Path, vllm: tuple[EngineConfig, VllmSettings]) -> Proof:
    from surefoot.cli.progress import Progress
    from surefoot.verify import remote, run

    if settings.backend != "vllm":
        with Progress() as progress:
            return run.prove(settings, progress, partial)
    from surefoot.cli.vllm import started

    with started(settings.model, *vllm) as served, Progress() as progress:
        return remote.prove_endpoint(settings, progress, partial, served.backend())


def _drill() -> int:
    from surefoot.cli.progress import Progress
    from surefoot.verify import drill
    from surefoot.verify.drill_page import page

    with Progress() as progress:
        result = drill.run(progress)
    print(page(result))
    return 0 if result.passed else 1
