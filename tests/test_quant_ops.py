"""Quantised linear layers: rounding and packing, both activation kinds, extremes, batch invariance."""

from __future__ import annotations

import pytest
import torch

from surefoot import ops
from surefoot.core.errors import InputError
from surefoot.ops import cpu
from surefoot.ops.quant import dequantise_int4, pack_int4, panels_of, quantise_tokens, rows_of, unpack_int4
from surefoot.ops.spec import REGISTRY
from surefoot.quant.schemes import SCHEMES, dequantise_int8, quantise_int4, quantise_int8, scheme

ISAS = cpu.kernels.isas() if cpu.kernels else ["pytorch"]


@pytest.fixture(params=ISAS)
def isa(request):
    if cpu.kernels is None:
        yield request.param
        return
    before = cpu.kernels.isa()
    cpu.kernels.set_isa(request.param)
    yield request.param
    cpu.kernels.set_isa(before)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_int4_packing_is_that_of_compressed_tensors():
    q = torch.tensor([[-8, -7, -1, 0, 1, 2, 3, 7] + [0] * 8])
    packed = pack_int4(q)
    assert packed.dtype == torch.int32 and packed.shape == (1, 2)
    # Element j in bits 4j ... 4j + 3, plus 8.
    word = sum((int(v) + 8) << (4 * j) for j, v in enumerate(q[0, :8]))
    assert packed[0, 0].item() & 0xFFFFFFFF == word
    assert torch.equal(unpack_int4(packed), q.to(torch.int8))


def test_int4_round_trip_of_every_value():
    q = torch.randint(-8, 8, (16, 64), generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_int4(pack_int4(q)), q.to(torch.int8))


def test_rounding_error_is_within_a_step():
    w = randn(32, 256)
    q, scale = quantise_int8(w)
    assert q.abs().max() == 127
    assert ((dequantise_int8(q, scale) - w).abs() <= 0.5001 * scale.unsqueeze(-1)).all()
    packed, scale4 = quantise_int4(w, 32, torch.float32)
    steps = scale4.repeat_interleave(32, dim=1)
    # What lies above 7.5 steps, where a finer scale was the better choice, is cut to 7.
    assert ((dequantise_int4(packed, scale4) - w).abs() <= torch.where(w > 7.5 * steps, 1.0001, 0.5001) * steps).all()
    assert scale4.shape == (32, 8)


def test_all_zero_channels_stay_zero():
    w = torch.zeros(3, 64)
    q, scale = quantise_int8(w)
    assert (dequantise_int8(q, scale) == 0).all()
    assert (dequantise_int4(*quantise_int4(w)) == 0).all()


def test_bad_requests_are_one_clear_line():
    with pytest.raises(InputError, match="unknown quantisation scheme 'w3'.*w8a16"):
        scheme("w3")
    with pytest.raises(InputError, match="groups of 32 do not divide a weight of 40"):
        quantise_int4(torch.ones(2, 40))
    assert scheme("w4a16") is SCHEMES["w4a16"] and SCHEMES["w4a16"].bits_per_weight == 4.5


def calls(rows=9, inner=512, outer=40):
    x, w = randn(rows, inner), randn(outer, inner, seed=1) * inner**-0.5
    q, scale = quantise_int8(w)
    packed, scale4 = quantise_int4(w, 32)
    return (
        x,
        w,
        {
            "w8a16": lambda x: ops.linear_w8(x, q, scale),
            "w8a8": lambda x: ops.linear_w8(x, q, scale, act="int8"),
            "w4a16": lambda x: ops.linear_w4(x, packed, scale4, 32),
            "w4a8": lambda x: ops.linear_w4(x, packed, scale4, 32, act="int8"),
        },
    )


@pytest.mark.parametrize(
    "name,weights,activations",
    [("w8a16", 0.01, 1e-4), ("w8a8", 0.02, 0.02), ("w4a16", 0.2, 1e-4), ("w4a8", 0.2, 0.02)],
)
def test_distance_from_the_full_precision_product(isa, name, weights, activations):
    """Two errors: of the weights, against the original; of the activations, against the same rounded weights."""
    x, w, by = calls(inner=2048)
    y, exact = by[name](x), x @ w.t()
    assert (y - exact).norm() <= weights * exact.norm()
    with ops.use("reference"):
        rounded = calls(inner=2048)[2][name.replace("a8", "a16")](x)
    assert (y - rounded).norm() <= activations * rounded.norm()


@pytest.mark.parametrize("name", ["w8a16", "w8a8", "w4a16", "w4a8"])
@pytest.mark.parametrize("inner", [512, 2048, 96, 8192])
def test_a_token_is_bitwise_the_same_in_any_batch(isa, name, inner):
    x, _, by = calls(131, inner)
    x[3] *= 1e4  # a loud neighbour
    if cpu.kernels is None:
        pytest.skip("PyTorch's products depend on the batch")
    alone = torch.cat([by[name](row) for row in x.split(1)])
    for rows in (2, 5, 8, 13, 47, 48, 64, 70, 131):
        assert torch.equal(by[name](x[:rows]), alone[:rows]), rows


@pytest.mark.parametrize("name", ["w8a16", "w8a8", "w4a16", "w4a8"])
def test_nan_and_infinity_stay_in_their_row_and_are_never_hidden(isa, name):
    x, _, by = calls(5)
    x[1, 7], x[2, 300], x[3] = torch.nan, -torch.inf, 0.0
    y = by[name](x)
    assert not y[1].isfinite().any() and not y[2].isfinite().any()
    assert (y[3] == 0).all() and y[0].isfinite().all() and y[4].isfinite().all()


@pytest.mark.parametrize("inner", [64, 2048, 8192, 65536])
@pytest.mark.parametrize("act", ["int8", "float"])
def test_nothing_saturates_at_the_extremes(isa, inner, act):
    """All weights and activations at the end of their range, the sum as large as it gets: exact in integers."""
    for sign in (1.0, -1.0):
        x, q = torch.full((2, inner), 3.0), torch.full((5, inner), 127 * sign).to(torch.int8)
        y = ops.linear_w8(x, q, torch.ones(5), act=act)
        torch.testing.assert_close(y, torch.full((2, 5), 3.0 * 127 * sign * inner), rtol=1e-6, atol=0)
    packed = torch.zeros(3, inner // 8, dtype=torch.int32)  # every weight is -8
    y = ops.linear_w4(torch.full((2, inner), 3.0), packed, torch.ones(3, inner // 32), 32, act=act)
    torch.testing.assert_close(y, torch.full((2, 3), -24.0 * inner), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [47, 48, 53, 97])
@pytest.mark.parametrize("inner,outer", [(96, 33), (130, 7), (64, 96), (1, 1), (300, 65)])
def test_many_tokens_in_every_shape(isa, rows, inner, outer):
    """Packed panels of weights: channels, tokens and inputs that fill none of them, and a bias."""
    x, (q, scale), bias = randn(rows, inner), quantise_int8(randn(outer, inner, seed=1)), randn(outer, seed=2)
    got = ops.linear_w8(x, q, scale, bias, "int8")
    with ops.use("reference"):
        torch.testing.assert_close(got, ops.linear_w8(x, q, scale, bias, "int8"), rtol=1e-6, atol=1e-6)
    one_by_one = torch.cat([ops.linear_w8(row, q, scale, bias, "int8") for row in x.split(1)])
    if cpu.kernels is not None:
        assert torch.equal(got, one_by_one)


def test_int8_minus_128_is_taken(isa):
    """Other tools store it; ours stops at -127."""
    x, q = randn(3, 256), torch.full((2, 256), -128, dtype=torch.int8)
    torch.testing.assert_close(
        ops.linear_w8(x, q, torch.ones(2)), (x.sum(-1, keepdim=True) * -128).expand(3, 2), atol=0.1, rtol=1e-3
    )
    q8, scale = quantise_tokens(x)
    expected = (q8 @ q.float().t()) * scale
    torch.testing.assert_close(ops.linear_w8(x, q, torch.ones(2), act="int8"), expected, atol=1e-3, rtol=1e-5)


def test_w8a8_is_the_reference_to_the_last_bit_of_fp32(isa):
    """The same integers and the same fp32 operations in the same order."""
    x, _, by = calls(17, 2048, 64)
    y = by["w8a8"](x)
    with ops.use("reference"):
        torch.testing.assert_close(y, by["w8a8"](x), rtol=3e-7, atol=0)


def test_tiny_and_huge_activations(isa):
    x, _, by = calls(4)
    for name, call in by.items():
        for factor in (1e-30, 1e30):
            y, expected = call(x * factor), call(x) * factor
            torch.testing.assert_close(y, expected, rtol=2e-3, atol=2e-3 * factor, msg=f"{name} {factor}")
        # Where the reciprocal of a token's scale overflows, the token may count as zero but not as NaN.
        assert (call(x * 1e-38).abs() < 1e-37).all()


@pytest.mark.skipif(cpu.kernels is None, reason="the C++ kernels are not built here")
@pytest.mark.parametrize("act", ["int8", "float"])
@pytest.mark.parametrize("inner", [96, 384, 2048, 8192])
def test_panels_give_the_bits_of_rows(isa, inner, act):
    """One, few and many tokens; a single panel and an odd number of them; every dtype of group scales."""
    generator = torch.Generator().manual_seed(inner)
    for outer in (16, 48):
        q = torch.randint(-127, 128, (outer, inner), generator=generator, dtype=torch.int8)
        scale = torch.rand(outer, generator=generator)
        panels = q.clone()
        assert cpu.pack_(panels, scale) and torch.equal(panels, panels_of(q)) and torch.equal(rows_of(panels), q)
        for tokens in (1, 2, 8, 13, 50):
            x = randn(tokens, inner, seed=tokens)
            assert torch.equal(
                ops.linear_w8(x, panels, scale, None, act, "panels"), ops.linear_w8(x, q, scale, None, act)
            )
        for group, dtype in (
            (32, torch.bfloat16),
            (inner // 3 // 8 * 8 if inner == 384 else inner, torch.float16),
            (96, None),
        ):
            if inner % group:
                continue
            packed = pack_int4(torch.randint(-8, 8, (outer, inner), generator=generator))
            scales = torch.rand(outer, inner // group, generator=generator).to(dtype or torch.float32)
            panels, in_panels = packed.clone(), scales.clone()
            assert cpu.pack_(panels, in_panels) and torch.equal(rows_of(in_panels), scales)
            for tokens in (1, 2, 8, 13, 50):
                x = randn(tokens, inner, seed=tokens)
                expected = ops.linear_w4(x, packed, scales, group, None, act)
                assert torch.equal(ops.linear_w4(x, panels, in_panels, group, None, act, "panels"), expected)
                with ops.use("reference"):
                    reference = ops.linear_w4(x, panels, in_panels, group, None, act, "panels")
                torch.testing.assert_close(expected, reference, rtol=1e-3, atol=1e-3 * reference.abs().max().item())


def test_what_does_not_divide_into_panels_stays_in_rows():
    for q in (
        torch.ones(17, 64, dtype=torch.int8),
        torch.ones(16, 66, dtype=torch.int8),
        torch.ones(8, 4, dtype=torch.int32),
    ):
        before = q.clone()
        assert not cpu.pack_(q, torch.ones(len(q), 1)) and torch.equal(q, before)


@pytest.mark.skipif(cpu.kernels is None, reason="the C++ kernels are not built here")
def test_other_group_sizes_fall_back_to_the_reference():
    packed, scale = pack_int4(torch.randint(-8, 8, (8, 24))), torch.rand(8, 2)
    ops.forget_chosen()
    y = ops.linear_w4(randn(2, 24, seed=3), packed, scale, 12)
    assert ops.chosen() == {"linear_w4/cpu": "reference"}
    torch.testing.assert_close(y, randn(2, 24, seed=3) @ dequantise_int4(packed, scale).t())
    assert {"linear_w4", "linear_w8"} <= set(REGISTRY)
