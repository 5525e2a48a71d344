"""Ways to make an engine take another path to the same result: other chunks, scarce pages, neighbours, a cached prefix.

They act on the very engine that is being proven, through its own scheduler, and leave it as they found it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from surefoot.core.outputs import Completion
from surefoot.core.sampling import SamplingParams
from surefoot.engine.engine import Engine


@contextlib.contextmanager
def chunks(engine: Engine, size: int) -> Iterator[None]:
    """Prefills are cut into pieces of at most `size` tokens; size 1 takes the decode kernels all the way."""
    before = engine.scheduler.prefill_chunk_size
    engine.scheduler.prefill_chunk_size = size
    try:
        yield
    finally:
        engine.scheduler.prefill_chunk_size = before


@contextlib.contextmanager
def scarce(engine: Engine, pages: int) -> Iterator[None]:
    """Only so many free KV pages; what the prefix cache held in the others is forgotten."""
    pool = engine.scheduler.block_pool
    hostages = pool.allocate(max(0, pool.num_free - pages)) or []
    try:
        yield
    finally:
        pool.free(hostages)


@contextlib.contextmanager
def uncached(engine: Engine) -> Iterator[None]:
    """No request looks anything up in the prefix cache, or leaves anything there."""
    before = engine.scheduler.prefix_caching
    engine.scheduler.prefix_caching = False
    try:
        yield
    finally:
        engine.scheduler.prefix_caching = before


@contextlib.contextmanager
def beside(engine: Engine, prompts: Sequence[Sequence[int]], steps: int = 3) -> Iterator[None]:
    """Requests that are decoding (after `steps` steps) while the block runs; cancelled at its end."""
    params = SamplingParams(max_tokens=engine.max_model_len, ignore_eos=True)
    ids = [engine.add_request(p, params) for p in prompts]
    try:
        for _ in range(steps):
            engine.step()
        yield
    finally:
        for request_id in ids:
            engine.cancel(request_id)
        drain(engine)


def drain(engine: Engine) -> None:
    """End whatever is unfinished, so that a path that broke does not disturb the next one."""
    for request_id in list(engine._live):
        engine.cancel(request_id)
    while engine.has_unfinished():
        engine.step()


def until_missed(engine: Engine, prompts: Iterator[list[int]], params: SamplingParams, tries: int = 8) -> Completion:
    """The answer to the first prompt of which nothing is in the prefix cache (the last one tried, if all are)."""
    for _ in range(tries):
        (done,) = engine.generate([next(prompts)], params)
        if not done.num_cached_tokens:
            break
    return done
