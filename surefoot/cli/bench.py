"""`surefoot bench`: how fast a model runs in this process, or how fast a server answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surefoot.cli.flags import ENGINE, VLLM, flags
from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError
from surefoot.core.vllm import VllmSettings

if TYPE_CHECKING:
    from surefoot.bench.run import NamedProof
    from surefoot.bench.sizes import Peaks

Model = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL]", help="As for `surefoot run`; not with --url.", show_default=False),
]


Backend = Annotated[str, typer.Option(metavar="NAME", help="native, transformers, or vllm: a `vllm serve` of its own.")]
Batch = Annotated[str | None, typer.Option(metavar="N,N,...", help="Sequences together, in process [1,2,4,8].")]
PromptLen = Annotated[str | None, typer.Option(metavar="N,N,...", help="Prompt lengths in tokens [128].")]
OutputLen = Annotated[str | None, typer.Option(metavar="N,N,...", help="Output lengths in tokens [32; 64 with --url].")]
Repeats = Annotated[int | None, typer.Option(metavar="N", help="Measured passes per shape, in process [6].")]
Warmup = Annotated[int | None, typer.Option(metavar="N", help="Passes (requests with --url) before the measured ones.")]
Url = Annotated[str | None, typer.Option(metavar="URL", help="Measure this OpenAI-compatible server instead.")]
UrlModel = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="Which model of the server; default its first.")
]
Key = Annotated[str | None, typer.Option("--api-key", metavar="KEY", help="Key for the server.")]
Endpoint = Annotated[str | None, typer.Option(metavar="NAME", help="completions or chat [completions].")]
Concurrency = Annotated[str | None, typer.Option(metavar="N,N,...", help="Closed loop: requests in flight [1,4,16].")]
Rate = Annotated[str | None, typer.Option(metavar="X,X,...", help="Open loop: requests per second.")]
Arrival = Annotated[str | None, typer.Option(metavar="NAME", help="Open loop: poisson, constant or burst [poisson].")]
BurstSize = Annotated[int | None, typer.Option(metavar="N", help="Requests per burst [8].")]
Requests = Annotated[int | None, typer.Option(metavar="N", help="Requests per point, or rows of a trace.")]
Prompts = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Prompts, a line each or JSONL, instead of random ones.")
]
Trace = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Replay: TIMESTAMP,ContextTokens,GeneratedTokens as CSV, or Mooncake JSONL."),
]
Speed = Annotated[float | None, typer.Option("--trace-speed", metavar="X", help="Replay this many times as fast.")]
Goodput = Annotated[
    str | None, typer.Option(metavar="TARGETS", help="Count requests within ttft:200,tpot:50 (ms; also itl, e2e).")
]
Timeout = Annotated[float | None, typer.Option(metavar="S", help="Give a silent server up after this long [120].")]
Seed = Annotated[int, typer.Option(metavar="N", help="Of random prompts and arrivals.")]
Proof = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The proof.json of this configuration; without one: UNPROVEN.")
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option("--calibration", metavar="FILE", help="Peaks for MFU and MBU, as `surefoot calibrate` measured them."),
]
Output = Annotated[
    Path, typer.Option("-o", "--output", metavar="FILE", help="Record; samples go to FILE's .raw.jsonl beside it.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the record instead of the screen.")]
Tools = Annotated[bool, typer.Option("--tools", help="Print latencies by other tools' definitions too.")]
Definitions = Annotated[bool, typer.Option("--definitions", help="Print what each metric means and leave.")]

IN_PROCESS = ("batch", "repeats", "calibration")
SERVER = (
    "url_model", "api_key", "endpoint", "concurrency", "rate", "arrival", "burst_size", "requests", "prompts", "trace",
    "trace_speed", "goodput", "timeout",
)  # fmt: skip


@flags(VllmSettings, "vllm", VLLM)
@flags(EngineConfig, "config", ENGINE)
def bench(
    model: Model = None,
    backend: Backend = "native",
    batch: Batch = None,
    prompt_len: PromptLen = None,
    output_len: OutputLen = None,
    repeats: Repeats = None,
    warmup: Warmup = None,
    url: Url = None,
    url_model: UrlModel = None,
    api_key: Key = None,
    endpoint: Endpoint = None,
    concurrency: Concurrency = None,
    rate: Rate = None,
    arrival: Arrival = None,
    burst_size: BurstSize = None,
    requests: Requests = None,
    prompts: Prompts = None,
    trace: Trace = None,
    trace_speed: Speed = None,
    goodput: Goodput = None,
    timeout: Timeout = None,
    seed: Seed = 0,
    proof: Proof = None,
    calibration: CalibrationFile = None,
    output: Output = Path("bench.json"),
    as_json: Json = False,
    tools: Tools = False,
    definitions: Definitions = False,
    *,
    config: EngineConfig,
    vllm: VllmSettings,
) -> None:
    """Measure load, prefill, decode, memory and capacity in process; or latency and throughput of a server.

    Lists make a sweep. Every result names the proof of the same configuration, or says UNPROVEN.

    \b
    Examples:
      surefoot bench canary-llama --batch 1,2,4,8 --prompt-len 16,64 --output-len 10,20,50
      surefoot bench DIR --device npu:0 --proof proof.json -o bench.json
      surefoot bench --url http://localhost:8000 --concurrency 1,8,32 --goodput ttft:500,tpot:50
      surefoot bench DIR --backend vllm --device npu --tensor-parallel-size 8 --concurrency 1,32
      surefoot bench --url http://localhost:8000 --trace trace.csv --requests 500 --trace-speed 10
    """
    given = dict(locals())
    if definitions:
        from surefoot.bench.screen import show_definitions

        return show_definitions()
    _check_mode(model, url, backend, given)
    if backend != "vllm":
        vllm.check_unused(backend)
    data = _measured(given, config, vllm, _named(proof))
    if as_json:
        return print(json.dumps(data, ensure_ascii=False, default=str))
    from surefoot.bench.screen import show

    return show(data, str(output), tools)


def _measured(
    given: dict[str, Any], config: EngineConfig, vllm: VllmSettings, proof: NamedProof | None
) -> dict[str, Any]:
    from surefoot.cli.progress import Progress

    if given["backend"] == "vllm":
        from surefoot.cli.vllm import started

        with started(given["model"], config, vllm) as served, Progress() as progress:
            place = {"url": served.url, "url_model": served.served_name}
            return _server(given | place, proof, progress, served.info(), served.process.start_s)
    with Progress() as progress:
        return _server(given, proof, progress) if given["url"] else _engine(given, config, proof, progress)


def _check_mode(model: str | None, url: str | None, backend: str, given: dict[str, Any]) -> None:
    if (model is None) == (url is None):
        raise InputError("give a MODEL to measure in process, or --url URL to measure a server: one of the two")
    if url and backend == "vllm":
        raise InputError("--url is a server that runs already, --backend vllm starts one: give one of the two")
    served = url is not None or backend == "vllm"
    foreign = IN_PROCESS if served else SERVER
    if wrong := next((name for name in foreign if given[name] is not None), None):
        flag = {"url_model": "model"}.get(wrong, wrong).replace("_", "-")
        raise InputError(f"--{flag} belongs to {'a benchmark in process' if served else '--url'}: leave it out")
    if given["rate"] and given["concurrency"]:
        raise InputError("--rate is an open loop, --concurrency a closed one: give one of the two")
    if given["trace"] and (given["rate"] or given["concurrency"] or given["prompts"]):
        raise InputError("--trace says when and how long: leave out --rate, --concurrency and --prompts")


def _engine(given: dict[str, Any], config: EngineConfig, proof: NamedProof | None, progress: Any) -> dict[str, Any]:
    from surefoot.bench.engine import EngineSettings
    from surefoot.bench.run import bench_engine

    chosen: dict[str, Any] = _lists(given, {"batch": "batch", "prompt_len": "prompt_lens", "output_len": "output_lens"})
    chosen |= {k: given[k] for k in ("repeats", "warmup", "seed") if given[k] is not None}
    for name, least in (("repeats", 1), ("warmup", 0)):
        if chosen.get(name, least) < least:
            raise InputError(f"--{name} must be at least {least}, got {chosen[name]}")
    calibrated = _calibrated(given["calibration"], config.device)
    return bench_engine(
        given["model"], given["backend"], config, EngineSettings(**chosen), given["output"], proof, progress, calibrated
    )


def _calibrated(path: Path | None, name: str) -> Peaks | None:
    """The peaks of a calibration: the one that was named, or the machine's own where nobody publishes any."""
    from surefoot.analyze.calibrate import default_path, load
    from surefoot.device import get_device

    device = get_device(name)
    own = default_path(str(device))
    if path is None and (device.capabilities.source or not own.is_file()):
        return None
    found = load(path or own)
    if found.device_name == device.name():
        return found.peaks
    if path is None:
        return None
    raise InputError(f"{path} was measured on {found.device_name}, and this is {device.name()}: calibrate here")


def _server(
    given: dict[str, Any],
    proof: NamedProof | None,
    progress: Any,
    managed: dict[str, Any] | None = None,
    start_s: float | None = None,
) -> dict[str, Any]:
    from surefoot.bench.metrics import parse_targets
    from surefoot.bench.run import bench_server
    from surefoot.bench.server import MAX_REQUESTS, ServerSettings

    names = {"concurrency": "concurrency", "prompt_len": "prompt_lens", "output_len": "output_lens"}
    chosen: dict[str, Any] = _lists(given, names)
    if given["rate"]:
        chosen["rates"] = _list("--rate", given["rate"], float)
    plain = ("arrival", "burst_size", "requests", "warmup", "prompts", "trace", "trace_speed", "timeout", "seed")
    chosen |= {k: given[k] for k in plain if given[k] is not None}
    for name, least, most in (("requests", 1, MAX_REQUESTS), ("burst_size", 1, 10_000), ("warmup", 0, 10_000)):
        if not least <= chosen.get(name, least) <= most:
            raise InputError(f"--{name.replace('_', '-')} must lie in {least}..{most}, got {chosen[name]}")
    if not chosen.get("timeout", 1) > 0:
        raise InputError(f"--timeout must be positive, got {chosen['timeout']:g}")
    return bench_server(
        given["url"],
        ServerSettings(**chosen, targets=parse_targets(given["goodput"])),
        given["output"],
        model=given["url_model"],
        api_key=given["api_key"],
        endpoint=given["endpoint"] or "completions",
        proof=proof,
        progress=progress,
        managed=managed,
        start_s=start_s,
    )


def _lists(given: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    flag_of = {name: "--" + name.replace("_", "-") for name in names}
    return {field: _list(flag_of[name], given[name], int) for name, field in names.items() if given[name] is not None}


def _list(flag: str, text: str, kind: type) -> tuple[Any, ...]:
    try:
        values = tuple(kind(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < v < 10_000_000 for v in values):
        raise InputError(f"{flag} {text!r}: write positive numbers like 1,2,4")
    return values


def _named(path: Path | None) -> NamedProof | None:
    """The proof with its own check's complaints: an unsound one makes the result UNPROVEN, not the benchmark fail."""
    if path is None:
        return None
    from surefoot.bench.run import NamedProof
    from surefoot.verify.proof import Proof

    proof = Proof.load(path)
    return NamedProof(proof.data, str(path), proof.check())
