"""The C++ delta rule and convolution of a gated delta net: a prompt in any chunks, down to single tokens, and beside
any neighbours leaves the same bits in results and states, for slices of the state that are whole, cut, or both."""

from __future__ import annotations

import pytest
import torch

from surefoot import ops
from surefoot.ops import cpu
from surefoot.ops.samples import starts

pytestmark = pytest.mark.skipif(cpu.kernels is None, reason="the C++ kernels are not built here")
CUTS = [(0, 1), (1, 2), (2, 4), (4, 40), (40, 70)]


@pytest.fixture(params=cpu.kernels.isas() if cpu.kernels else [])
def isa(request):
    before = cpu.kernels.isa()
    cpu.kernels.set_isa(request.param)
    yield request.param
    cpu.kernels.set_isa(before)


def randn(*shape, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def delta(rows: dict, state: torch.Tensor, slots: list[int], lens: list[int]) -> torch.Tensor:
    where = torch.tensor(slots)
    if lens == [1] * len(lens):
        return ops.gated_delta_step(**rows, state=state, slots=where)
    begins = torch.tensor(starts(lens), dtype=torch.int32)
    return ops.gated_delta_chunk(**rows, state=state, slots=where, query_start_loc=begins, query_lens_host=lens)


def conv(rows: dict, state: torch.Tensor, slots: list[int], lens: list[int]) -> torch.Tensor:
    where, (taps, channels) = torch.tensor(slots), (state.shape[2] + 1, state.shape[1])
    weight, bias = randn(channels, taps, seed=7).to(state.dtype), randn(channels, seed=8).to(state.dtype)
    if lens == [1] * len(lens):
        return ops.causal_conv_step(rows["x"], weight, bias, state, where)
    begins = torch.tensor(starts(lens), dtype=torch.int32)
    return ops.causal_conv(rows["x"], weight, bias, state, where, begins, lens)


def delta_case(dv: int, dtype: torch.dtype):
    q, k, v = (randn(70, h, d, seed=i).to(dtype) for i, (h, d) in enumerate(((2, 128), (2, 128), (4, dv))))
    g, beta = -randn(70, 4, seed=4).abs(), randn(70, 4, seed=5).sigmoid()
    return delta, {"q": q, "k": k, "v": v, "g": g, "beta": beta}, randn(4, 4, 128, dv, seed=6)


def conv_case(taps: int, channels: int, dtype: torch.dtype):
    return conv, {"x": randn(70, channels, seed=1).to(dtype)}, randn(4, channels, taps - 1, seed=2).to(dtype)


CASES = {
    "delta, whole slices": delta_case(128, torch.bfloat16),
    "delta, a whole slice and a cut one": delta_case(72, torch.bfloat16),
    "delta, cut slices, fp32": delta_case(20, torch.float32),
    "conv of 4": conv_case(4, 300, torch.bfloat16),
    "conv of 4, fp16, few channels": conv_case(4, 7, torch.float16),
    "conv of 2": conv_case(2, 129, torch.float32),
    "conv of 8": conv_case(8, 48, torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES)
def test_any_chunks_and_neighbours_leave_the_same_bits(isa, case):
    op, rows, state = CASES[case]
    whole, parts, beside = state.clone(), state.clone(), state.clone()
    expected = op(rows, whole, [2], [70])
    got = [op({k: x[a:b] for k, x in rows.items()}, parts, [2], [b - a]) for a, b in CUTS]
    assert torch.equal(torch.cat(got), expected) and torch.equal(parts, whole)
    twice = {k: torch.cat((x[:3], x, x[:1])) for k, x in rows.items()}
    assert torch.equal(op(twice, beside, [1, 2, 3], [3, 70, 1])[3:73], expected)
    assert torch.equal(beside[2], whole[2]) and torch.equal(beside[0], state[0])


@pytest.mark.parametrize("case", CASES)
def test_decoded_alone_and_together_are_the_same_bits(isa, case):
    op, rows, state = CASES[case]
    alone, together = state.clone(), state.clone()
    three = {k: x[:3] for k, x in rows.items()}
    expected = op(three, together, [3, 1, 2], [1, 1, 1])
    got = [op({k: x[i : i + 1] for k, x in rows.items()}, alone, [slot], [1]) for i, slot in enumerate((3, 1, 2))]
    assert torch.equal(torch.cat(got), expected) and torch.equal(alone, together)


@pytest.mark.parametrize("case", CASES)
def test_a_request_without_tokens_keeps_its_state(isa, case):
    op, rows, state = CASES[case]
    after = state.clone()
    op({k: x[:2] for k, x in rows.items()}, after, [1, 2, 3], [0, 2, 0])
    assert torch.equal(after[[0, 1, 3]], state[[0, 1, 3]]) and not torch.equal(after[2], state[2])
