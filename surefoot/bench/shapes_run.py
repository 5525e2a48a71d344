"""Dynamic, bucketed and fixed shapes beside each other on a real engine: latency, memory, and the same tokens.

Each mode gets an engine of its own with its buckets. Every planned shape runs once to warm up (what that and the
captures take is the start-up cost); then, for each prompt length, a few prompts of that length prefill and decode
together. After the warm-up nothing may be new: a step outside the buckets is what a device that compiles per shape
would compile for, a capture or a torch.compile is one. Either fails the mode, by name.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from surefoot.bench.events import EventWatch
from surefoot.bench.stats import quantile
from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError
from surefoot.core.sampling import SamplingParams
from surefoot.device import Device, get_device
from surefoot.engine.engine import Engine
from surefoot.engine.load import load_engine

Progress = Callable[[str, float | None], None]
MODES = ("dynamic", "bucketed", "fixed")


@dataclass(frozen=True)
class RunSettings:
    """lengths: prompt tokens.  batch: prompts at once.  output_len: tokens each.  repeats: measured passes a length."""

    lengths: tuple[int, ...] = (16, 64, 256, 1024, 4096)
    batch: int = 3
    output_len: int = 16
    repeats: int = 3
    seed: int = 0


def compare(
    model: str,
    config: EngineConfig,
    buckets: Mapping[str, tuple[tuple[int, ...] | None, tuple[int, ...] | None]],
    settings: RunSettings,
    progress: Progress | None = None,
    device: Callable[[], Device] | None = None,
) -> dict[str, Any]:
    """`buckets`: (batch buckets, token buckets) of each mode. `ok` in the result: same tokens, and nothing new ran."""
    modes: dict[str, dict[str, Any]] = {}
    for i, (mode, (batches, tokens)) in enumerate(buckets.items()):

        def tell(what: str, done: float | None, i: int = i, mode: str = mode) -> None:
            if progress is not None:
                progress(f"{mode}: {what}", (i + (done or 0.0)) / len(buckets))

        # Hits would let a later pass skip its prefill; the modes must do the same work.
        mine = replace(config, batch_buckets=batches, token_buckets=tokens, enable_prefix_caching=False)
        on = device() if device else get_device(config.device)
        on.reset_peak_memory()
        engine = load_engine(model, mine, tell, on)
        modes[mode] = _Mode(engine, settings, tell).run() | {"peak_bytes": on.peak_memory()}
        del engine
        gc.collect()
    problems = [f"{mode}: {problem}" for mode, result in modes.items() for problem in result.pop("problems")]
    problems += _differences(modes)
    return {"modes": modes, "problems": problems, "ok": not problems, "lengths": list(settings.lengths)}


class _Mode:
    """One engine with one way to pad."""

    def __init__(self, engine: Engine, settings: RunSettings, tell: Progress):
        self.engine, self.settings, self.tell = engine, settings, tell
        self.padding = engine.runner.padding
        self.draw = random.Random(settings.seed)
        most = max(settings.lengths) + settings.output_len
        if most > engine.max_model_len:
            raise InputError(
                f"lengths up to {most} tokens with the output exceed max_model_len {engine.max_model_len}: "
                "shorten --lengths or raise --max-model-len"
            )
        usable = engine.scheduler.block_pool.num_usable * engine.scheduler.block_pool.block_size
        if settings.batch > engine.config.max_num_seqs or settings.batch * most > usable:
            raise InputError(f"{settings.batch} x {most} tokens do not fit into the cache: lower --batch or --lengths")

    def run(self) -> dict[str, Any]:
        engine, graphs = self.engine, self.engine.runner.graphs
        began, watch = time.perf_counter(), EventWatch(engine)
        warm = self._warm_up()
        start_up = time.perf_counter() - began + (graphs.seconds if graphs else 0.0)
        watch.take("warmup")
        assert self.padding is not None
        warmed = set(self.padding.seen)
        points = []
        for i, length in enumerate(self.settings.lengths):
            self.tell(f"{length} tokens", i / len(self.settings.lengths))
            points.append(self._point(length))
        new = sorted(set(self.padding.seen) - warmed)
        events = watch.take("measured")
        planned = bool(engine.info.batch_buckets and engine.info.token_buckets)
        problems = [f"recompile after warm-up: {self._named(kind, n)}" for kind, n in new] if planned else []
        problems += [f"{count} x {name} after warm-up" for name, count in events.items() if count]
        return {
            "graph": engine.info.graph,
            "batch_buckets": list(engine.info.batch_buckets),
            "token_buckets": list(engine.info.token_buckets),
            "captures": graphs.captures if graphs else 0,
            "warmup_shapes": warm,
            "start_up_s": start_up,
            "new_shapes": [list(shape) for shape in new],
            "memory_bytes": self._memory(),
            "points": points,
            "problems": problems,
        }

    def _memory(self) -> int:
        """Bytes of the pages and state slots that only padded rows use."""
        info, pool, states = self.engine.info, self.engine.scheduler.block_pool, self.engine.scheduler.state_pool
        held = info.kv_cache_bytes // info.num_blocks * pool.num_dummies
        if states is not None:
            held += info.state_bytes // states.num_rows * states.num_dummies
        return held

    def _named(self, kind: str, n: int) -> str:
        buckets = self.engine.info.batch_buckets if kind == "decode" else self.engine.info.token_buckets
        what = f"decode of {n} requests" if kind == "decode" else f"prefill of {n} tokens"
        return f"{what}, the buckets end at {buckets[-1]}" if n > buckets[-1] else f"{what} did not run before"

    def _warm_up(self) -> int:
        """Run every planned shape once; a dynamic engine runs one request. Returns how many shapes ran."""
        engine, limit = self.engine, self.engine.max_model_len - 2
        tokens, batches = engine.info.token_buckets, engine.info.batch_buckets
        for total in tokens:
            self.tell("warm-up", 0.0)
            if total <= engine.config.max_num_batched_tokens:
                parts = [limit] * (total // limit) + ([total % limit] if total % limit else [])
                self._generate(parts[: engine.config.max_num_seqs], 1)
        for batch in batches:
            if batch <= engine.config.max_num_seqs:
                self._generate([4] * batch, 3)
        if not tokens and not batches:
            self._generate([4], 3)
        assert self.padding is not None
        return len(self.padding.seen)

    def _generate(self, lengths: list[int], count: int) -> dict[str, Any]:
        """Prompts of these lengths together: seconds to the last first token, seconds of each decode step, tokens."""
        engine, draw = self.engine, self.draw
        params = SamplingParams(max_tokens=count, ignore_eos=True)
        ids = [engine.add_request([draw.randrange(engine.vocab_size) for _ in range(n)], params) for n in lengths]
        tokens: dict[str, list[int]] = {i: [] for i in ids}
        prefill, steps = 0.0, []
        while engine.has_unfinished():
            began = time.perf_counter()
            whole = all(tokens.values())
            for output in engine.step():
                tokens[output.request_id] += output.token_ids
            took = time.perf_counter() - began  # a step ends with its copy to the host: the device is done
            if whole:
                steps.append(took)
            else:
                prefill += took
        return {"prefill_s": prefill, "decode_s": steps, "tokens": [tokens[i] for i in ids]}

    def _point(self, length: int) -> dict[str, Any]:
        settings = self.settings
        passes = []
        for repeat in range(settings.repeats):
            self.draw = random.Random(f"{settings.seed}:{length}:{repeat}")
            passes.append(self._generate([length] * settings.batch, settings.output_len))
        steps = [s for p in passes for s in p["decode_s"]]
        return {
            "length": length,
            "prefill_s": quantile([p["prefill_s"] for p in passes], 0.5),
            "decode_step_s": quantile(steps, 0.5) if steps else None,
            "tokens": [p["tokens"] for p in passes],
        }


def _differences(modes: Mapping[str, dict[str, Any]]) -> list[str]:
    """Where a mode's tokens are not those of the first one; the tokens are taken out of the record."""
    (first, base), *others = modes.items()
    found = []
    for mode, result in others:
        for a, b in zip(base["points"], result["points"]):
            if a["tokens"] != b["tokens"]:
                found.append(f"{mode}: other tokens than {first} at prompts of {a['length']} tokens")
    for result in modes.values():
        for point in result["points"]:
            del point["tokens"]
    return found
