"""Somebody else's benchmark, unmodified, against `surefoot serve`, beside our definitions of its metrics on one log.

    python benchmarks/outside_tool.py vllm /path/to/env/bin/vllm
    python benchmarks/outside_tool.py guidellm /path/to/env/bin/guidellm -o guidellm.json
    python benchmarks/outside_tool.py evalscope /path/to/env/bin/evalscope

Starts a server, puts a recording proxy in front of it, runs the tool, reads its report, and computes from the proxy's
log what `surefoot bench --tools` would print under the tool's name. Same requests, two clocks: what is left is what the
tool's own client adds between the socket and its stopwatch.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from recording_proxy import recorded

from surefoot.bench.metrics import latencies
from surefoot.bench.result import host
from surefoot.weights.hub import resolve

Values = dict[str, float]  # metric -> mean in seconds


@dataclass(frozen=True)
class Load:
    """requests closed-loop, `concurrency` at a time, of `prompt` tokens in and `output` tokens out."""

    model: str
    folder: str
    requests: int
    concurrency: int
    prompt: int
    output: int


def vllm_command(url: str, load: Load, out: Path) -> list[str]:
    return [
        "bench", "serve", "--backend", "openai", "--base-url", url, "--model", load.model, "--tokenizer", load.folder,
        "--dataset-name", "random", "--random-input-len", str(load.prompt), "--random-output-len", str(load.output),
        "--num-prompts", str(load.requests), "--max-concurrency", str(load.concurrency), "--ignore-eos",
        "--save-result", "--result-dir", str(out), "--result-filename", "result.json", "--percentile-metrics",
        "ttft,tpot,itl,e2el",
    ]  # fmt: skip


def vllm_report(out: Path) -> Values:
    data = json.loads((out / "result.json").read_text())
    names = {"ttft": "ttft", "tpot": "tpot", "itl": "itl", "e2e": "e2el"}
    return {ours: data[f"mean_{theirs}_ms"] / 1000 for ours, theirs in names.items()}


def guidellm_command(url: str, load: Load, out: Path) -> list[str]:
    data = f"kind=synthetic_text,prompt_tokens={load.prompt},output_tokens={load.output}"
    return [
        "run", "--backend", f"kind=openai_http,target={url},model={load.model}", "--data", data,
        "--tokenizer", f"kind=huggingface_auto,model={load.folder}",
        "--profile", f"kind=concurrent,streams={load.concurrency}", "--constraint",
        f"kind=max_requests,count={load.requests}", "--output", f"kind=json,path={out / 'result.json'}",
        "--disable-console",
    ]  # fmt: skip


def guidellm_report(out: Path) -> Values:
    metrics = json.loads((out / "result.json").read_text())["benchmarks"][0]["metrics"]
    names = {"ttft": ("time_to_first_token_ms", 1000), "tpot": ("time_per_output_token_ms", 1000),
             "itl": ("inter_token_latency_ms", 1000), "e2e": ("request_latency", 1)}  # fmt: skip
    return {ours: metrics[name]["successful"]["mean"] / scale for ours, (name, scale) in names.items()}


def evalscope_command(url: str, load: Load, out: Path) -> list[str]:
    return [
        "perf", "--url", f"{url}/v1/completions", "--api", "openai", "--model", load.model, "--tokenizer-path",
        load.folder, "--dataset", "random", "--min-prompt-length", str(load.prompt), "--max-prompt-length",
        str(load.prompt), "--max-tokens", str(load.output), "--parallel", str(load.concurrency), "-n",
        str(load.requests), "--stream", "--extra-args", '{"ignore_eos": true}', "--outputs-dir", str(out),
        "--no-timestamp",
    ]  # fmt: skip


def evalscope_report(out: Path) -> Values:
    (found,) = out.rglob("benchmark_summary.json")
    data = json.loads(found.read_text())
    names = {"ttft": "Avg TTFT (ms)", "tpot": "Avg TPOT (ms)", "itl": "Avg ITL (ms)"}
    return {ours: data[name] / 1000 for ours, name in names.items()} | {"e2e": data["Avg Latency (s)"]}


TOOLS: dict[str, tuple[Callable[[str, Load, Path], list[str]], Callable[[Path], Values]]] = {
    "vllm": (vllm_command, vllm_report),
    "guidellm": (guidellm_command, guidellm_report),
    "evalscope": (evalscope_command, evalscope_report),
}


@contextlib.contextmanager
def serving(load: Load, log: Path) -> Iterator[int]:
    """A `surefoot serve` of its own; yields its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = Path(sys.executable).parent / "surefoot"
    limit = load.prompt + load.output + 64
    flags = ["--port", str(port), "--max-model-len", str(limit), "--kv-cache-tokens", str(2 * load.concurrency * limit)]
    with log.open("w") as file:
        process = subprocess.Popen([str(program), "serve", load.model, *flags], stdout=file, stderr=file)
    try:
        for _ in range(120):
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            if process.poll() is not None:
                raise SystemExit(f"the server did not start:\n{log.read_text()}")
            time.sleep(0.5)
        yield port
    finally:
        process.terminate()
        process.wait(20)


def compare(tool: str, theirs: Values, logs: list) -> list[dict[str, Any]]:
    ours = latencies(logs)
    return [
        {"metric": metric, "theirs_s": value, "ours_s": mine, "apart": value / mine - 1}
        for metric, value in theirs.items()
        if (mine := ours[f"{metric}@{tool}"]["mean"])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("program", help="the tool's executable, in an environment of its own")
    parser.add_argument("--model", default="canary-llama")
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=3072)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    load = Load(args.model, str(resolve(args.model)), args.requests, args.concurrency, args.prompt, args.output_len)
    command, report = TOOLS[args.tool]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        with serving(load, out / "server.log") as port, recorded("127.0.0.1", port) as proxy:
            words = [args.program, *command(proxy.url, load, out)]
            done = subprocess.run(words, capture_output=True, text=True, cwd=out, timeout=600, check=False)
            if done.returncode:
                raise SystemExit(f"{args.tool} failed:\n{(done.stdout + done.stderr)[-3000:]}")
        theirs = report(out)
    logs = [log for log in proxy.logs() if log.ok][-load.requests :]  # what came before are the tool's own trials
    if len(logs) < load.requests:
        raise SystemExit(
            f"the proxy saw {len(logs)} answers of {load.requests}: {[log.error for log in proxy.logs()][:3]}"
        )
    rows = compare(args.tool, theirs, logs)
    print(
        f"{args.tool}: {len(logs)} requests, {load.concurrency} at a time, {load.prompt} + {load.output} tokens; means"
    )
    print(f"{'metric':8}{'tool says':>14}{'from our log':>14}{'apart':>10}")
    for row in rows:
        theirs_ms, ours_ms = 1000 * row["theirs_s"], 1000 * row["ours_s"]
        print(
            f"{row['metric']:8}{theirs_ms:11.2f} ms{ours_ms:11.2f} ms{theirs_ms - ours_ms:7.2f} ms{row['apart']:8.2%}"
        )
    if args.output:
        record = {"tool": args.tool, "command": words, "load": vars(load), "host": host(), "rows": rows}
        args.output.write_text(json.dumps(record | {"requests": [log.as_dict() for log in logs]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
