"""Activations of one sequence on each path of the engine: whole, token by token, in pieces, in a used slot, among
neighbours, after a preemption, behind a prefix hit.

Whatever the path, the rows must be those of a plain whole forward; so one reference serves all of them, and the module
where they part is found by the same comparison. Rows are stored by position: a row computed twice keeps the last value.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from surefoot.backends.base import Backend, Capture
from surefoot.backends.native import NativeBackend
from surefoot.core.batch import KVPages
from surefoot.core.errors import InputError
from surefoot.core.sampling import SamplingParams
from surefoot.engine.engine import Engine
from surefoot.engine.scheduler import Schedule
from surefoot.verify.enginepaths import chunks

# All but the head: its input is the last norm's output, and its output are the logits.
MODULES = r"(?!lm_head).*"
PIECE = 7
RESUME_PIECE = 5


@dataclass
class PathCapture:
    """What one path gave. chunks: [start, end) pieces in the order computed.  previous: tokens that held the same
    state slot before.  token_ids: what was run.  capture.logits is empty where a path gives none."""

    path: str
    capture: Capture
    chunks: list[tuple[int, int]] = field(default_factory=list)
    previous: list[int] = field(default_factory=list)
    block_size: int = 0
    token_ids: list[int] = field(default_factory=list)


def plain(path: str) -> str:
    """Paths as in the text-only container: multimodal ones hold the same modules under `language_model`."""
    return path.replace("model.language_model.", "model.", 1)


def module_at(model: nn.Module, path: str) -> nn.Module | None:
    """The module of a plain path, or None."""
    return next((module for name, module in model.named_modules() if plain(name) == path), None)


def neighbours(token_ids: Sequence[int], count: int = 3) -> list[list[int]]:
    """Other sequences of other lengths over the same tokens."""
    ids = list(token_ids)
    return [(ids[k:] + ids[:k])[::-1][: max(1, len(ids) - 9 * k)] for k in range(1, count + 1)]


class _Rows:
    """Hooks that keep the rows of one request, by position, whoever else is in the batch."""

    def __init__(self, engine: Engine, num_tokens: int, pattern: str):
        self.engine, self.num_tokens, self.wanted = engine, num_tokens, re.compile(pattern)
        self.capture = Capture(torch.empty(0))
        self.chunks: list[tuple[int, int]] = []
        self.request_id: str | None = None
        self._rows: tuple[int, int, int] | None = None  # first packed row, first position, count
        self._total = 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        runner, original = self.engine.runner, self.engine.runner.run
        handles = [
            module.register_forward_hook(self._hook(plain(name)), with_kwargs=True)
            for name, module in self.engine.model.named_modules()
            if name and self.wanted.fullmatch(name)
        ]

        def run(step: Schedule):
            self._find(step)
            return original(step)

        runner.run = run  # type: ignore[method-assign]
        try:
            with runner.eagerly():  # the replay of a graph fires no hook
                yield
        finally:
            runner.run = original  # type: ignore[method-assign]
            for handle in handles:
                handle.remove()

    def _find(self, step: Schedule) -> None:
        self._rows, row = None, 0
        for item in step.items:
            if item.request.request_id == self.request_id:
                end = min(item.end, self.num_tokens)
                if end > item.start:
                    self._rows = (row, item.start, end - item.start)
                    self.chunks.append((item.start, end))
            row += item.num_new_tokens
        self._total = row

    def _hook(self, name: str):
        def record(module, args: tuple, kwargs: dict, output: Any) -> None:
            self._store(self.capture.outputs, name, output)
            self._store(self.capture.inputs, name, args[0] if args else None)

        return record

    def _store(self, store: dict[str, torch.Tensor], name: str, value: Any) -> None:
        if isinstance(value, (tuple, list)):
            value = value[0]
        if self._rows is None or not isinstance(value, torch.Tensor) or len(value) != self._total:
            return
        first, position, count = self._rows
        part = value.detach()[first : first + count].cpu()
        if name not in store:
            store[name] = torch.zeros(self.num_tokens, *part.shape[1:], dtype=part.dtype)
        store[name][position : position + count] = part


def _score(engine: Engine, rows: _Rows, others: Sequence[Sequence[int]], ids: Sequence[int]) -> None:
    """Score `ids` together with the others; our rows and logits go to `rows`."""
    add = engine.add_request

    def remember(prompt, params, request_id=None, score=False):
        name = add(prompt, params, request_id, score)
        rows.request_id = name  # the last one added is ours
        return name

    engine.add_request = remember  # type: ignore[method-assign]
    try:
        with rows.watching():
            rows.capture.logits = engine.score([*others, list(ids)])[-1]
    finally:
        engine.add_request = add  # type: ignore[method-assign]


def whole(engine: Engine, ids: Sequence[int], pattern: str = MODULES) -> PathCapture:
    rows = _Rows(engine, len(ids), pattern)
    _score(engine, rows, [], ids)
    return PathCapture("whole", rows.capture, rows.chunks)


def decode(engine: Engine, ids: Sequence[int], pattern: str = MODULES) -> PathCapture:
    rows = _Rows(engine, len(ids), pattern)
    with chunks(engine, 1):
        _score(engine, rows, [], ids)
    return PathCapture("decode", rows.capture, rows.chunks)


def chunked(engine: Engine, ids: Sequence[int], pattern: str = MODULES) -> PathCapture:
    rows = _Rows(engine, len(ids), pattern)
    with chunks(engine, PIECE):
        _score(engine, rows, [], ids)
    return PathCapture("chunked", rows.capture, rows.chunks)


def reused(engine: Engine, ids: Sequence[int], pattern: str = MODULES) -> PathCapture:
    """Right after another sequence has left the slot and the pages."""
    (other,) = neighbours(ids, 1)
    engine.score([other])
    found = whole(engine, ids, pattern)
    return PathCapture("reused", found.capture, found.chunks, other)


def batched(engine: Engine, ids: Sequence[int], pattern: str = MODULES) -> PathCapture:
    """The last of a ragged batch, in pieces, so that pieces of several requests share every step."""
    rows = _Rows(engine, len(ids), pattern)
    with chunks(engine, max(2, len(ids) // 3)):
        _score(engine, rows, neighbours(ids), ids)
    return PathCapture("batched", rows.capture, rows.chunks)


def preempted(engine: Engine, ids: Sequence[int], pattern: str = MODULES) -> PathCapture | None:
    """Losing its pages in the middle to an earlier request that grows, then computed again from the start."""
    pool = engine.scheduler.block_pool
    size = pool.block_size
    if not engine.model.state_specs() or size < 2 or engine.has_unfinished():
        return None
    rival = (list(ids)[::-1] * (size // len(ids) + 1))[: size - 1]
    needed = pool.pages(len(ids)) + 1
    hostages = pool.allocate(pool.num_free - needed) if pool.num_free > needed else []
    rows = _Rows(engine, len(ids), pattern)
    try:
        with chunks(engine, RESUME_PIECE), rows.watching():
            before = engine.scheduler.num_preemptions
            # It crosses its first page while ours is still being prefilled.
            first = engine.add_request(rival, SamplingParams(max_tokens=4, ignore_eos=True, prompt_logprobs=0))
            rows.request_id = engine.add_request(list(ids), SamplingParams(max_tokens=1), score=True)
            while rows.request_id in engine._live and engine.scheduler.has_unfinished():
                engine.step()
            # NOTE: of rows that were computed twice, logits are the first ones and hidden states the last.
            engine._live.pop(rows.request_id, None)
            engine.cancel(first)
            happened = engine.scheduler.num_preemptions > before
    finally:
        pool.free(hostages or [])
    return PathCapture("preempted", rows.capture, rows.chunks) if happened else None


def prefix_hit(engine: Engine, ids: Sequence[int], pattern: str = MODULES) -> PathCapture | None:
    """The rows behind a hit, and before it those of the run that filled the cache. None if nothing is ever hit.

    The tokens are turned round until nothing is cached for them yet, so that the first run fills the cache itself.
    """
    turned = list(ids)
    for _ in range(min(8, len(ids))):
        turned = [*turned[1:], turned[0]]
        rows = _run_on(engine, _Rows(engine, len(ids), pattern), turned)
        if rows.chunks and rows.chunks[0][0] == 0:
            break
    else:  # everything is cached, or said to be: the rows before the hit come from a run that looks nothing up
        rows.capture = whole(engine, turned, pattern).capture
        rows.capture.logits = torch.empty(0)
    rows.chunks.clear()
    _run_on(engine, rows, turned)
    if not rows.chunks or rows.chunks[0][0] == 0:
        return None
    return PathCapture("prefix_hit", rows.capture, rows.chunks, token_ids=turned)


def _run_on(engine: Engine, rows: _Rows, ids: Sequence[int]) -> _Rows:
    with rows.watching():
        rows.request_id = engine.add_request(list(ids), SamplingParams(max_tokens=1, ignore_eos=True))
        while engine.has_unfinished():
            engine.step()
    return rows


@torch.inference_mode()
def poison(engine: Engine, num_tokens: int) -> None:
    """Fill the pages that come next with noise, so that what is read without having been written shows.

    NOTE: without this, a page that is not written may still hold the right keys from the same tokens a run before.
    Finite noise: a kernel may read what it then masks.
    """
    pool = engine.scheduler.block_pool
    blocks = pool.allocate(min(pool.num_free, 4 * pool.pages(num_tokens) + 8)) or []
    index = torch.tensor(blocks, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    for layer in engine.runner.layers:
        for pages in (layer.k, layer.v) if isinstance(layer, KVPages) else ():
            noise = torch.randn(len(blocks), *pages.shape[1:], generator=generator)
            pages.index_put_((index.to(pages.device),), noise.to(pages.dtype).to(pages.device))
    pool.free(blocks)


PATHS: dict[str, Callable[..., PathCapture | None]] = {
    "whole": whole,
    "decode": decode,
    "chunked": chunked,
    "reused": reused,
    "batched": batched,
    "preempted": preempted,
    "prefix_hit": prefix_hit,
}


def captures(target: Backend, ids: Sequence[int], only: Sequence[str] | None = None) -> Iterator[PathCapture]:
    """The target's activations, path after path; a backend without an engine of ours has the first only."""
    if not isinstance(target, NativeBackend):
        given = target.capture(ids, MODULES, with_inputs=True)
        for store in (given.inputs, given.outputs):
            store.update({plain(name): value for name, value in store.items()})
        yield PathCapture("whole", given, token_ids=list(ids))
        return
    if target.engine.has_unfinished():
        raise InputError("the paths of an engine can be looked at only while it is idle: finish its requests first")
    for name, take in PATHS.items():
        if only is None or name in only:
            poison(target.engine, len(ids))
            found = take(target.engine, ids)
            if found is not None:
                found.token_ids = found.token_ids or list(ids)
                found.block_size = target.engine.scheduler.block_pool.block_size
                yield found
