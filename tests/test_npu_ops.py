"""Every op on an emulated NPU: each implementation against the reference in fp32, through the wheel's schemas and Meta
kernels of both torch_npu generations; wrong calls are refused by our own checks."""

from __future__ import annotations

import copy

import pytest
import torch
from emulated_npu import wheel
from emulated_npu.emulator import Emulator
from emulated_npu.machine import machine
from emulated_npu.tensor import NpuTensor

from surefoot.ops.attention import paged_sample
from surefoot.ops.samples import BF16, F16, F32
from surefoot.ops.spec import REGISTRY, OpSpec, Sample

pytestmark = pytest.mark.skipif(wheel.missing() is not None, reason=str(wheel.missing()))
DTYPES = (F32, BF16, F16)
PAGE = 128


@pytest.fixture(params=wheel.RELEASES)
def npu(request):
    with machine(request.param) as emulator:
        yield emulator


def on_npu(value):
    return NpuTensor(value.clone()) if isinstance(value, torch.Tensor) else copy.copy(value)


def on_host(value):
    return value.numbers if isinstance(value, NpuTensor) else value


def paged(name: str, query_lens, seq_lens, heads, kv_heads, dim) -> Sample:
    def make(dtype, device, gen):
        return paged_sample(dtype, device, gen, query_lens, seq_lens, heads, kv_heads, dim, PAGE)

    return Sample(name, make)


# The real models' heads in pages of 128: decode, prefill, continued prefill, and both kinds at once.
PAGED = [
    paged(f"{dim} {name}", query_lens, seq_lens, heads, kv_heads, dim)
    for heads, kv_heads, dim in ((32, 8, 64), (24, 8, 128), (8, 2, 256))
    for name, query_lens, seq_lens in (
        ("decode", [1] * 4, [1, 128, 129, 300]),
        ("prefill", [130, 7], [130, 7]),
        ("mixed", [1, 1, 5, 33], [40, 1, 5, 161]),
        ("one token of many", [3, 1], [9, 1]),
    )
]


def samples(spec: OpSpec) -> list[Sample]:
    return [*spec.samples(), *(PAGED if spec.name == "paged_attention" else [])]


@pytest.mark.parametrize("spec", list(REGISTRY.values()), ids=list(REGISTRY))
def test_every_implementation_equals_its_reference(npu: Emulator, spec: OpSpec):
    """On every sample, in every dtype: what dispatch would choose on an NPU, and each other candidate; with the older
    torch_npu, what calls its operators."""
    newest = npu.contract.release == wheel.RELEASES[0]
    candidates = spec.candidates("npu") if newest else [c for c in spec.implementations if c.device == "npu"]
    taken = set()
    for sample in samples(spec) if candidates else []:
        for dtype in DTYPES if newest else DTYPES[1:2]:
            call = sample.make(dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
            exact = {k: v.float().clone() if _floats(v) else copy.deepcopy(v) for k, v in call.items()}
            expected = _outputs(spec, spec.reference(**exact), exact)
            for candidate in candidates:
                given = {k: on_npu(v) for k, v in call.items()}
                if candidate.supports is not None and not candidate.supports(**given):
                    continue
                taken.add(candidate.name)
                actual = _outputs(spec, candidate.fn(**given), given)
                tolerance = spec.tolerance[dtype]
                for a, e in zip(actual, expected, strict=True):
                    message = f"{spec.name} by {candidate.name}, {sample.name}, {dtype}: {{}}".format
                    torch.testing.assert_close(
                        on_host(a).float(), e.float(), atol=tolerance.atol, rtol=tolerance.rtol, msg=message
                    )
    wanted = {c.name for c in spec.implementations if c.device == "npu"}
    assert taken >= wanted or not newest, f"no sample reaches {wanted - taken}"


def _floats(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _outputs(spec: OpSpec, result, call) -> list[torch.Tensor]:
    tensors = list(result) if isinstance(result, tuple) else [result]
    return [t for t in tensors + [call[name] for name in spec.mutates] if t is not None]
