"""Load: who is sent when. Closed loop (a fixed number in flight) or open loop (arrivals come when they come).

Open-loop arrivals do not wait for answers, so a slow server cannot slow its own load down.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from surefoot.bench.client import Client, Exchange, clock
from surefoot.bench.rawlog import RequestLog
from surefoot.bench.sse import Reader
from surefoot.bench.stats import summary
from surefoot.core import collector
from surefoot.core.errors import InputError

LAG_EVERY = 0.02
BURST_SIZE = 8


@dataclass
class Job:
    """One request, ready to send, and the log that its answer goes to."""

    request: bytes
    log: RequestLog
    exchange: Exchange | None = None

    def finish(self) -> RequestLog:
        """Parse what came back into the log."""
        log, exchange = self.log, self.exchange
        if exchange is None:
            log.error = "never sent: the run was interrupted"
            return log
        log.sent, log.ended, log.status, log.error = exchange.sent, exchange.ended, exchange.status, exchange.error
        if exchange.status is not None and exchange.status != 200:
            log.error = f"HTTP {exchange.status}: {' '.join(exchange.body.decode('utf-8', 'replace').split())[:160]}"
            return log
        Reader(log).read(exchange.parts)
        if log.error is None and log.first_token is None:
            log.error = "an answer without any token: is it a stream of completion chunks?"
        return log


def arrivals(kind: str, count: int, rate: float, seed: int = 0, burst_size: int = BURST_SIZE) -> list[float]:
    """Seconds after the start at which each of `count` requests is sent, `rate` per second on average.

    poisson: independent.  constant: evenly spaced.  burst: groups of `burst_size` at one moment, groups by Poisson.
    """
    if not 0 < rate < float("inf"):
        raise InputError(f"the rate must be a positive number of requests per second, got {rate:g}")
    draw, now, times = random.Random(seed), 0.0, []
    for i in range(count):
        times.append(now)
        if kind == "constant":
            now += 1 / rate
        elif kind == "poisson":
            now += draw.expovariate(rate)
        elif kind == "burst":
            now += draw.expovariate(rate / burst_size) if (i + 1) % burst_size == 0 else 0.0
        else:
            raise InputError(f"unknown arrival pattern {kind!r}: choose poisson, constant or burst")
    return times


async def closed_loop(client: Client, jobs: Sequence[Job], concurrency: int) -> None:
    """`concurrency` in flight until the jobs are used up."""
    await client.prepare(min(concurrency, len(jobs)))
    waiting = iter(jobs)

    async def worker() -> None:
        for job in waiting:
            job.log.scheduled = clock()
            job.exchange = await client.post(job.request)

    await asyncio.gather(*(worker() for _ in range(min(concurrency, len(jobs)))))


async def open_loop(client: Client, jobs: Sequence[Job], times: Sequence[float]) -> None:
    """Send job i at times[i] seconds after the start, whatever has been answered."""
    await client.prepare(min(64, len(jobs)))
    loop, begin = asyncio.get_running_loop(), clock() + 0.05
    loop_begin = loop.time() + begin - clock()

    async def one(job: Job) -> None:
        job.exchange = await client.post(job.request)

    tasks: list[asyncio.Task[None]] = []

    def start(job: Job) -> None:
        tasks.append(loop.create_task(one(job)))

    for job, at in zip(jobs, times):
        job.log.scheduled = begin + at
        loop.call_at(loop_begin + at, start, job)
    await asyncio.sleep(max(times, default=0.0) + begin - clock())
    while len(tasks) < len(jobs):
        await asyncio.sleep(0.001)
    await asyncio.gather(*tasks)


@dataclass
class Meter:
    """What the client itself cost: CPU time, and how late its event loop was for a timer."""

    cpu_s: float = 0.0
    wall_s: float = 0.0
    lags: list[float] = field(default_factory=list)

    async def watch(self) -> None:
        while True:
            due = clock() + LAG_EVERY
            await asyncio.sleep(LAG_EVERY)
            self.lags.append(max(0.0, clock() - due))

    def result(self, requests: int) -> dict[str, Any]:
        share = self.cpu_s / self.wall_s if self.wall_s else 0.0
        facts = {
            "cpu_s_per_request": self.cpu_s / max(1, requests),
            "cpu_share": share,
            "event_loop_lag_s": summary(self.lags),
        }
        busy = f"the client used {share:.0%} of a core: it may have been the limit, not the server"
        return facts | {"warnings": [busy] if share > 0.8 else []}


@contextlib.asynccontextmanager
async def metered(meter: Meter):
    """Within the block, the meter runs and the garbage collector does not."""
    watcher = asyncio.ensure_future(meter.watch())
    began, cpu = time.perf_counter(), _cpu()
    try:
        gc.collect()
        with collector.paused():
            yield
    finally:
        meter.wall_s, meter.cpu_s = time.perf_counter() - began, _cpu() - cpu
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def allow_sockets(count: int) -> None:
    """Raise the soft limit of open files where it would not hold `count` connections; else say what to do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = count + 128
    if soft != resource.RLIM_INFINITY and soft < need:
        if hard != resource.RLIM_INFINITY and hard < need:
            raise InputError(
                f"{count} connections at once need {need} open files, the limit is {hard}: ulimit -n {need}"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))
