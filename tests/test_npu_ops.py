"""Every op on an emulated NPU: each implementation against the reference in fp32, through the wheel's schemas and Meta
kernels of both torch_npu generations; wrong calls are refused by our own checks."""

from __future__ import annotations

import copy

import pytest
import torch
from emulated_npu import report, wheel
from emulated_npu.emulator import KERNELS, Emulator, NpuError
from emulated_npu.kernels import RefusedByCann
from emulated_npu.machine import machine
from emulated_npu.plants import PLANTS, plant
from emulated_npu.tensor import NpuTensor

from surefoot import ops
from surefoot.analyze import npu_meta
from surefoot.analyze.registry import Status, load
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


# ---- the wheel's Meta kernels


@pytest.mark.parametrize("release", wheel.RELEASES)
def test_shapes_for_traces_are_those_of_the_wheel(release):
    """`surefoot ops` knows the shapes of the operators that we call without torch_npu: the same as with it."""
    meta = wheel.contract(release).meta
    x, row, i8 = _meta(6, 64), _meta(64), _meta(6, 64, dtype=torch.int8)
    pages, table = _meta(5, PAGE, 128), _meta(6, 2, dtype=torch.int32)
    lens = {
        "actual_seq_lengths_kv": [3] * 6,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "block_size": PAGE,
        "scale": 1.0,
    }
    calls = {
        "npu_rms_norm": ((x, row), {}),
        "npu_add_rms_norm": ((x, x, row), {}),
        "npu_swiglu": ((x, -1), {}),
        "npu_rotary_mul": ((x[None, :, None], _meta(1, 6, 1, 64), _meta(1, 6, 1, 64)), {}),
        "npu_scatter_nd_update_": ((_meta(9, 64), _meta(6, 1, dtype=torch.int64), x), {}),
        "npu_fused_infer_attention_score": (
            (_meta(6, 1, 4, 64), pages, pages),
            lens | {"block_table": table, "input_layout": "BSND"},
        ),
        "npu_dynamic_quant": ((x,), {}),
        "npu_quant_matmul": (
            (i8, _meta(32, 64, dtype=torch.int8).t(), _meta(32, dtype=F32)),
            {"pertoken_scale": _meta(6, dtype=F32), "output_dtype": 15},
        ),
        "npu_convert_weight_to_int4pack": ((_meta(32, 64, dtype=torch.int32),), {}),
        "npu_weight_quant_batchmatmul": ((x, _meta(32, 64, dtype=torch.int8).t(), _meta(32)), {}),
    }
    assert set(calls) == set(npu_meta.SHAPES)
    assert set(calls) - set(meta) == {"npu_convert_weight_to_int4pack"}
    for name, (args, kwargs) in calls.items():
        if name not in meta:
            continue
        ours, theirs = npu_meta.SHAPES[name](*args, **kwargs), meta[name](*args, **kwargs)
        assert [(t.shape, t.dtype) for t in _flat(ours)] == [(t.shape, t.dtype) for t in _flat(theirs)], name


def _meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _flat(out) -> list[torch.Tensor]:
    return list(out) if isinstance(out, (tuple, list)) else [out]


def test_the_schemas_of_both_releases_take_our_calls():
    """The operators that ops/npu calls have one schema in both, which is also the shipped registry's."""
    new, old = (wheel.contract(release).schemas for release in wheel.RELEASES)
    assert all(new[name] == old[name] for name in npu_meta.SHAPES)
    registry = load().schemas
    for name in npu_meta.SHAPES:
        assert torch._C.parse_schema(f"npu::{new[name]}") == torch._C.parse_schema(f"npu::{registry[name]}")
    assert old["npu_fused_infer_attention_score.out"].endswith("Tensor[] out) -> (Tensor, Tensor)")


# ---- what must not pass


WRONG = {
    "norm weight": lambda: ops.rms_norm(_npu(2, 64), _npu(32), 1e-5),
    "norm of unlike rows": lambda: ops.add_rms_norm(_npu(2, 64), _npu(1, 64), _npu(64), 1e-5),
    "unlike halves": lambda: ops.swiglu(_npu(2, 8), _npu(2, 7)),
    "too few angles": lambda: ops.rotary(_npu(3, 2, 8), _npu(3, 1, 8), _npu(2, 4), _npu(2, 4)),
    "inputs of w8": lambda: ops.linear_w8(_npu(2, 33), _npu(4, 32).to(torch.int8), _npu(4).float()),
    "scales of w8": lambda: ops.linear_w8(_npu(2, 32), _npu(4, 32).to(torch.int8), _npu(5).float(), act="int8"),
    "scales of w4": lambda: ops.linear_w4(_npu(2, 64), _npu(4, 8).to(torch.int32), _npu(4, 3), 32),
    "heads of pages": lambda: ops.kv_write(_npu(1, 2, 8), _npu(1, 2, 8), _npu(3, 4, 1, 8), _npu(3, 4, 1, 8), _slots(1)),
    "slots": lambda: ops.kv_write(_npu(2, 1, 8), _npu(2, 1, 8), _npu(3, 4, 1, 8), _npu(3, 4, 1, 8), _slots(1)),
}


def _npu(*shape: int) -> torch.Tensor:
    return NpuTensor(torch.ones(*shape, dtype=BF16))


def _slots(count: int) -> torch.Tensor:
    return NpuTensor(torch.arange(count))


@pytest.mark.parametrize("wrong", WRONG)
def test_our_checks_refuse_what_meta_kernels_let_pass(wrong):
    with machine(), pytest.raises(ValueError, match="npu: "):
        WRONG[wrong]()


def test_the_device_refuses_what_an_npu_does_not_do():
    with machine():
        x = torch.ones(4, 8, device="npu:0", dtype=BF16)
        for wrong in (
            lambda: x.double(),
            lambda: torch.ones(3, device="npu:0", dtype=torch.float64),
            lambda: x + torch.ones(4, 8, dtype=BF16),
            lambda: torch._int_mm(x.to(torch.int8), x.to(torch.int8).t()),
            lambda: torch.ops.npu.npu_fast_gelu(x),
        ):
            with pytest.raises(NpuError):
                wrong()
        with pytest.raises(RefusedByCann, match="gamma"):
            torch.ops.npu.npu_add_rms_norm(x, x, torch.ones(8, device="npu:0"))
        with pytest.raises((RuntimeError, TypeError), match="npu_rms_norm"):
            torch.ops.npu.npu_rms_norm(x, gamma=1.0)
    assert "npu_rms_norm" not in dir(torch.ops.npu)


@pytest.mark.parametrize("dim", (64, 128, 256))
@pytest.mark.parametrize("change", PLANTS, ids=lambda change: change.__name__)
def test_a_planted_mistake_in_the_attention_call_is_caught(monkeypatch, change, dim):
    """The comparison above fails, or the call is refused, on at least one of this head dim's samples."""
    plant(monkeypatch, change)
    caught = []
    with machine():
        for sample in PAGED:
            if not sample.name.startswith(f"{dim} "):
                continue
            call = sample.make(BF16, torch.device("cpu"), torch.Generator().manual_seed(0))
            right = REGISTRY["paged_attention"].reference(**call)
            try:
                out = on_host(ops.paged_attention(**{k: on_npu(v) for k, v in call.items()}))
            except (RefusedByCann, ValueError) as refusal:
                caught.append((sample.name, str(refusal)))
                continue
            if not torch.allclose(out.float(), right.float(), atol=3e-2, rtol=3e-2):
                caught.append((sample.name, "wrong numbers"))
    assert caught


def test_every_operator_that_the_emulator_answers_exists_in_the_wheel():
    schemas = wheel.contract(wheel.RELEASES[0]).schemas
    assert set(KERNELS) <= set(schemas)


def test_every_npu_operator_in_the_sources_has_a_kernel_in_both_releases():
    rows = report.rows()
    assert len(rows) >= 12
    for row in rows:
        assert row.status is Status.FUSED and row.emulated and row.same, row
    without_meta = {row.operator.removeprefix("npu::") for row in rows if not row.meta}
    assert without_meta == {
        "_npu_fused_infer_attention_score_get_max_workspace",
        "npu_convert_weight_to_int4pack",
        "npu_fused_infer_attention_score.out",
    }
