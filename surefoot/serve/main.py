"""`surefoot serve`: bind the port, load the engine, serve until told to stop.

SIGTERM or Ctrl-C: no new connections; running requests get `drain_timeout` seconds, then end in an error; exit 0.
A second Ctrl-C stops at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import uvicorn

from surefoot.core.sockets import bind
from surefoot.serve.app import create_app
from surefoot.serve.sampling import sampling_defaults
from surefoot.serve.settings import ServeSettings
from surefoot.serve.worker import EngineLike, EngineWorker

BACKSTOP = 5.0  # seconds between the end of the drain and the cancelling of whatever still runs


def run_server(
    load_engine: Callable[[], EngineLike],
    settings: ServeSettings,
    say: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; returns for exit code 0.

    `load_engine` runs in the inference thread, after the port is bound, and may raise a SurefootError.
    `say` prints one line (default: stderr).
    """
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    with contextlib.closing(bind(settings.host, settings.port)) as listener:
        worker = EngineWorker(load_engine, settings.max_inflight)
        engine = worker.start()
        try:
            server = DrainingServer(worker, settings)
            server.on_started = lambda: say(start_line(engine, settings, listener))
            with _signals_end_quietly():
                server.run(sockets=[listener])
        finally:
            worker.stop()


class DrainingServer(uvicorn.Server):
    """uvicorn, plus: at the end of the drain, running requests get an error in OpenAI's shape instead of silence."""

    def __init__(self, worker: EngineWorker, settings: ServeSettings):
        app = create_app(worker, settings)
        config = uvicorn.Config(
            app,
            log_level="info" if settings.access_log else "warning",
            access_log=settings.access_log,
            lifespan="on",
            ws="none",
            timeout_graceful_shutdown=int(settings.drain_timeout + BACKSTOP),
        )
        super().__init__(config)
        self.worker = worker
        self.drain_timeout = settings.drain_timeout
        self.on_started: Callable[[], None] = lambda: None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.worker.drain()
        deadline = asyncio.get_running_loop().call_later(self.drain_timeout, self.worker.abort_all)
        try:
            await super().shutdown(sockets)
        finally:
            deadline.cancel()


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, host)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def start_line(engine: EngineLike, settings: ServeSettings, listener: socket.socket) -> str:
    """One line: where, what, and the settings in effect."""
    info = engine.info
    name = (settings.served_model_names or (info.model,))[0]
    defaults = sampling_defaults(settings.generation_defaults, engine.tokenizer)
    facts = {
        "device": info.device,
        "dtype": info.dtype,
        **({"quant": info.quant["scheme"]} if info.quant else {}),
        "max_model_len": engine.max_model_len,
        "max_num_seqs": info.max_num_seqs,
        "prefix_caching": info.prefix_caching,
        "api_key": "required" if settings.api_keys else "none",
        **defaults,
    }
    return f"serving {name} at {url(listener)}/v1 (" + ", ".join(f"{k}={v}" for k, v in facts.items()) + ")"


@contextlib.contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """uvicorn raises the signal that ended it again, for its parent's sake; a graceful stop is to exit 0 instead."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
