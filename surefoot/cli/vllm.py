"""`--backend vllm` at the terminal: progress while it starts; a failure shows the end of its log."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from surefoot.backends.managed import ServerError
from surefoot.backends.vllm import Served, open_vllm
from surefoot.core.config import EngineConfig
from surefoot.core.vllm import VllmSettings
from surefoot.serve.settings import ServeSettings


def serve_vllm(model: str, config: EngineConfig, vllm: VllmSettings, settings: ServeSettings) -> None:
    from surefoot.cli.progress import Progress
    from surefoot.serve.vllm import run_vllm

    with _log_shown(), contextlib.ExitStack() as bar:
        progress = bar.enter_context(Progress())

        def say(line: str) -> None:
            bar.close()  # there is nothing to wait for any more
            print(line, file=sys.stderr, flush=True)

        run_vllm(model, config, vllm, settings, say, progress)


@contextlib.contextmanager
def started(model: str, config: EngineConfig, vllm: VllmSettings) -> Iterator[Served]:
    """A vLLM on a free port of this machine, for a proof or a benchmark."""
    from surefoot.cli.progress import Progress

    with _log_shown(), contextlib.ExitStack() as stack:
        with Progress() as progress:
            served = stack.enter_context(open_vllm(model, config, vllm, progress=progress))
        yield served


@contextlib.contextmanager
def _log_shown() -> Iterator[None]:
    try:
        yield
    except ServerError as error:
        for line in error.tail:
            print(f"  | {line}", file=sys.stderr)
        raise
