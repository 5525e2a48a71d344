"""`surefoot ops` for the engine: what a trace on meta says is what a run on the emulated NPU did, fused operators
included."""

from __future__ import annotations

import json

import pytest
import torch
from emulated_npu import wheel
from emulated_npu.emulator import Emulator
from emulated_npu.machine import machine
from emulated_npu.tensor import NpuTensor

from surefoot import canaries
from surefoot.analyze import native
from surefoot.analyze.check import check_operators
from surefoot.analyze.registry import Status, load
from surefoot.analyze.trace import Tracer
from surefoot.device import get_device
from surefoot.models.registry import build
from surefoot.ops.npu import attention, common
from surefoot.weights.checkpoint import Checkpoint
from surefoot.weights.load import load_weights

needs_wheel = pytest.mark.skipif(wheel.missing() is not None, reason=str(wheel.missing()))
LONGEST, BATCH = 20, 3
FUSED = {
    "canary-llama": {
        "npu::npu_add_rms_norm",
        "npu::npu_fused_infer_attention_score",
        "npu::npu_rms_norm",
        "npu::npu_rotary_mul",
        "npu::npu_scatter_nd_update_",
        "npu::npu_swiglu",
    },
}
FUSED["canary-qwen3.5"] = FUSED["canary-llama"] - {"npu::npu_add_rms_norm"}


@pytest.fixture(autouse=True)
def fresh_constants():
    """What is made once per device belongs to the first run that needs it; every run here is a first one."""
    attention._causal_mask.cache_clear()
    common.filled.cache_clear()


def meta_trace(name: str) -> tuple[Tracer, Tracer]:
    registry = load()
    tracers = Tracer(registry, answer_host=True), Tracer(registry, answer_host=True)
    model = build(json.loads((canaries.path(name) / "config.json").read_text()))
    native.meta_weights(model, torch.bfloat16)
    engine = native.traced_engine(model, torch.bfloat16, native.workload_config(LONGEST, BATCH), tracers)
    native.run_workload(engine, LONGEST, BATCH, native.SAMPLING[:3])
    return tracers


def emulated_trace(name: str) -> tuple[Emulator, Emulator]:
    with machine() as npu:
        tracers = Emulator(npu.contract, npu.registry), Emulator(npu.contract, npu.registry)
        checkpoint = Checkpoint(canaries.path(name))
        model = build(checkpoint.config)
        load_weights(model, checkpoint, torch.device("npu:0"), torch.bfloat16)
        config = native.workload_config(LONGEST, BATCH)
        engine = native.traced_engine(model, torch.bfloat16, config, tracers, get_device("npu:0"))
        native.run_workload(engine, LONGEST, BATCH, native.SAMPLING[:3])
    return tracers


def seen(tracer: Tracer) -> dict:
    return {key: (u.calls, sorted(u.parts_of), u.status, u.shapes) for key, u in tracer.found.items()}


@needs_wheel
@pytest.mark.parametrize("name", canaries.CANARIES)
def test_the_trace_on_meta_equals_the_run_on_the_emulated_npu(name):
    real = emulated_trace(name)
    attention._causal_mask.cache_clear()
    common.filled.cache_clear()
    for a, b in zip(meta_trace(name), real):
        assert a.passes == b.passes > 1
        assert seen(a) == seen(b)


@pytest.mark.parametrize("name", canaries.CANARIES)
def test_ops_lists_the_fused_operators(name):
    """Without a wheel and without torch_npu: schemas from the shipped registry, shapes of our own."""
    coverage = check_operators(name, batch=2, prompt=20)
    assert coverage.runs is True
    fused = {r.operator for r in coverage.rows if r.phase == "decode" and r.status is Status.FUSED}
    assert fused == FUSED[name]
    assert coverage.count(Status.FALLBACK) == coverage.count(Status.UNKNOWN) == 0


def test_numbers_lie_where_views_say():
    """A view on the emulated device is the same memory, with the base's sizes and strides."""
    if wheel.missing() is None:
        with machine():
            base = torch.arange(12, device="npu:0").view(3, 4)
            base[1, 2:].fill_(7)
            assert base.cpu().tolist()[1] == [4, 5, 7, 7]
            part = base.t()[1:3]
            assert isinstance(part, NpuTensor) and part.stride() == (1, 4) and part.storage_offset() == 1
