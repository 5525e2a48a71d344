"""Benchmark of a model in this process: load time, prefill and decode measured each by itself, memory, capacity.

Per batch and prompt length: prefill passes (B prompts of P tokens, one token each: nothing decodes). Per output length
on top: generation passes, whose decode steps with the whole batch running are the decode samples, and whose length
is the generation time. The output lengths take turns, so that a slow minute of the machine is in all of them and not
between them. Cold, warm-up and measured passes are kept apart.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from surefoot.bench.events import Events, EventWatch, warning
from surefoot.bench.result import Result
from surefoot.bench.sizes import MemoryWatch, Peaks, Work, capacity, peaks, share, work_of
from surefoot.bench.stats import pooled, summary
from surefoot.bench.steps import Pass, Stepper
from surefoot.core.errors import InputError
from surefoot.device.telemetry import Sampler

Progress = Callable[[str, "float | None"], None]
TELEMETRY_EVERY = 0.5
UNEVEN = 1.25  # mean over median of the decode steps, above which something disturbed them
FIRST_WARMUP = 1.0  # seconds of passes before the first shape: a CPU's clock and a process's memory settle as slowly


@dataclass(frozen=True)
class EngineSettings:
    """batch, prompt_lens, output_lens: the cartesian sweep.  repeats: measured passes (6 give the median an interval).
    warmup: passes before them, of each shape; with any, the first shape also runs for a second before all others.
    """

    batch: tuple[int, ...] = (1, 2, 4, 8)
    prompt_lens: tuple[int, ...] = (128,)
    output_lens: tuple[int, ...] = (32,)
    repeats: int = 6
    warmup: int = 1
    seed: int = 0


@dataclass
class _Shape:
    """The passes of one shape. spans: when the measured ones ran (monotonic).  events: inside the measured ones."""

    what: str
    batch: int
    length: int
    count: int
    index: int
    draw: random.Random
    warm: list[Pass] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)
    spans: list[tuple[float, float]] = field(default_factory=list)
    events: Events = field(default_factory=Counter)
    power: dict[str, Any] | None = None
    peak: int | None = None

    def warnings(self) -> list[str]:
        found = warning(self.events)
        if n := sum(p.preemptions for p in self.passes):
            found.append(f"{n} preemptions: tokens were computed twice")
        if n := sum(p.cached_tokens for p in self.passes):
            found.append(f"{n} prompt tokens came from the prefix cache: the prefill is too fast by that")
        return found


class EngineBench:
    """Runs the sweep on a stepper. `info`: what is in effect, from the backend."""

    def __init__(
        self,
        stepper: Stepper,
        model: Any,
        info: dict[str, Any],
        settings: EngineSettings,
        progress: Progress | None,
        calibrated: Peaks | None = None,
    ):
        self.stepper, self.info, self.settings = stepper, info, settings
        self.progress = progress or (lambda what, fraction: None)
        self.work: Work = work_of(model, info)
        self.peaks = peaks(stepper.device, info, calibrated)
        self.memory = MemoryWatch(stepper.device)
        self.events = EventWatch(getattr(stepper, "engine", None))
        self._index = itertools.count()
        self._share = 0.0  # of the sweep that is done
        check_sweep(settings, info)

    def facts(self) -> dict[str, Any]:
        """What belongs to the run as a whole."""
        lengths = [p + n for p in self.settings.prompt_lens for n in self.settings.output_lens]
        return {
            "peaks": self.peaks,
            "weight_bytes": self.info.get("weight_bytes") or self.work.weight_bytes,
            "kv_cache_bytes": self.info.get("kv_cache_bytes"),
            "state_bytes": self.info.get("state_bytes"),
            "capacity": capacity(self.info, lengths),
            "device_after_load_bytes": self.memory.look(),
        }

    def run(self, result: Result) -> None:
        """Every point; those of a batch and prompt length are on the disk when they are done."""
        settings = self.settings
        outer = list(itertools.product(settings.batch, settings.prompt_lens))
        result.data["first_warmup"] = self._settle(result, *outer[0], settings.output_lens[0])
        for i, (batch, length) in enumerate(outer):
            name = f"batch {batch}, prompt {length}"
            self._share = i / len(outer)
            (shape,) = self._passes(result, "prefill", batch, length, (1,))
            prefill = self._prefill(shape) | {"peak_memory_bytes": shape.peak}
            self._share = (i + 0.5) / len(outer)
            for shape in self._passes(result, "generate", batch, length, settings.output_lens):
                point: dict[str, Any] = {"name": f"{name}, output {shape.count}"}
                point |= {"batch": batch, "prompt_len": length, "output_len": shape.count}
                result.add_point(point | {"peak_memory_bytes": shape.peak, "prefill": prefill} | self._generate(shape))
            result.data["memory"] = result.data.get("memory", {}) | self.memory.result()
            result.data["events"] = self.events.result()

    # ---- passes

    def _shape(self, what: str, batch: int, length: int, count: int) -> _Shape:
        # NOTE: new random prompts for every pass, or the prefix cache would do the prefill.
        draw = random.Random(f"{self.settings.seed}/{what}/{batch}/{length}/{count}")
        return _Shape(what, batch, length, count, next(self._index), draw)

    def _settle(self, result: Result, batch: int, length: int, count: int) -> dict[str, Any]:
        """Passes of the first shape for a second, at least one: those of a fresh process are slower than later ones."""
        self.progress("warm-up", None)
        shape, began = self._shape("settle", batch, length, count), time.monotonic()
        while self.settings.warmup and (not shape.warm or time.monotonic() - began < FIRST_WARMUP):
            self._one(result, shape, "warmup")
        walls = [p.wall for p in shape.warm]
        return {"passes": len(walls), "seconds": sum(walls), "first_s": walls[0] if walls else None}

    def _passes(self, result: Result, what: str, batch: int, length: int, counts: tuple[int, ...]) -> list[_Shape]:
        """Warm-up passes of each output length, then measured ones in turns, and what the device drew meanwhile."""
        shapes = [self._shape(what, batch, length, count) for count in counts]
        for shape, _ in itertools.product(shapes, range(self.settings.warmup)):
            self._one(result, shape, "warmup")
        self.events.take("warmup")
        with Sampler(str(self.stepper.device), TELEMETRY_EVERY) as sampler:
            for i, shape in itertools.product(range(self.settings.repeats), shapes):
                turn = f"output {shape.count}, pass {i + 1}" if what == "generate" else f"pass {i + 1}"
                self.progress(f"batch {batch}, prompt {length}, {turn}", self._share)
                self._one(result, shape, "measured")
                shape.events += self.events.take("measured")
        for shape in shapes:
            shape.power = _power(sampler, shape.spans)
        return shapes

    def _one(self, result: Result, shape: _Shape, phase: str) -> None:
        prompts = [shape.draw.choices(range(self.stepper.vocab_size), k=shape.length) for _ in range(shape.batch)]
        self.memory.begin()
        began = time.monotonic()
        done = self.stepper.run(prompts, shape.count)
        if phase == "measured":
            shape.spans.append((began, time.monotonic()))
        self.memory.look()
        shape.peak = max(shape.peak or 0, self.memory.end() or 0) or None
        (shape.warm if phase == "warmup" else shape.passes).append(done)
        head = {"shape": shape.index, "what": shape.what, "phase": phase, "batch": shape.batch}
        head |= {"prompt_len": shape.length, "wall_s": done.wall, "ttft_s": done.ttft}
        steps = [[s.kind, s.begin, s.seconds, s.tokens] for s in done.steps]
        result.write({"record": "pass"} | head | {"steps": steps})

    def _prefill(self, shape: _Shape) -> dict[str, Any]:
        times = summary([p.seconds("prefill") for p in shape.passes])
        flops = self.work.prefill_flops(shape.batch, shape.length)
        return {
            "seconds": times,
            "tokens_per_s": shape.batch * shape.length / times["median"],
            "steps_per_pass": len(shape.passes[0].steps),
            "warmup_s": [p.wall for p in shape.warm],
            "mfu": share(flops, times["median"], self.peaks["flops_per_s"]),
            "power": shape.power,
            "warnings": shape.warnings(),
        }

    def _generate(self, shape: _Shape) -> dict[str, Any]:
        batch, count, passes = shape.batch, shape.count, shape.passes
        walls = summary([p.wall for p in passes])
        point: dict[str, Any] = {
            "generation_s": walls,
            "output_tokens_per_s": batch * count / walls["median"],
            "requests_per_s": batch / walls["median"],
            "ttft_s": pooled([p.ttft for p in passes]),
            "warmup_s": [p.wall for p in shape.warm],
            "power": shape.power,
            "joules_per_output_token": _per_token(shape.power, batch * count * len(passes)),
            "mixed_steps": sum(len(p.of("mixed")) for p in passes),
            "warnings": shape.warnings(),
        }
        decode = self._decode(passes, batch, shape.length, count)
        if decode and decode["step_s"]["mean"] > UNEVEN * decode["step_s"]["median"]:
            ratio = decode["step_s"]["mean"] / decode["step_s"]["median"]
            point["warnings"].append(f"uneven decode steps: their mean is {ratio:.1f} times their median")
        return point | {"decode": decode}

    def _decode(self, passes: list[Pass], batch: int, length: int, count: int) -> dict[str, Any] | None:
        """Steps in which the whole batch decodes; None if there is none (one output token)."""
        full = [[s.seconds for s in p.of("decode") if s.tokens == batch] for p in passes]
        if not any(full):
            return None
        times = pooled(full)
        median = times["median"]
        rates = [batch * len(group) / sum(group) for group in full if group]
        read = self.work.decode_bytes(batch, length + count / 2)
        return {
            "step_s": times,
            "tokens_per_s": batch / median,
            "llama_bench_tg": summary(rates),
            "mfu": share(self.work.decode_flops(batch), median, self.peaks["flops_per_s"]),
            "mbu": share(read, median, self.peaks["bytes_per_s"]),
            "bytes_per_s": None if read is None else read / median,
        }


def check_sweep(settings: EngineSettings, info: dict[str, Any]) -> None:
    """Refuse a sweep that can never run, before anything is measured."""
    for name in ("batch", "prompt_lens", "output_lens"):
        if not getattr(settings, name) or min(getattr(settings, name)) < 1:
            raise InputError(f"impossible sweep: {name.replace('_', ' ')} must be positive numbers")
    batch, prompt, output = max(settings.batch), max(settings.prompt_lens), max(settings.output_lens)
    longest, limit = prompt + output, info.get("max_model_len")
    if limit and longest > limit:
        raise InputError(
            f"impossible sweep: prompt {prompt} plus output {output} is {longest} tokens, max_model_len is {limit}"
        )
    if info.get("max_num_seqs") and batch > info["max_num_seqs"]:
        raise InputError(
            f"impossible sweep: batch {batch} exceeds max_num_seqs {info['max_num_seqs']}: raise --max-num-seqs"
        )
    if info.get("num_blocks"):
        pages = batch * -(-longest // info["block_size"])
        if pages > info["num_blocks"] - 1:
            held = (info["num_blocks"] - 1) * info["block_size"]
            raise InputError(
                f"impossible sweep: batch {batch} of {longest} tokens does not fit into the KV cache of {held} tokens: "
                "raise --kv-cache-tokens or ask for less"
            )


def _power(sampler: Sampler, spans: list[tuple[float, float]]) -> dict[str, Any] | None:
    """Watts by the readings that fell into the measured passes, joules of these passes; None: nothing was read."""
    inside = [(at, r) for at, r in sampler.samples if any(begin <= at <= end for begin, end in spans)]
    watts = [r.power for _, r in inside if r.power is not None]
    if not watts:
        return None
    mean = sum(watts) / len(watts)
    return {"mean_w": mean, "energy_j": mean * sum(end - begin for begin, end in spans), "readings": len(watts)}


def _per_token(power: dict[str, Any] | None, tokens: int) -> float | None:
    return power["energy_j"] / tokens if power and power["energy_j"] is not None else None
