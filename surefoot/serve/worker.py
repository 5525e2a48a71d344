"""EngineWorker: one inference thread that owns the engine, and the streams that carry its outputs to the event loop.

HTTP side (event loop)                    inference thread
submit() ── inbox (add, cancel) ────────> drain inbox → engine.step()
Stream <── one call_soon_threadsafe ───── all outputs of the step
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from surefoot.core.config import EngineInfo
from surefoot.core.errors import StepError, SurefootError
from surefoot.core.outputs import RequestOutput
from surefoot.core.sampling import SamplingParams
from surefoot.engine.postponed import Postponed
from surefoot.serve.errors import ApiError, ClientGoneError, EngineDeadError, OverloadedError, StepFailedError

log = logging.getLogger("surefoot.serve")
MAX_FAILED_STEPS = 3  # in a row: the device is lost, not a request unlucky


class EngineLike(Protocol):
    """What the server needs of an engine."""

    @property
    def info(self) -> EngineInfo: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...
    def add_request(
        self, prompt_token_ids: list[int], params: SamplingParams, request_id: str | None = None
    ) -> str: ...
    def cancel(self, request_id: str) -> None: ...
    @property
    def postponed(self) -> Postponed: ...
    def has_unfinished(self) -> bool: ...
    def step(self) -> list[RequestOutput]: ...
    def stats(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Choice:
    """One sequence to generate. `leader` is the choice with the same prompt that must have run its prompt first."""

    prompt_token_ids: list[int]
    params: SamplingParams
    leader: int


@dataclass(eq=False)
class _Job:
    """The choices of one HTTP request. Event loop: `stream`. Inference thread: `live`, `cancelled`."""

    request_id: str
    choices: list[Choice]
    stream: Stream
    live: set[int] = field(default_factory=set)
    cancelled: bool = False

    def engine_id(self, index: int) -> str:
        return f"{self.request_id}-{index}"


class Stream:
    """Outputs of one HTTP request, read on the event loop. Always `close()` it; unfinished work is then cancelled."""

    def __init__(self, num_choices: int, on_close: Callable[[], None]):
        self._pending: list[tuple[int, RequestOutput]] = []
        self._unfinished = set(range(num_choices))
        self._error: Exception | None = None
        self._wake = asyncio.Event()
        self._on_close: Callable[[], None] | None = on_close

    @property
    def num_unfinished(self) -> int:
        return len(self._unfinished)

    async def batches(self) -> AsyncIterator[list[tuple[int, RequestOutput]]]:
        """(choice index, output) pairs, all that have come since the last call, until every choice is finished."""
        while self._pending or self._unfinished:
            if self._pending:
                batch, self._pending = self._pending, []
                yield batch
            elif self._error is not None:
                raise self._error
            else:
                self._wake.clear()
                await self._wake.wait()

    def push(self, index: int, output: RequestOutput) -> None:
        if index in self._unfinished:
            self._pending.append((index, output))
            if output.finished:
                self._unfinished.discard(index)
            self._wake.set()

    def fail(self, error: Exception) -> None:
        """End the stream early; the reader sees `error` after what has come already."""
        if self._error is None and self._unfinished:
            self._error = error
            self._wake.set()

    def close(self) -> None:
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()
            self.fail(ClientGoneError())


class EngineWorker:
    """Runs the engine in one thread. `load` makes the engine there too, so that thread-bound device state fits."""

    def __init__(self, load: Callable[[], EngineLike], max_inflight: int = 512):
        self.engine: EngineLike
        self.max_inflight = max_inflight
        self.error: BaseException | None = None
        self.stopping = False
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[Stream, None] = {}  # event loop only; a dict keeps the order
        self._routes: dict[str, tuple[_Job, int]] = {}  # inference thread only, as are the followers
        self._followers: dict[str, tuple[_Job, list[int]]] = {}
        self._failed_in_row = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loaded: Future[EngineLike] = Future()
        self._thread = threading.Thread(target=self._main, args=(load,), name="inference", daemon=True)

    # ---- called from outside the inference thread

    def start(self) -> EngineLike:
        """Load the engine and start; an error of the loading is raised here."""
        self._thread.start()
        self.engine = self._loaded.result()
        return self.engine

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """The event loop that reads the streams."""
        self._loop = loop

    @property
    def alive(self) -> bool:
        return self.error is None and self._thread.is_alive()

    @property
    def num_inflight(self) -> int:
        return sum(stream.num_unfinished for stream in self._streams)

    def submit(self, request_id: str, choices: list[Choice]) -> Stream:
        """Queue the choices of one HTTP request; what the engine refuses arrives as the stream's error."""
        if self.stopping:
            raise OverloadedError("the server is stopping: try another one", "server_stopping")
        if not self.alive:
            raise EngineDeadError(self._death_notice())
        if len(choices) > self.max_inflight:
            raise ApiError(f"{len(choices)} sequences in one request, at most {self.max_inflight} are allowed")
        if self.num_inflight + len(choices) > self.max_inflight:
            raise OverloadedError(f"overloaded: {self.num_inflight} sequences are in flight already, try again later")
        job: _Job

        def on_close() -> None:
            del self._streams[stream]
            if stream.num_unfinished:
                self._inbox.put(lambda: self._cancel(job))

        stream = Stream(len(choices), on_close)
        job = _Job(request_id, choices, stream)
        self._streams[stream] = None
        self._inbox.put(lambda: self._add(job))
        return stream

    def drain(self) -> None:
        """Take no new requests; running ones go on."""
        self.stopping = True

    def abort_all(self) -> None:
        """End every open stream with an error: the time for a graceful stop is over."""
        for stream in list(self._streams):
            stream.fail(OverloadedError("the server stopped before the answer was complete", "server_stopping"))

    def stop(self, timeout: float = 30.0) -> None:
        """End the inference thread after the step that it is in."""
        self.stopping = True
        self._inbox.put(None)
        self._thread.join(timeout)

    def _death_notice(self) -> str:
        return f"the inference engine stopped ({type(self.error).__name__}): restart the server"

    # ---- inference thread

    def _main(self, load: Callable[[], EngineLike]) -> None:
        try:
            engine = load()
        except BaseException as error:
            self._loaded.set_exception(error)
            return
        self.engine = engine
        self._loaded.set_result(engine)
        try:
            while self._drain_inbox(block=not (engine.has_unfinished() or engine.postponed)):
                if engine.has_unfinished():
                    self._step()
                else:
                    engine.postponed.advance()
        except BaseException as error:
            self.error = error
            log.error("the inference thread ended", exc_info=error)
            self._post(self._fail_all)

    def _step(self) -> None:
        """One step; if it fails its requests end with an error, and only a device that keeps failing ends the rest."""
        try:
            outputs = self.engine.step()
        except StepError as error:
            self._failed_in_row += 1
            if self._failed_in_row == MAX_FAILED_STEPS:
                raise
            log.error("a step failed, its requests end with an error", exc_info=error)
            for request_id in error.request_ids:
                job, index = self._routes.pop(request_id, (None, 0))
                if job is not None:
                    job.live.discard(index)
                    self._cancel(job)
                    self._post(job.stream.fail, StepFailedError(error.__cause__))
            return
        self._failed_in_row = 0
        self._route(outputs)

    def _drain_inbox(self, block: bool) -> bool:
        """Do what is asked for; an idle engine waits for it. False once the worker is to stop."""
        try:
            while True:
                action = self._inbox.get(block=block)
                if action is None:
                    return False
                action()
                block = False
        except queue.Empty:
            return True

    def _add(self, job: _Job) -> None:
        """Add the leaders; a follower waits until its leader's prompt is in the prefix cache."""
        for index, choice in enumerate(job.choices):
            if choice.leader == index:
                self._add_choice(job, index)
            elif not job.cancelled:
                leader = job.engine_id(choice.leader)
                self._followers.setdefault(leader, (job, []))[1].append(index)

    def _add_choice(self, job: _Job, index: int) -> None:
        if job.cancelled:
            return
        choice, engine_id = job.choices[index], job.engine_id(index)
        try:
            self.engine.add_request(choice.prompt_token_ids, choice.params, engine_id)
        except Exception as error:
            if not isinstance(error, SurefootError):
                log.error("add_request failed", exc_info=error)
            self._cancel(job)
            self._post(job.stream.fail, error)
            return
        job.live.add(index)
        self._routes[engine_id] = (job, index)

    def _cancel(self, job: _Job) -> None:
        job.cancelled = True
        for index in range(len(job.choices)):
            self._followers.pop(job.engine_id(index), None)
        for index in sorted(job.live):
            self._routes.pop(job.engine_id(index), None)
            self.engine.cancel(job.engine_id(index))
        job.live.clear()

    def _route(self, outputs: list[RequestOutput]) -> None:
        """Hand the outputs of one step over, with one wake-up of the event loop for all of them."""
        deliveries = []
        for output in outputs:
            job, index = self._routes.get(output.request_id, (None, 0))
            if job is None:
                continue
            deliveries.append((job.stream, index, output))
            if output.finished:
                del self._routes[output.request_id]
                job.live.discard(index)
        if deliveries:
            self._post(_deliver, deliveries)
        if self._followers:
            waiting = [self._followers.pop(o.request_id, None) for o in outputs]
            for job, index in itertools.chain.from_iterable(((w[0], i) for i in w[1]) for w in waiting if w):
                self._add_choice(job, index)

    def _post(self, callback: Callable[..., Any], *args: Any) -> None:
        if self._loop is not None and not self._loop.is_closed():
            try:
                self._loop.call_soon_threadsafe(callback, *args)
            except RuntimeError:
                log.debug("the event loop closed while an output was handed over")

    def _fail_all(self) -> None:
        for stream in list(self._streams):
            stream.fail(EngineDeadError(self._death_notice()))


def _deliver(deliveries: list[tuple[Stream, int, RequestOutput]]) -> None:
    for stream, index, output in deliveries:
        stream.push(index, output)
