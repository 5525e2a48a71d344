"""`surefoot calibrate`: measure a device, so that estimates for it rest on evidence.

Four probes: bytes read per second, linear ops of each dtype and scheme at several row counts, the time to start an op,
and the engine itself on two small random models (one per family), whose steps are timed op by op and as a whole. The
last says how wrong the sum of the first ones is; that error becomes the width of every interval (see `rates`).

Everything is measured in rounds (all shapes once, then all again), so that a disturbance of a second spoils one sample
of each instead of all samples of one.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from surefoot import ops
from surefoot.analyze import probes
from surefoot.analyze.estimate import sketch
from surefoot.analyze.probes import OpTimes
from surefoot.analyze.rates import FORMAT, CalibratedRates, Calibration, OpFit, Variant
from surefoot.analyze.roofline import OpCall, StepCost, step_cost
from surefoot.core.config import QUANT_SCHEMES, EngineConfig
from surefoot.core.errors import InputError
from surefoot.device import get_device
from surefoot.device.base import Device
from surefoot.engine.engine import Engine
from surefoot.engine.graph_setup import no_graphs
from surefoot.engine.load import versions
from surefoot.ops import cpu
from surefoot.quant.schemes import quantise_rows, scheme

Progress = Callable[[str, float | None], None]


@dataclass(frozen=True)
class Settings:
    """What is measured. The defaults take two to three minutes on two quiet CPU cores, one dtype about 20 s."""

    device: str = "cpu"
    variants: tuple[str, ...] = ("float32", "bfloat16", "float16", *QUANT_SCHEMES)
    threads: int | None = None
    repeats: int = 5  # of each measurement, in as many rounds; of engine steps, in ROUNDS of half as many
    matrix: tuple[int, int] = (8192, 2048)  # [out, in]
    small_matrix: tuple[int, int] = (512, 128)  # its time beyond what its weights explain is the cost of a call
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 64, 256)
    read_bytes: int = 256 << 20
    scale: int = 1  # probe models are this many times smaller
    prompts: tuple[int, ...] = (16, 64, 256)
    batches: tuple[int, ...] = (1, 4, 8)
    contexts: tuple[int, ...] = (16, 200)


def calibrate(settings: Settings, progress: Progress | None = None) -> Calibration:
    """Measure a device; see the module's docstring."""
    device = get_device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    variants = [name for name in settings.variants if _activations(name, device) in device.capabilities.dtypes]
    say = progress or (lambda what, done: None)
    say("memory bandwidth", None)
    reads = sorted(_read_rates(device, settings))
    found = Calibration(
        device=str(device),
        device_name=device.name(),
        date=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        threads=torch.get_num_threads(),
        memory=device.memory()[1],
        bandwidth=(statistics.median(reads), reads[-1]),
        launch=_launch(device, settings),
        replay=_replay(device, settings) if device.captures_on_use and not no_graphs(device) else None,
        variants={},
        versions=versions(),
        notes=_noise(reads),
    )
    for i, name in enumerate(variants):
        say(f"linear ops, {name}", i / len(variants))
        variant = found.variants[name] = Variant(linear=dict(linear_times(device, name, settings, settings.matrix)))
        size = math.prod(settings.small_matrix)
        for rows, (small, _) in linear_times(device, name, settings, settings.small_matrix):
            variant.linear_call[rows] = size * max(0.0, small - variant.linear[rows][0])
    for i, name in enumerate(variants):
        say(f"engine steps, {name}", i / len(variants))
        _fit_engine(found, name, device, settings)
    say("engine steps", 1.0)
    return found


def _activations(variant: str, device: Device) -> str:
    if variant not in QUANT_SCHEMES:
        return variant
    return "bfloat16" if "bfloat16" in device.capabilities.dtypes else "float16"


def _noise(reads: Sequence[float]) -> list[str]:
    notes = []
    if reads[-1] > 1.2 * reads[0]:
        notes.append(f"read bandwidth varied by {reads[-1] / reads[0]:.2f}x while measuring: was the machine busy?")
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > 0.5 + (os.cpu_count() or 1):
        notes.append(f"load average {load:.1f} on {os.cpu_count()} CPUs while measuring: repeat on a quiet machine")
    return notes


def _seconds(device: Device, run: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of `run`, after one run that does not count."""
    run()
    device.synchronize()
    found = []
    for _ in range(repeats):
        with device.timer() as timer:
            run()
        found.append(timer.seconds)
    return found


def _read_rates(device: Device, settings: Settings) -> list[float]:
    data = torch.ones(settings.read_bytes // 4, device=device.torch_device)
    return [data.nbytes / t for t in _seconds(device, data.sum, settings.repeats)]


TINY_CALLS = 100


def _tiny_ops(device: Device) -> Callable[[], None]:
    x, weight = torch.ones(1, 8, device=device.torch_device), torch.ones(8, device=device.torch_device)

    def run() -> None:
        for _ in range(TINY_CALLS):
            ops.rms_norm(x, weight, 1e-5)

    return run


def _launch(device: Device, settings: Settings) -> float:
    """Seconds from one start of a tiny op to the next."""
    return statistics.median(_seconds(device, _tiny_ops(device), settings.repeats)) / TINY_CALLS


def _replay(device: Device, settings: Settings) -> float:
    """The same where the ops were recorded and are repeated."""
    return statistics.median(_seconds(device, device.capture(_tiny_ops(device)).replay, settings.repeats)) / TINY_CALLS


LARGE = 128 << 20  # weights that one pass goes through: more than any cache holds
MATRICES = 64
ROUNDS = 3


@torch.inference_mode()
def linear_times(
    device: Device, variant: str, settings: Settings, matrix: tuple[int, int]
) -> Iterable[tuple[int, tuple[float, float]]]:
    """(rows, (median, best) seconds per weight element) of the linear op of a dtype or scheme, weights from memory as
    far as 64 matrices fill it."""
    outer, inner = matrix
    dtype = getattr(torch, _activations(variant, device))
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(outer, inner, generator=generator).to(dtype)
    call, one = _linear_op(variant, dense, device)
    copies = max(1, min(MATRICES, LARGE // sum(t.nbytes for t in one))) if settings.scale == 1 else 1
    matrices = [one] + [tuple(t.clone() for t in one) for _ in range(copies - 1)]
    inputs = {n: torch.randn(n, inner, generator=generator).to(dtype).to(device.torch_device) for n in settings.rows}
    found: dict[int, list[float]] = {rows: [] for rows in settings.rows}
    for _ in range(settings.repeats):
        for rows, x in inputs.items():
            some = matrices if rows < 16 or len(matrices) == MATRICES else matrices[:2]

            def run(x: torch.Tensor = x, some: list = some) -> None:
                for tensors in some:
                    call(x, *tensors)

            found[rows] += [t / (len(some) * outer * inner) for t in _seconds(device, run, 2)]
    for rows, times in found.items():
        yield rows, (statistics.median(times), min(times))


def _linear_op(variant: str, dense: torch.Tensor, device: Device) -> tuple[Callable[..., Any], tuple]:
    """The op of a variant, and the tensors that follow its x."""
    if variant not in QUANT_SCHEMES:
        return ops.linear, (dense.to(device.torch_device),)
    quant = scheme(variant)
    tensors = tuple(t.to(device.torch_device) for t in quantise_rows(dense, quant, "probe").values())
    layout = "panels" if cpu.pack_(*tensors) else "rows"  # as a loaded layer has them
    if quant.bits == 4:
        group = quant.group_size or dense.shape[1]
        return (lambda x, q, s: ops.linear_w4(x, q, s, group, None, quant.act, layout)), tensors
    return (lambda x, q, s: ops.linear_w8(x, q, s, None, quant.act, layout)), tensors


def _fit_engine(found: Calibration, name: str, device: Device, settings: Settings) -> None:
    """Fit the variant's other ops and the overhead of a step to engine steps, then record how wrong the sum is."""
    variant, rates = found.variants[name], CalibratedRates(found, found.variants[name])
    calls: list[tuple[OpCall, float]] = []
    walls: list[tuple[str, StepCost, float]] = []
    quant = name if name in QUANT_SCHEMES else None
    dtype = _activations(name, device)
    for config in probes.models(settings.scale):
        paper = sketch(config, getattr(torch, dtype), scheme(quant) if quant else None)
        with _engine(config, dtype, quant, settings) as engine:
            plan = list(probes.plan(settings.prompts, settings.batches, settings.contexts))
            samples: list[list[float]] = [[] for _ in plan]
            for _ in range(ROUNDS):
                for (phase, step), taken in zip(plan, samples):
                    times = OpTimes(device)
                    taken += probes.seconds(engine, phase, step, (settings.repeats + 1) // 2, times)
                    variant.saw(times.calls)
                    calls += times.calls
            for (phase, step), taken in zip(plan, samples):
                cost = step_cost(paper.model, step, paper.dtype, engine.info.block_size)
                walls.append((phase, cost, statistics.median(taken)))
    variant.weights = min(cost.total(lambda call: call.weights) for _, cost, _ in walls)
    for op in {call.op for call, _ in calls if call.op_class != "linear"}:
        own = [(call, seconds) for call, seconds in calls if call.op == op]
        features = [(1.0, call.flops, call.bytes) for call, _ in own]
        variant.ops[op] = OpFit(*fit(features, [seconds for _, seconds in own]))
    if found.replay is None:
        variant.overhead = _overhead(rates, walls)
    else:
        variant.overhead = _overhead(rates, [wall for wall in walls if wall[0] == "prefill"])
        variant.replayed = _overhead(rates, [wall for wall in walls if wall[0] == "decode"])
    for phase in ("prefill", "decode"):
        ratios = sorted(wall / rates.raw(cost, phase) for p, cost, wall in walls if p == phase)
        variant.error[phase] = (ratios[0], statistics.median(ratios), ratios[-1])


def _overhead(rates: CalibratedRates, walls: list[tuple[str, StepCost, float]]) -> tuple[float, float, float]:
    """What a step takes beyond its ops: per op call, per element passed between layers, per logit."""
    shapes = [(float(cost.calls.total()), float(cost.passed), float(cost.logits)) for _, cost, _ in walls]
    left = [max(wall - rates.ops(cost, phase), 0.0) for phase, cost, wall in walls]
    return fit(shapes, left, weights=[1 / wall for _, _, wall in walls])


class _engine:
    """An engine with random weights of a config, for the length of a block."""

    def __init__(self, config: dict[str, Any], dtype: str, quant: str | None, settings: Settings):
        longest = max(*settings.prompts, *settings.contexts) + 16
        self.config, self.engine_config = (
            config,
            EngineConfig(
                device=settings.device,
                dtype=dtype,
                quant=quant,
                random_weights=0,
                max_model_len=longest,
                max_num_seqs=max(settings.batches),
                max_num_batched_tokens=longest * max(settings.batches),
                kv_cache_tokens=(longest + 256) * max(settings.batches),
                enable_prefix_caching=False,
                num_threads=torch.get_num_threads(),
            ),
        )

    def __enter__(self) -> Engine:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(self.config))
            return Engine.load(folder, self.engine_config)

    def __exit__(self, *exc: object) -> None:
        pass


def fit(
    features: Sequence[tuple[float, float, float]], seconds: Sequence[float], weights: Sequence[float] | None = None
) -> tuple[float, float, float]:
    """Non-negative factors of three features that explain `seconds`, by least squares of the relative errors."""
    target = np.asarray(seconds, float)
    weight = np.asarray(weights, float) if weights is not None else 1 / np.maximum(target, 1e-9)
    matrix = np.asarray(features, float)
    scale = np.where(matrix.max(0) > 0, matrix.max(0), 1.0)
    matrix = matrix / scale
    best, least = np.zeros(3), float("inf")
    for size in (1, 2, 3):
        for chosen in map(list, itertools.combinations(range(3), size)):
            found, *_ = np.linalg.lstsq(matrix[:, chosen] * weight[:, None], target * weight, rcond=None)
            error = float(np.sum(((matrix[:, chosen] @ found - target) * weight) ** 2))
            if (found >= 0).all() and error < least * (1 - 1e-9):
                best, least = np.zeros(3), error
                best[chosen] = found
    a, b, c = (float(v) for v in best / scale)
    return a, b, c


def default_path(device: str) -> Path:
    return Path.home() / ".cache" / "surefoot" / f"calibration-{device.replace(':', '-')}.json"


def save(calibration: Calibration, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(calibration.as_dict(), indent=1) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; give another place with -o") from None


def load(path: Path) -> Calibration:
    """A saved calibration, or one line that says what is wrong with the file."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"no calibration at {path}: run `surefoot calibrate` first") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the calibration {path}: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InputError(f"{path} is not a calibration of this version ({FORMAT}): run `surefoot calibrate` again")
    try:
        return Calibration.from_dict(data)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"{path} is damaged ({error!r}): run `surefoot calibrate` again") from None
