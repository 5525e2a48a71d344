"""What the server costs: 8 streams over HTTP against the same engine called in this process, in turn.

    python benchmarks/bench_serve.py MODEL [--streams 8] [--prompt 32] [--tokens 64] [--repeats 5] [-o results.json]

The engine's turn: the requests are added together and stepped to the end. The server's turn: the same engine behind
Surefoot's own server on a free port, and a client in a process of its own (on the same machine, so its work is paid for
here, too) that sends the same prompts as token ids to /v1/completions, streamed. Both must bring out every token; a
rate is all output tokens by the time from the first request to the last byte, prompts included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench_peers import machine, progress
from peers.worker import prompt


def engine_turn(engine, prompts: list[list[int]], tokens: int) -> float:
    """Tokens per second."""
    from surefoot.core.sampling import SamplingParams

    begin, count = time.perf_counter(), 0
    for ids in prompts:
        engine.add_request(ids, SamplingParams(max_tokens=tokens, ignore_eos=True))
    while engine.has_unfinished():
        count += sum(len(output.token_ids) for output in engine.step())
    assert count == tokens * len(prompts)
    return count / (time.perf_counter() - begin)


def server_turn(url: str, options: argparse.Namespace) -> float:
    command = [sys.executable, __file__, options.model, "--client", url, "--vocab", str(options.vocab)]
    for name in ("streams", "prompt", "tokens"):
        command += [f"--{name}", str(getattr(options, name))]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


async def client_turn(options: argparse.Namespace) -> float:
    from surefoot.bench.client import Client

    prompts = [prompt(options.prompt, i, options.vocab) for i in range(options.streams)]
    client = Client(options.client)
    common = {"model": options.name, "max_tokens": options.tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    common["stream_options"] = {"include_usage": True}
    requests = [
        client.request("/v1/completions", json.dumps({**common, "prompt": ids}).encode(), f"serve-{i}")
        for i, ids in enumerate(prompts)
    ]
    await client.prepare(len(requests))
    begin = time.monotonic()
    done = await asyncio.gather(*(client.post(r) for r in requests))
    client.close()
    count = 0
    for exchange in done:
        body = b"".join(piece for _, piece in exchange.parts)
        if exchange.error or exchange.status != 200:
            raise SystemExit(f"a request failed: {exchange.error or exchange.status} {body[:200]!r}")
        usage = next(line for line in reversed(body.split(b"\n\n")) if b"usage" in line)
        count += json.loads(usage.removeprefix(b"data: "))["usage"]["completion_tokens"]
    if count != options.tokens * options.streams:
        raise SystemExit(f"{count} tokens came instead of {options.streams} x {options.tokens}")
    return count / (max(exchange.ended for exchange in done) - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--graph", default="auto", choices=["auto", "off", "full"])
    parser.add_argument("--client", help=argparse.SUPPRESS)
    parser.add_argument("--vocab", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    options.name = options.model
    if options.client:
        return print(json.dumps(asyncio.run(client_turn(options))))
    from surefoot.core.config import EngineConfig
    from surefoot.engine.engine import Engine
    from surefoot.serve.inprocess import serving

    config = EngineConfig(
        num_threads=options.threads,
        graph=options.graph,
        max_num_seqs=options.streams,
        max_model_len=1024,
        kv_cache_tokens=16384,
        enable_prefix_caching=False,
    )
    engine = Engine.load(options.model, config)
    options.vocab = engine.vocab_size
    prompts = [prompt(options.prompt, i, engine.vocab_size) for i in range(options.streams)]
    raw: dict[str, list[float]] = {"engine": [], "server": []}
    for repeat in range(-1, options.repeats):
        ours = engine_turn(engine, prompts, options.tokens)
        with serving(engine) as url:
            served = server_turn(url, options)
        if repeat >= 0:
            raw["engine"].append(ours)
            raw["server"].append(served)
        progress(f"turn {repeat + 1} of {options.repeats}")
    progress("")
    shares = sorted(s / e for s, e in zip(raw["server"], raw["engine"]))
    ours, served = (statistics.median(side) for side in raw.values())
    spread = f"{statistics.median(shares):.1%} ({shares[0]:.1%}..{shares[-1]:.1%})"
    print(f"{Path(options.model).name}: engine {ours:.1f} tok/s, server {served:.1f} tok/s, that is {spread} of it")
    if options.output:
        head = {"model": options.model, "machine": machine(), "settings": {**vars(options), "output": ""}}
        options.output.write_text(json.dumps(head | {"raw": raw}, indent=1))
    return None


if __name__ == "__main__":
    main()
