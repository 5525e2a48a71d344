"""Every registered implementation of every op against its reference computed in fp32, on the declared samples."""

from __future__ import annotations

import copy

import pytest
import torch

from surefoot import ops
from surefoot.ops.spec import REGISTRY, Sample

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def cases():
    for spec in REGISTRY.values():
        names = ["reference"] + [i.name for i in spec.candidates("cpu")]
        for sample in spec.samples():
            for name in names:
                for dtype in DTYPES:
                    yield pytest.param(spec, name, sample, dtype, id=f"{spec.name}-{name}-{sample.name}-{dtype}")


def as_float(value):
    return (
        value.float().clone() if isinstance(value, torch.Tensor) and value.is_floating_point() else copy.deepcopy(value)
    )


def outputs(spec, result, call):
    tensors = list(result) if isinstance(result, tuple) else [result]
    return [t for t in tensors + [call[name] for name in spec.mutates] if t is not None]


@pytest.mark.parametrize("spec,name,sample,dtype", list(cases()))
def test_implementation_equals_reference(spec, name, sample: Sample, dtype):
    call = sample.make(dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
    exact = {k: as_float(v) for k, v in call.items()}
    expected = outputs(spec, spec.reference(**exact), exact)
    if name == "reference":
        fn = spec.reference
    else:
        impl = next(i for i in spec.candidates("cpu") if i.name == name)
        if impl.supports is not None and not impl.supports(**call):
            pytest.skip(f"{name} does not take {dtype} here")
        fn = impl.fn
    actual = outputs(spec, fn(**call), call)
    assert len(actual) == len(expected)
    tol = spec.tolerance[dtype]
    for a, e in zip(actual, expected):
        assert a.shape == e.shape
        torch.testing.assert_close(a.float(), e.float(), atol=tol.atol, rtol=tol.rtol)


@pytest.mark.parametrize("spec", list(REGISTRY.values()), ids=list(REGISTRY))
def test_cost_is_positive_and_finite(spec):
    for sample in spec.samples():
        call = sample.make(torch.bfloat16, torch.device("cpu"), torch.Generator().manual_seed(0))
        cost = spec.cost(**call)
        assert 0 <= cost.flops < 1e15
        assert 0 < cost.bytes < 1e13


def test_policy_forces_the_reference_and_logs_it():
    spec = REGISTRY["paged_attention"]
    call = spec.samples()[0].make(torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
    ops.forget_chosen()
    with ops.use("reference"):
        ops.paged_attention(**call)
        assert ops.chosen() == {"paged_attention/cpu": "reference"}
    ops.paged_attention(**call)
    assert ops.chosen()["paged_attention/cpu"] != "reference"


def test_a_planted_error_is_seen():
    """The comparison itself can fail: a norm with the wrong eps on small rows must not pass."""
    x = torch.full((2, 64), 1e-3)
    w = torch.ones(64)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ops.rms_norm(x, w, 1e-6), ops.rms_norm(x, w, 1e-5), atol=1e-5, rtol=1e-5)
