"""Benchmark of a server over HTTP: a sweep over concurrency or rate, prompt length and output length, or a trace."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surefoot.bench.client import Client
from surefoot.bench.load import Job, Meter, allow_sockets, arrivals, closed_loop, metered, open_loop
from surefoot.bench.metrics import point_metrics
from surefoot.bench.rawlog import RequestLog
from surefoot.bench.result import Result
from surefoot.bench.target import Target
from surefoot.bench.workload import Ask, TraceRow, read_prompts, read_trace, trace_ids
from surefoot.core.errors import InputError, SurefootError

Progress = Callable[[str, "float | None"], None]
MAX_REQUESTS = 1_000_000
GIVE_UP = 2  # points in a row in which nothing succeeded


@dataclass(frozen=True)
class ServerSettings:
    """What to ask of a server.

    concurrency: closed loop, so many in flight.  rates: open loop, requests per second, by `arrival`.
    requests: measured per point; None takes max(4 x concurrency, 32), or all prompts or rows that there are.
    warmup: requests before each point, not counted; None takes the concurrency (at most 8 in open loop).
    timeout: seconds without a byte after which a request has failed.
    """

    concurrency: tuple[int, ...] = (1, 4, 16)
    rates: tuple[float, ...] = ()
    arrival: str = "poisson"
    burst_size: int = 8
    prompt_lens: tuple[int, ...] = (128,)
    output_lens: tuple[int, ...] = (64,)
    requests: int | None = None
    warmup: int | None = None
    prompts: Path | None = None
    trace: Path | None = None
    trace_speed: float = 1.0
    targets: dict[str, float] = field(default_factory=dict)
    timeout: float = 120.0
    seed: int = 0


@dataclass(frozen=True)
class Point:
    """One combination of the sweep. Lengths are None where prompts or a trace say them."""

    index: int
    concurrency: int | None
    rate: float | None
    prompt_len: int | None
    output_len: int | None

    @property
    def name(self) -> str:
        parts = {
            "concurrency": self.concurrency,
            "rate/s": self.rate,
            "prompt": self.prompt_len,
            "out": self.output_len,
        }
        return ", ".join(f"{k} {v:g}" for k, v in parts.items() if v is not None) or "trace"


def points(settings: ServerSettings) -> list[Point]:
    """The cartesian sweep, the load slowest."""
    if settings.trace is not None:
        return [Point(0, None, None, None, None)]
    loads: list[tuple[int | None, float | None]] = [(c, None) for c in settings.concurrency]
    if settings.rates:
        loads = [(None, r) for r in settings.rates]
    lengths: Sequence[int | None] = settings.prompt_lens if settings.prompts is None else (None,)
    combined = itertools.product(loads, lengths, settings.output_lens)
    return [Point(i, c, r, p, o) for i, ((c, r), p, o) in enumerate(combined)]


class ServerBench:
    """Runs the points one after another and writes each one to the result as soon as it is done."""

    def __init__(self, target: Target, settings: ServerSettings, api_key: str | None, progress: Progress | None = None):
        self.target, self.settings, self.api_key = target, settings, api_key
        self.progress = progress or (lambda what, fraction: None)
        self._ids = itertools.count()
        self._failed_in_row = 0
        chat = target.endpoint == "chat"
        self.asks = read_prompts(settings.prompts, chat) if settings.prompts else []
        self.rows = read_trace(settings.trace, settings.requests) if settings.trace else []
        self.points = points(settings)
        self.check()

    # ---- before anything is sent

    def check(self) -> None:
        """Refuse what can never run, before the first request."""
        limit, settings = self.target.backend.max_model_len, self.settings
        for point in self.points:
            if limit and (point.prompt_len or 1) + (point.output_len or 0) > limit:
                raise InputError(f"impossible sweep: {point.name} exceeds the server's max_model_len of {limit}")
        longest = max((r.prompt_tokens + r.output_tokens for r in self.rows), default=0)
        if limit and longest > limit:
            raise InputError(
                f"{settings.trace}: the longest request has {longest} tokens, the server's max_model_len is {limit}"
            )
        if settings.rates:
            for rate in settings.rates:
                arrivals(settings.arrival, 1, rate)
        if not 0 < settings.trace_speed < float("inf"):
            raise InputError(f"--trace-speed must be positive, got {settings.trace_speed:g}")

    def count(self, point: Point) -> int:
        if self.rows:
            return len(self.rows)
        if self.settings.requests is not None:
            return self.settings.requests
        return len(self.asks) or max(4 * (point.concurrency or 8), 32)

    def warmups(self, point: Point) -> int:
        if self.settings.warmup is not None:
            return self.settings.warmup
        return min(point.concurrency or 8, self.count(point))

    # ---- requests

    def jobs(self, point: Point, phase: str, count: int, offset: int = 0) -> Iterator[Job]:
        # NOTE: warm-up and every point draw other prompts, or a prefix cache would answer the measured ones.
        draw = random.Random(f"{self.settings.seed}/{point.index}/{phase}")
        for i in range(count):
            ask, output = self._ask(point, i + offset, draw)
            number = next(self._ids)
            log = RequestLog(number, point.index, phase, ask.tokens, output if "ignore_eos" in self._extras else None)
            body = self.target.body(ask, output)
            yield Job(self.client.request(self.target.path, body, f"bench-{number}"), log)

    @property
    def _extras(self) -> dict[str, Any]:
        return self.target.extras

    def _ask(self, point: Point, i: int, draw: random.Random) -> tuple[Ask, int]:
        if self.rows:
            row: TraceRow = self.rows[i % len(self.rows)]
            ids = trace_ids(row, self.target.pool, draw) if self.target.takes_ids else None
            return self.target.exact(row.prompt_tokens, draw, ids), row.output_tokens
        if self.asks:
            ask = self.asks[i % len(self.asks)]
            return ask, ask.max_tokens or point.output_len or 1
        assert point.prompt_len is not None
        assert point.output_len is not None
        return self.target.exact(point.prompt_len, draw), point.output_len

    # ---- the run

    def run(self, result: Result) -> None:
        self.client = Client(self.target.backend.url, self.api_key, self.settings.timeout)
        allow_sockets(max([*self.settings.concurrency, 512 if self.rows or self.settings.rates else 0]))
        for point in self.points:
            self.progress(f"{point.name} ({point.index + 1}/{len(self.points)})", point.index / len(self.points))
            result.add_point(asyncio.run(self._point(point, result)))
            if self._failed_in_row == min(GIVE_UP, len(self.points)):
                why = next(iter(result.data["points"][-1]["errors"]), "no reason given")
                raise SurefootError(f"{self.target.backend.url} failed every request: {why}")

    async def _point(self, point: Point, result: Result) -> dict[str, Any]:
        jobs = list(self.jobs(point, "measured", self.count(point)))
        times = self._times(point, len(jobs))
        meter = Meter()
        warm: list[Job] = []
        try:
            if self.warmups(point):
                warm = list(self.jobs(point, "warmup", self.warmups(point), len(jobs)))
                await closed_loop(self.client, warm, min(len(warm), point.concurrency or 8))
            async with metered(meter):
                if times is None:
                    await closed_loop(self.client, jobs, point.concurrency or 1)
                else:
                    await open_loop(self.client, jobs, times)
        finally:
            self.client.close()
            logs = [job.finish() for job in jobs]
            warm_logs = [job.finish() for job in warm]
            for log in [*warm_logs, *logs]:
                result.write({"record": "request"} | log.as_dict())
        return self._describe(point, logs, warm_logs, meter, times)

    def _times(self, point: Point, count: int) -> list[float] | None:
        settings = self.settings
        if self.rows:
            return [row.at / settings.trace_speed for row in self.rows]
        if point.rate is None:
            return None
        return arrivals(settings.arrival, count, point.rate, settings.seed, settings.burst_size)

    def _describe(
        self, point: Point, logs: list[RequestLog], warm: list[RequestLog], meter: Meter, times: list[float] | None
    ) -> dict[str, Any]:
        metrics = point_metrics(logs, self.settings.targets)
        client = meter.result(len(logs))
        metrics["warnings"] = metrics.get("warnings", []) + client.pop("warnings")
        self._failed_in_row = 0 if metrics["completed"] else self._failed_in_row + 1
        load = (
            "closed loop" if times is None else "trace replay" if self.rows else f"open loop, {self.settings.arrival}"
        )
        return {
            "name": point.name,
            "load": load,
            "concurrency": point.concurrency,
            "rate_per_s": point.rate,
            "prompt_len": point.prompt_len,
            "output_len": point.output_len,
            "warmup": _warmup(warm),
            "client": client,
            **metrics,
        }


def _warmup(logs: list[RequestLog]) -> dict[str, Any]:
    """What came before the measurement: how many, and how long the first and the median one took."""
    good = [log.ended - log.sent for log in logs if log.ok]
    if not good:
        return {"requests": len(logs), "failed": len(logs)}
    return {
        "requests": len(logs),
        "failed": len(logs) - len(good),
        "first_e2e_s": good[0],
        "median_e2e_s": sorted(good)[len(good) // 2],
    }
