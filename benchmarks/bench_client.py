"""How exact the load generator is: every latency metric of a mock server with known delays, against its own send times.

    python benchmarks/bench_client.py [--concurrency 1,32,256,500] [--seconds 5] [-o bench_client.json]

Per concurrency and delay (10, 50, 200 ms between chunks): the largest error of any metric's median and mean, how late
chunks were stamped, CPU of this client per request and per chunk (with few streams that is the meter of the event-loop
lag itself, about 2 % of a core). Inside a chunk's lateness: the mock's write, the loopback, this process's turn on the
CPU, the read. The mock runs in a process of its own and takes a core itself; a line marked `!` missed max(1 ms, 2 %).
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import statistics
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "tests")]

import mock_server

from surefoot.bench.client import Client
from surefoot.bench.definitions import DEFINITIONS
from surefoot.bench.load import Job, Meter, allow_sockets, closed_loop, metered
from surefoot.bench.rawlog import Chunk, RequestLog
from surefoot.bench.result import host
from surefoot.bench.target import open_target
from surefoot.bench.workload import Ask

DELAYS = (10, 50, 200)
MAX_CHUNKS_PER_S = 4000  # above it the mock itself is late


def run(url: str, concurrency: int, delay: int, seconds: float, sends) -> dict:
    """One point: `concurrency` streams, a token every `delay` ms for about `seconds`."""
    tokens = max(4, int(seconds * 1000 / delay))
    target = open_target(url, f"ttft=200,itl={delay},role=1,ids=1", endpoint="chat")
    body = target.body(Ask(messages=[{"role": "user", "content": "hi"}]), tokens)
    client, prefix = Client(url), f"{concurrency}-{delay}"
    count = max(concurrency, 4)
    jobs = [Job(client.request(target.path, body, f"{prefix}-{i}"), RequestLog(i)) for i in range(count)]
    meter = Meter()

    async def go() -> None:
        async with metered(meter):
            await closed_loop(client, jobs, concurrency)
        client.close()

    asyncio.run(go())
    logs = [job.finish() for job in jobs]
    found = sends()
    true = [truth(log, found[f"{prefix}-{log.id}"]) for log in logs if log.ok]
    late = sorted(a.time - b.time for log, t in zip(logs, true) for a, b in zip(log.chunks, t.chunks))
    result = meter.result(count)
    return {
        "concurrency": concurrency,
        "delay_ms": delay,
        "failed": sum(not log.ok for log in logs),
        "errors": errors(logs, true),
        "late_ms": {"median": statistics.median(late) * 1000, "p99": late[int(0.99 * len(late))] * 1000},
        "cpu_ms_per_request": result["cpu_s_per_request"] * 1000,
        "cpu_us_per_chunk": meter.cpu_s / len(late) * 1e6,
        "cpu_share": result["cpu_share"],
    }


def truth(log: RequestLog, sent: dict) -> RequestLog:
    chunks = [Chunk(t, c.bytes, c.tokens, c.kind, c.chars) for c, (t, _, _) in zip(log.chunks, sent["sends"])]
    return dataclasses.replace(log, chunks=chunks, ended=sent["end"])


def errors(logs: list[RequestLog], true: list[RequestLog]) -> dict[str, float]:
    """metric -> error as a share of what is allowed, max(1 ms, 2 %); the worse of median and mean."""
    shares = {}
    for definition in (d for d in DEFINITIONS if d.unit == "s"):
        for take in (statistics.median, statistics.fmean):
            got, expected = (take([v for log in side for v in definition.values(log)]) for side in (logs, true))
            share = abs(got - expected) / max(0.001, 0.02 * expected)
            shares[definition.key] = max(share, shares.get(definition.key, 0.0))
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", default="1,32,256,500")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    counts = [int(c) for c in args.concurrency.split(",")]
    allow_sockets(max(counts))
    print("streams  delay  worst metric (share of the allowed error)  late p50/p99 ms  CPU ms/request  us/chunk  core")
    points = []
    with mock_server.running() as mock:
        for count in counts:
            for delay in DELAYS:
                if count * 1000 / delay > MAX_CHUNKS_PER_S:
                    continue
                point = run(mock.url, count, delay, args.seconds, mock.sends)
                points.append(point)
                worst, share = max(point["errors"].items(), key=lambda e: e[1])
                late = point["late_ms"]
                print(
                    f"{count:7d} {delay:4d}ms {'!' if share > 1 else ' '} {worst:18} {share:6.2f} {'':14} "
                    f"{late['median']:7.2f}/{late['p99']:.2f} {point['cpu_ms_per_request']:12.2f} "
                    f"{point['cpu_us_per_chunk']:10.0f} {point['cpu_share']:6.0%}"
                )
    if args.output:
        args.output.write_text(json.dumps({"host": host(), "points": points}, indent=1) + "\n")


if __name__ == "__main__":
    main()
