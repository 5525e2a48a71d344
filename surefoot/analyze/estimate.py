"""`surefoot estimate`: size, memory and speed of a model on a chip, from its config alone.

Sizes are the engine's own: parameters on the meta device in the dtypes that the loader would hold them in, cache by the
engine's planner. Times come from `roofline` (what a step costs) and `rates` (how fast the chip may be), as intervals.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from surefoot.analyze.rates import Calibration, ChipRates, Interval, Rates
from surefoot.analyze.roofline import OpCall, Step, StepCost, decode_step, prefill_steps, step_cost
from surefoot.cache.plan import CachePlan, kv_bytes_per_token, state_bytes_per_slot
from surefoot.core.config import DTYPES, QUANT_SCHEMES, EngineConfig
from surefoot.core.errors import CapacityError, InputError
from surefoot.device.base import Device
from surefoot.device.chips import Capabilities, Chip
from surefoot.engine.graph_setup import plan_for
from surefoot.engine.load import CACHE_SHARE, DEFAULT_CACHE_SHARE, plan_cache
from surefoot.engine.quantised import count_parameters
from surefoot.layers import quant_linear
from surefoot.layers.quant_linear import QuantLinear
from surefoot.models.base import CausalLM
from surefoot.models.registry import build
from surefoot.quant.schemes import Scheme, scheme
from surefoot.quant.select import select
from surefoot.weights.assign import held_dtype, place, tensor_slots, tie

FORMAT = "surefoot-estimate-1"
SHORT = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
DEFAULT_VARIANTS = ("float16", "bfloat16", "w8a8", "w8a16", "w4a16")
BLOCK_SIZE = {"npu": 128}


@dataclass(frozen=True)
class Target:
    """The device in question. memory: bytes in total; free: what the model and its cache may take."""

    name: str
    type: str
    memory: int | None
    free: int | None
    dtypes: tuple[str, ...]
    block_size: int
    chip: Chip | None = None
    calibration: Calibration | None = None

    def rates(self, variant: str, activations: str) -> Rates | None:
        if self.calibration is not None:
            return self.calibration.rates(variant)
        return ChipRates(self.chip, activations) if self.chip is not None else None


def chip_target(chip: Chip) -> Target:
    block = BLOCK_SIZE.get(chip.device, Capabilities().block_size)
    return Target(chip.name, chip.device, chip.memory, chip.memory, chip.dtypes, block, chip=chip)


def calibrated_target(calibration: Calibration) -> Target:
    kind = calibration.device.partition(":")[0]
    block = BLOCK_SIZE.get(kind, Capabilities().block_size)
    memory, floats = calibration.memory, tuple(name for name in calibration.variants if name in DTYPES)
    return Target(calibration.device_name, kind, memory, memory, floats, block, calibration=calibration)


@dataclass(frozen=True)
class Sketch:
    """A model whose tensors have dtypes and shapes but no memory. weight_bytes: as the loader would report them."""

    model: CausalLM
    dtype: torch.dtype
    parameters: int
    weight_bytes: int


def sketch(hf_config: dict[str, Any], dtype: torch.dtype, quant: Scheme | None = None, lm_head: bool = False) -> Sketch:
    """The model of a config as the engine would hold it in `dtype`, quantised on load if `quant` says so."""
    model = build(hf_config)
    parameters = count_parameters(model)
    if quant is not None:
        if quant_linear.quantised(model):
            raise InputError(f"the model is quantised already: {quant.name} cannot be asked of it")
        for name in select(quant_linear.shapes(model), quant, model.quant_exclude, lm_head).modules:
            layer = model.get_submodule(name)
            assert isinstance(layer, quant_linear.Linear)
            quant_linear.replace(model, name, _quantised(layer, quant))
            model.tied.pop(f"{name}.weight", None)
    weight_bytes = 0
    for name, slot in tensor_slots(model).items():
        if name in model.tied:
            continue
        inside = isinstance(model.get_submodule(name.rpartition(".")[0]), QuantLinear)
        held = held_dtype(model, name, slot, dtype, stored=torch.bfloat16 if inside and quant is None else None)
        keep = slot.dtype if inside and quant is not None and not name.endswith(".bias") else held
        tensor = torch.empty(slot.shape, dtype=keep, device="meta")
        weight_bytes += tensor.nbytes
        place(model, name, tensor)
    tie(model)
    for layer in quant_linear.quantised(model).values():
        layer._parameters.pop("weight_shape", None)  # finalize compares its value, and there is none here
    model.finalize()
    return Sketch(model, dtype, parameters, weight_bytes)


def _quantised(layer: quant_linear.Linear, quant: Scheme) -> QuantLinear:
    """What `QuantiseOnLoad` makes of a dense layer, without numbers."""
    outer, inner = layer.out_features, layer.in_features
    held = QuantLinear(inner, outer, quant, layer.bias)
    with torch.device("meta"):
        if quant.bits == 8:
            return held.hold(weight=torch.empty(outer, inner, dtype=torch.int8), weight_scale=torch.empty(outer))
        scale = torch.empty(outer, inner // held.group_size, dtype=torch.bfloat16)
        return held.hold(weight_packed=torch.empty(outer, inner // 8, dtype=torch.int32), weight_scale=scale)


class _OnPaper(Device):
    """A device that is not here: memory as given."""

    def __init__(self, kind: str, free: int):
        super().__init__()
        self.type, self.free = kind, free

    def memory(self) -> tuple[int, int]:
        return self.free, self.free


def cache_plan(model: Sketch, config: EngineConfig, kind: str, free: int, block_size: int) -> CachePlan:
    """The plan of an engine on a device of this type that has `free` bytes left beside the weights."""
    device = _OnPaper(kind, free)
    graphs = plan_for(model.model, config, device, model.dtype, block_size)
    return plan_cache(model.model, config, device, model.dtype, block_size, graphs)


def largest_batch(model: Sketch, config: EngineConfig, target: Target, length: int, memory: int) -> int:
    """Requests of `length` tokens that the cache of an engine on this device can hold at once (0: not even one)."""
    specs, size = model.model.state_specs(), model.dtype.itemsize
    page = target.block_size * sum(kv_bytes_per_token(spec, size) for spec in specs)
    slot = sum(state_bytes_per_slot(spec, size) for spec in specs)
    budget = int((memory - model.weight_bytes) * CACHE_SHARE.get(target.type, DEFAULT_CACHE_SHARE))
    checkpoints = config.num_state_checkpoints if config.enable_prefix_caching else 0
    fixed = page + (1 + checkpoints) * slot
    each = -(-length // target.block_size) * page + slot
    return max(0, (budget - fixed) // each)


@dataclass(frozen=True)
class Question:
    """What to estimate. lengths: prompt lengths of prefill, and tokens in the cache of decode. memory: bytes, if other
    than the chip's."""

    variants: tuple[str, ...] = DEFAULT_VARIANTS
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    lengths: tuple[int, ...] = (128, 1024)
    memory: int | None = None
    config: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if not self.variants or not self.batches or not self.lengths:
            raise InputError("give at least one dtype, one batch and one length")
        if min(*self.batches, *self.lengths, 10**9) < 1:
            raise InputError("batches and lengths must be 1 or more")
        names = [SHORT.get(name.lower(), name.lower()) for name in self.variants]
        for name in names:
            if name not in (*DTYPES[1:], *QUANT_SCHEMES):
                known = ", ".join([*SHORT, *QUANT_SCHEMES])
                raise InputError(f"unknown dtype {name!r}: choose among {known}")
        object.__setattr__(self, "variants", tuple(dict.fromkeys(names)))


def estimate(model_ref: str, hf_config: dict[str, Any], target: Target, question: Question) -> dict[str, Any]:
    """Everything as one JSON-ready object; unknown is None."""
    variants = [_variant(hf_config, target, question, name) for name in question.variants]
    return {
        "format": FORMAT,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "model": model_ref,
        "device": _describe(target),
        "memory": question.memory or target.memory,
        "question": asdict(question),
        "variants": variants,
    }


def _describe(target: Target) -> dict[str, Any]:
    if target.calibration is not None:
        c = target.calibration
        facts = {"device": c.device, "threads": c.threads, "calibrated": c.date, "notes": c.notes}
        return {"name": target.name, "method": "calibration"} | facts
    chip = target.chip
    assert chip is not None
    return {
        "name": chip.name,
        "method": "published peaks",
        "peak_flops": dict(chip.peak_flops),
        "memory_bandwidth": chip.memory_bandwidth,
        "source": chip.source,
        "memory": chip.memory,
        "memory_source": chip.memory_source or None,
        "power": chip.power,
        "power_source": chip.power_source or None,
    }


def activations_of(variant: str, dtypes: Sequence[str]) -> str:
    """dtype of activations, cache and unquantised layers: the variant's own, or 16 bits that the device has."""
    if variant in QUANT_SCHEMES:
        return next((name for name in ("bfloat16", "float16") if name in dtypes), "float32")
    return variant


def _variant(hf_config: dict[str, Any], target: Target, question: Question, name: str) -> dict[str, Any]:
    activations = activations_of(name, target.dtypes)
    quant = scheme(name) if name in QUANT_SCHEMES else None
    model = sketch(hf_config, getattr(torch, activations), quant)
    specs, size = model.model.state_specs(), model.dtype.itemsize
    longest = model.model.rotary.config.max_length
    lengths = [n for n in question.lengths if n <= longest]
    if not lengths:
        raise InputError(f"no length is within the model's {longest} tokens: ask for shorter ones")
    first = lengths[0]
    found: dict[str, Any] = {
        "name": name,
        "activations": activations,
        "supported": activations in target.dtypes,
        "architecture": model.model.architecture,
        "parameters": model.parameters,
        "weight_bytes": model.weight_bytes,
        "kv_bytes_per_token": sum(kv_bytes_per_token(spec, size) for spec in specs),
        "state_bytes_per_request": sum(state_bytes_per_slot(spec, size) for spec in specs),
        "flops_per_token": {
            "prefill": {"length": first} | _per_token(model, prefill_steps(first, first)[0], target),
            "decode": {"length": first} | _per_token(model, decode_step(1, first), target),
        },
        "notes": [],
    }
    if len(lengths) < len(question.lengths):
        found["notes"].append(f"lengths beyond the model's {longest} tokens are left out")
    memory = question.memory or target.free
    found["cache"] = _cache(model, target, question, memory, lengths)
    rates = target.rates(name, activations)
    if not found["supported"]:
        found["notes"].append(f"{target.name} does not compute in {activations}")
    elif rates is None:
        found["notes"].append(f"the calibration did not measure {name}")
    else:
        found["prefill"] = [_prefill(model, rates, target, question, n) for n in lengths]
        found["decode"] = [_decode(model, rates, target, b, n) for n in lengths for b in question.batches]
    return found


def _per_token(model: Sketch, step: Step, target: Target) -> dict[str, float]:
    cost = step_cost(model.model, step, model.dtype, target.block_size)
    classes = cost.by_class(lambda call: call.flops / step.num_tokens)
    return classes | {"total": sum(classes.values())}


def _cache(model: Sketch, target: Target, question: Question, memory: int | None, lengths: list[int]) -> dict[str, Any]:
    """The engine's plan with its default settings, and the largest batch of each length."""
    if memory is None:
        return {"plan": None, "why": "the memory is not known: give --memory"}
    free = memory - model.weight_bytes
    batches = {str(n): largest_batch(model, question.config, target, n, memory) for n in lengths}
    try:
        found = cache_plan(model, question.config, target.type, free, target.block_size)
    except CapacityError as error:
        return {"plan": None, "why": str(error), "largest_batch": batches}
    usable = (found.num_blocks - found.num_dummy_blocks) * target.block_size
    return {"plan": asdict(found) | {"kv_cache_tokens": usable}, "largest_batch": batches}


def _prefill(model: Sketch, rates: Rates, target: Target, question: Question, length: int) -> dict[str, Any]:
    chunk = question.config.prefill_chunk_size or question.config.max_num_batched_tokens
    seconds: Interval | None = None
    for step in prefill_steps(length, min(chunk, question.config.max_num_batched_tokens)):
        part = rates.interval(step_cost(model.model, step, model.dtype, target.block_size), "prefill")
        seconds = part if seconds is None else seconds + part
    assert seconds is not None
    return _row(target, {"prompt": length}, seconds, length)


def _decode(model: Sketch, rates: Rates, target: Target, batch: int, length: int) -> dict[str, Any]:
    cost = step_cost(model.model, decode_step(batch, length), model.dtype, target.block_size)
    row = _row(target, {"batch": batch, "context": length}, rates.interval(cost, "decode"), batch)
    return row | {"bound_by": bound_by(cost, rates)}


def bound_by(cost: StepCost, rates: Rates) -> str | None:
    """Which limit makes the low end of a chip with published peaks."""
    if not isinstance(rates, ChipRates):
        return None
    no_memory = ChipRates(replace(rates.chip, memory_bandwidth=None), rates.dtype).interval(cost, "decode").low
    whole = rates.interval(cost, "decode").low
    return None if whole is None else "compute" if no_memory == whole else "bandwidth"


def _row(target: Target, point: dict[str, int], seconds: Interval, tokens: int) -> dict[str, Any]:
    power = target.chip.power if target.chip else None
    # A chip may draw less than its limit, so this is an upper end only.
    joules = seconds.high * power / tokens if power and seconds.high else None
    return point | {
        "seconds": asdict(seconds),
        "tokens_per_s": asdict(seconds.inverse(tokens)),
        "joules_per_token_at_most": joules,
    }


def predicted_calls(cost: StepCost, rates: Any) -> dict[str, float]:
    """Expected seconds by op class of a calibrated device: what a report puts beside `probes.OpTimes`."""

    def seconds(call: OpCall) -> float:
        return rates.seconds(call)

    return cost.by_class(seconds)
