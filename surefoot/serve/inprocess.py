"""A server over an engine that this process holds already, on a free port of 127.0.0.1.

For proofs and benchmarks of the way through HTTP. The engine must be idle and belongs to the server's inference thread
until the block ends.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace

from surefoot.core.errors import DeviceError
from surefoot.core.sockets import bind
from surefoot.serve.main import DrainingServer, url
from surefoot.serve.settings import ServeSettings
from surefoot.serve.worker import EngineLike, EngineWorker

START_TIMEOUT = 60.0
STOP_TIMEOUT = 30.0


@contextlib.contextmanager
def serving(engine: EngineLike, settings: ServeSettings | None = None) -> Iterator[str]:
    """Within the block the engine is served at the URL that is given; then the server is gone and the engine idle."""
    settings = replace(settings or ServeSettings(drain_timeout=1.0), port=0)
    with contextlib.closing(bind(settings.host, settings.port)) as listener:
        worker = EngineWorker(lambda: engine, settings.max_inflight)
        worker.start()
        server = DrainingServer(worker, settings)
        started = threading.Event()
        server.on_started = started.set
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server", daemon=True)
        thread.start()
        try:
            if not started.wait(START_TIMEOUT):
                raise DeviceError(f"the server did not start within {START_TIMEOUT:.0f} seconds")
            yield url(listener)
        finally:
            server.should_exit = True
            thread.join(STOP_TIMEOUT)
            worker.stop(STOP_TIMEOUT)
