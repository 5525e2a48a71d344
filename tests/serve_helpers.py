"""A real uvicorn server on a free port of 127.0.0.1, in a thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from surefoot.core.sockets import bind
from surefoot.serve.main import DrainingServer, url
from surefoot.serve.settings import ServeSettings
from surefoot.serve.worker import EngineWorker


@dataclass
class Served:
    engine: Any
    worker: EngineWorker
    server: DrainingServer
    thread: threading.Thread
    base_url: str

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def serving(engine: Any, settings: ServeSettings | None = None) -> Iterator[Served]:
    settings = replace(settings or ServeSettings(), port=0)
    listener = bind(settings.host, settings.port)
    worker = EngineWorker(engine if callable(engine) else lambda: engine, settings.max_inflight)
    engine = worker.start()
    server = DrainingServer(worker, settings)
    started = threading.Event()
    server.on_started = started.set
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    base_url = url(listener)
    thread.start()
    try:
        assert started.wait(20)
        yield Served(engine, worker, server, thread, base_url)
    finally:
        server.should_exit = True
        thread.join(20)
        worker.stop(20)


def until(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Wait for something that happens in another thread."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.005)
