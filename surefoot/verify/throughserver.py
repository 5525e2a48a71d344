"""The way through HTTP: the engine that is being proven, served on a free port and asked by several clients at once."""

from __future__ import annotations

from collections.abc import Mapping

from surefoot.backends.http import HttpBackend
from surefoot.core.outputs import Completion
from surefoot.core.sampling import SamplingParams
from surefoot.engine.engine import Engine
from surefoot.serve.inprocess import serving


def answers_of(
    engine: Engine, rounds: Mapping[int, list[list[int]]], params: SamplingParams
) -> dict[int, list[Completion]]:
    """rounds: {requests in flight at a time: prompts}. Answers come with token ids and log-probabilities."""
    with serving(engine) as url:
        backend = HttpBackend(url, vocab_size=engine.vocab_size)
        try:
            return {level: backend.generate(prompts, params, concurrency=level) for level, prompts in rounds.items()}
        finally:
            backend.close()
