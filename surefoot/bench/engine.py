"""Benchmark of a model in this process: load time, prefill and decode measured each by itself, memory, capacity.

Per batch and prompt length: prefill passes (B prompts of P tokens, one token each: nothing decodes). Per output length
on top: generation passes, whose decode steps with the whole batch running are the decode samples, and whose length
is the generation time. Cold, warm-up and measured passes are kept apart.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from surefoot.bench.events import EventWatch, warning
from surefoot.bench.result import Result
from surefoot.bench.sizes import MemoryWatch, Peaks, Work, capacity, peaks, share, work_of
from surefoot.bench.stats import pooled, summary
from surefoot.bench.steps import Pass, Stepper
from surefoot.core.errors import InputError
from surefoot.device.telemetry import Sampler

Progress = Callable[[str, "float | None"], None]
TELEMETRY_EVERY = 0.5
UNEVEN = 1.25  # mean over median of the decode steps, above which something disturbed them


@dataclass(frozen=True)
class EngineSettings:
    """batch, prompt_lens, output_lens: the cartesian sweep.  repeats: measured passes (6 give the median an interval).
    warmup: passes before them.
    """

    batch: tuple[int, ...] = (1, 2, 4, 8)
    prompt_lens: tuple[int, ...] = (128,)
    output_lens: tuple[int, ...] = (32,)
    repeats: int = 6
    warmup: int = 1
    seed: int = 0


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
        """Every point; each is on the disk when it is done."""
        settings = self.settings
        outer = list(itertools.product(settings.batch, settings.prompt_lens))
        for i, (batch, length) in enumerate(outer):
            self.progress(f"batch {batch}, prompt {length} ({i + 1}/{len(outer)})", i / len(outer))
            self.memory.begin()
            prefill = self._prefill(result, batch, length)
            prefill["peak_memory_bytes"] = self.memory.end()
            for count in settings.output_lens:
                name = f"batch {batch}, prompt {length}, output {count}"
                self.progress(f"{name} ({i + 1}/{len(outer)})", (i + 0.5) / len(outer))
                shape = {"name": name, "batch": batch, "prompt_len": length, "output_len": count}
                self.memory.begin()
                point = self._generate(result, batch, length, count)
                shape |= {"peak_memory_bytes": self.memory.end(), "prefill": prefill}
                result.add_point(shape | point)
            result.data["memory"] = result.data.get("memory", {}) | self.memory.result()
            result.data["events"] = self.events.result()

    # ---- passes

    def _passes(self, result: Result, what: str, batch: int, length: int, count: int) -> dict[str, Any]:
        """Warm-up and measured passes of one shape, and what the device drew meanwhile."""
        # NOTE: new random prompts for every pass, or the prefix cache would do the prefill.
        draw = random.Random(f"{self.settings.seed}/{what}/{batch}/{length}/{count}")
        index = next(self._index)

        def one(phase: str) -> Pass:
            prompts = [draw.choices(range(self.stepper.vocab_size), k=length) for _ in range(batch)]
            done = self.stepper.run(prompts, count)
            self.memory.look()
            self._log(
                result, done, {"shape": index, "what": what, "phase": phase, "batch": batch, "prompt_len": length}
            )
            return done

        warm = [one("warmup") for _ in range(self.settings.warmup)]
        self.events.take("warmup")
        with Sampler(str(self.stepper.device), TELEMETRY_EVERY) as sampler:
            passes = [one("measured") for _ in range(self.settings.repeats)]
        found = warning(self.events.take("measured")) + _warnings(passes)
        return {"warmup": [p.wall for p in warm], "passes": passes, "power": _power(sampler), "warnings": found}

    def _log(self, result: Result, done: Pass, head: dict[str, Any]) -> None:
        steps = [[s.kind, s.begin, s.seconds, s.tokens] for s in done.steps]
        result.write({"record": "pass"} | head | {"wall_s": done.wall, "ttft_s": done.ttft, "steps": steps})

    def _prefill(self, result: Result, batch: int, length: int) -> dict[str, Any]:
        run = self._passes(result, "prefill", batch, length, 1)
        seconds = [p.seconds("prefill") for p in run["passes"]]
        times = summary(seconds)
        flops = self.work.prefill_flops(batch, length)
        return {
            "seconds": times,
            "tokens_per_s": batch * length / times["median"],
            "steps_per_pass": len(run["passes"][0].steps),
            "warmup_s": run["warmup"],
            "mfu": share(flops, times["median"], self.peaks["flops_per_s"]),
            "power": run["power"],
            "warnings": run["warnings"],
        }

    def _generate(self, result: Result, batch: int, length: int, count: int) -> dict[str, Any]:
        run = self._passes(result, "generate", batch, length, count)
        passes: list[Pass] = run["passes"]
        walls = summary([p.wall for p in passes])
        point: dict[str, Any] = {
            "generation_s": walls,
            "output_tokens_per_s": batch * count / walls["median"],
            "requests_per_s": batch / walls["median"],
            "ttft_s": pooled([p.ttft for p in passes]),
            "warmup_s": run["warmup"],
            "power": run["power"],
            "joules_per_output_token": _per_token(run["power"], batch * count * len(passes)),
            "mixed_steps": sum(len(p.of("mixed")) for p in passes),
            "warnings": run["warnings"],
        }
        decode = self._decode(passes, batch, length, count)
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


def _warnings(passes: list[Pass]) -> list[str]:
    found = []
    if n := sum(p.preemptions for p in passes):
        found.append(f"{n} preemptions: tokens were computed twice")
    if n := sum(p.cached_tokens for p in passes):
        found.append(f"{n} prompt tokens came from the prefix cache: the prefill is too fast by that")
    return found


def _power(sampler: Sampler) -> dict[str, Any] | None:
    """Watts and joules while measuring; None where the device does not tell."""
    watts = sampler.mean_power()
    if watts is None:
        return None
    return {"mean_w": watts, "energy_j": sampler.energy(), "readings": len(sampler.samples)}


def _per_token(power: dict[str, Any] | None, tokens: int) -> float | None:
    return power["energy_j"] / tokens if power and power["energy_j"] is not None else None
