"""Trace Surefoot's own engine: the real scheduler, inputs, model, cache and sampler, on the meta device.

Ops are dispatched as for an NPU, so the fused operators of `ops/npu` are in the trace. Requests of awkward lengths go
through `Engine.step` until they have ended. A step in which every request computes one token is decode, any other
prefill. Tokens come back as zeros, which is all that scheduling needs.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from surefoot import ops
from surefoot.analyze.npu_meta import npu_operators
from surefoot.analyze.registry import Registry
from surefoot.analyze.trace import Tracer
from surefoot.core.config import EngineConfig
from surefoot.core.sampling import SamplingParams
from surefoot.device.base import Device
from surefoot.device.chips import Capabilities
from surefoot.device.npu import PAGE
from surefoot.engine.engine import Engine
from surefoot.engine.graph_setup import plan_for
from surefoot.engine.load import checkpoint_dtype, describe, make_scheduler, plan_cache
from surefoot.engine.runner import Runner, StepResult
from surefoot.engine.scheduler import Schedule
from surefoot.models.base import CausalLM
from surefoot.models.registry import build
from surefoot.weights.assign import LoadReport, held_dtype, place, tensor_slots, tie

# The sampler's ways: greedy, every filter and edit, and log-probabilities.
SAMPLING = (
    SamplingParams(),
    SamplingParams(temperature=0.8, top_p=0.9, seed=1),
    SamplingParams(temperature=1.0, top_k=5, min_p=0.1, seed=2),
    SamplingParams(repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.2, logprobs=2),
)
DECODE_STEPS = 3


class MetaDevice(Device):
    """A stand-in for an NPU: its page size, no data, and memory enough for the plan."""

    type = "meta"

    def __init__(self) -> None:
        super().__init__(0)
        self.capabilities = Capabilities(block_size=PAGE, block_alignment=PAGE)

    def __str__(self) -> str:
        return "meta"

    def name(self) -> str:
        return "meta tensors, no data"

    def memory(self) -> tuple[int, int]:
        return 1 << 36, 1 << 36


class TracedRunner(Runner):
    """A runner whose steps are traced, prefill and decode apart."""

    prefill: Tracer
    decode: Tracer

    def run(self, step: Schedule) -> StepResult:
        tracer = self.decode if step.num_decodes == len(step.items) else self.prefill
        tracer.passes += 1
        with npu_operators(tracer.registry), ops.meta_as("npu"), tracer:
            return super().run(step)


def meta_weights(model: CausalLM, dtype: torch.dtype) -> None:
    """Give every parameter the dtype that loading would give it, still without data."""
    for name, slot in tensor_slots(model).items():
        if name not in model.tied:
            place(model, name, torch.empty(slot.shape, dtype=held_dtype(model, name, slot, dtype), device="meta"))
    tie(model)
    model.finalize()


def traced_engine(
    model: CausalLM,
    dtype: torch.dtype,
    config: EngineConfig,
    tracers: tuple[Tracer, Tracer],
    device: Device | None = None,
) -> Engine:
    """An engine around a model whose parameters are on the traced device."""
    device = device or MetaDevice()
    block_size = config.block_size or PAGE
    graphs = plan_for(model, config, device, dtype, block_size)
    cache = plan_cache(model, config, device, dtype, block_size, graphs)
    runner = TracedRunner(model, cache, block_size=block_size, dtype=dtype, device=device.torch_device)
    runner.prefill, runner.decode = tracers
    scheduler, caching = make_scheduler(model, cache, config, block_size)
    info = describe("traced", model, device, dtype, LoadReport(), cache, config, block_size, caching, [])
    return Engine(runner, scheduler, config, info)


def trace_engine(
    hf_config: dict, registry: Registry, *, dtype: str = "auto", batch: int = 8, prompt: int = 512
) -> tuple[Tracer, Tracer]:
    """(prefill, decode) of a model by its config.json: one request alone, then `batch` of mixed lengths."""
    model = build(hf_config)
    kind = checkpoint_dtype(hf_config) if dtype == "auto" else getattr(torch, dtype)
    meta_weights(model, kind)
    tracers = Tracer(registry, answer_host=True), Tracer(registry, answer_host=True)
    longest = min(prompt, model.rotary.config.max_length - DECODE_STEPS - 1)
    engine = traced_engine(model, kind, workload_config(longest, batch), tracers)
    run_workload(engine, longest, batch)
    return tracers


def workload_config(prompt: int, batch: int) -> EngineConfig:
    """Long prompts come in two chunks, so that continued ones are traced; all requests meet in one decode step."""
    return EngineConfig(
        max_num_seqs=batch,
        max_model_len=prompt + DECODE_STEPS,
        kv_cache_tokens=batch * (prompt + PAGE),
        max_num_batched_tokens=batch * prompt,
        prefill_chunk_size=-(-prompt // 2),
    )


def run_workload(engine: Engine, prompt: int, batch: int, sampling: tuple[SamplingParams, ...] = SAMPLING) -> None:
    """One request alone, then `batch` requests; none has a prefix in common with another, nor ends early."""

    def add(index: int, length: int) -> None:
        ids = [(index * 7 + i * 3 + 1) % engine.model.vocab_size for i in range(length)]
        params = replace(sampling[index % len(sampling)], max_tokens=DECODE_STEPS, ignore_eos=True)
        engine.add_request(ids, params, f"trace-{index}")

    add(0, prompt)
    while engine.has_unfinished():
        engine.step()
    for index in range(1, batch + 1):
        add(index, max(1, prompt * index // batch - index))
    while engine.has_unfinished():
        engine.step()
