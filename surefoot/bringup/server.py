"""`surefoot serve` as a child process for the load stage: it says which engine it serves, and dies with its parent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from surefoot.bringup.stages.base import Work
from surefoot.core import confighash
from surefoot.core.config import EngineConfig
from surefoot.core.errors import SurefootError


@dataclass(frozen=True)
class Served:
    """url: of the server.  info: what its engine says is in effect.  identity: the facts of its configuration hash."""

    url: str
    info: dict[str, Any]
    identity: dict[str, Any]


@contextlib.contextmanager
def served(work: Work) -> Iterator[Served]:
    """The settings' engine behind HTTP on a free port, for the length of the block."""
    command = [sys.executable, "-m", "surefoot.bringup.child", str(work.path), "server"]
    # NOTE: its stdin stays open as long as this process lives; when it closes, the server ends itself (see child.py).
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        said: dict[str, Any] = (
            json.loads(line) if line.startswith("{") else {"error": "the server ended before it answered"}
        )
        if "error" in said:
            raise SurefootError(str(said["error"]))
        yield Served(said["url"], said["info"], said["identity"])
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def serve(work: Work, say: Callable[[dict[str, Any]], None]) -> None:
    """Run the server in this process until it is told to stop; `say` takes the one object that the parent waits for."""
    from surefoot.backends.native import NativeBackend
    from surefoot.engine.engine import Engine
    from surefoot.serve.main import run_server
    from surefoot.serve.settings import ServeSettings

    s = work.settings
    config = s.engine(max_num_seqs=max(32, *s.concurrency))
    engines: list[Engine] = []

    def load() -> Engine:
        engines.append(Engine.load(s.model, config))
        return engines[0]

    def started(line: str) -> None:
        info = NativeBackend(s.model, config, engines[0]).info()
        url = line.split(" at ", 1)[1].split("/v1", 1)[0]
        say({"url": url, "info": info, "identity": identity(info, s.model, config)})

    run_server(load, ServeSettings(port=0, drain_timeout=1.0), started)


def identity(info: dict[str, Any], model: str, config: EngineConfig) -> dict[str, Any]:
    """The facts of the configuration hash, as a benchmark in process takes them."""
    from surefoot.weights.hub import resolve

    folder = resolve(model)
    return confighash.identity(
        info,
        model,
        ops=config.ops,
        random_weights=config.random_weights,
        config_sha256=hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
    )
