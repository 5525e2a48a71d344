"""Sampling against a plain numpy oracle, transformers' logits processors, and its own promises of independence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from surefoot.core.errors import InputError
from surefoot.core.request import Request
from surefoot.core.sampling import SamplingParams
from surefoot.engine import sampler
from surefoot.engine.sampler import SampledTokens, build, sample, token_logprobs, unpack
from surefoot.engine.sampling_batch import SamplingBatch, uniform

V = 500


def request(prompt=(1,), output=(), eos=(), **params) -> Request:
    params.setdefault("seed", 0)
    return Request("r", list(prompt), SamplingParams(**params), frozenset(eos), output_token_ids=list(output))


def run(logits: torch.Tensor, *rows: Request) -> SampledTokens:
    return sample(logits, build(rows, logits.shape[-1], "cpu"))


def random_logits(n: int, v: int = V, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed)) * scale


def oracle(logits: np.ndarray, temperature=1.0, min_p=0.0, top_k=0, top_p=1.0) -> np.ndarray:
    """Probabilities after the filters, in fp64, one step after the other, by sorting."""
    x = logits.astype(np.float64) / temperature
    p = np.exp(x - x.max())
    p[p < min_p] = 0
    order = np.argsort(-p, kind="stable")
    if top_k > 0:
        p[order[top_k:]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    return p / p.sum()


def weights_after_filters(monkeypatch, logits: torch.Tensor, *rows: Request) -> torch.Tensor:
    """The weights [N, V] that the draw sees; all rows must be of one kind, so that they are drawn together."""
    seen = []
    pick = sampler._pick
    monkeypatch.setattr(sampler, "_pick", lambda w, u: seen.append(w.clone()) or pick(w, u))
    run(logits, *rows)
    (weights,) = seen
    return weights


FILTERS = [
    {"temperature": 0.7},
    {"temperature": 1.5, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1},
    {"temperature": 2.0, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 3.0, "top_k": 1100},
    {"temperature": 3.0, "top_k": 1100, "top_p": 0.9},
]
names = [",".join(f"{k}={v}" for k, v in f.items()) for f in FILTERS]


@pytest.mark.parametrize("params", FILTERS, ids=names)
def test_filters_equal_the_oracle(params: dict, monkeypatch) -> None:
    logits = random_logits(3, v=2000)
    weights = weights_after_filters(monkeypatch, logits, *[request(**params)] * 3)
    for row, w in zip(logits.numpy(), weights.double().numpy()):
        np.testing.assert_allclose(w / w.sum(), oracle(row, **params), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("params", FILTERS, ids=names)
def test_draws_follow_the_distribution(params: dict) -> None:
    """Chi-square over 8,000 draws of one row. The seeds are fixed, so that the outcome is too."""
    n, v = 8000, 1200 if params.get("top_k", 0) > 1000 else 40
    logits = random_logits(1, v=v, seed=3)
    expected = oracle(logits[0].numpy(), **params) * n
    tokens = run(logits.expand(n, v), *[request(**{**params, "seed": s}) for s in range(n)]).token_ids
    counts = np.bincount(tokens.numpy(), minlength=v)
    assert not counts[expected == 0].any(), "a token that was filtered out has been drawn"
    common = expected >= 5
    chi2 = ((counts - expected)[common] ** 2 / expected[common]).sum()
    rest, rest_expected = counts[~common].sum(), expected[~common].sum()
    if rest_expected > 5:
        chi2 += (rest - rest_expected) ** 2 / rest_expected
    freedom = common.sum() - 1 + (rest_expected > 5)
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom) + 4, f"chi2 {chi2:.1f} at {freedom} degrees of freedom"


@pytest.mark.parametrize("params", FILTERS, ids=names)
def test_filters_equal_transformers(params: dict, monkeypatch) -> None:
    from transformers.generation import logits_process as hf

    logits = random_logits(4, v=2000, seed=5)
    scores = hf.TemperatureLogitsWarper(params["temperature"])(None, logits)
    if "min_p" in params:
        scores = hf.MinPLogitsWarper(params["min_p"])(None, scores)
    if "top_k" in params:
        scores = hf.TopKLogitsWarper(params["top_k"])(None, scores)
    if "top_p" in params:
        scores = hf.TopPLogitsWarper(params["top_p"])(None, scores)
    weights = weights_after_filters(monkeypatch, logits, *[request(**params)] * 4)
    torch.testing.assert_close(weights / weights.sum(-1, keepdim=True), scores.softmax(-1), rtol=2e-5, atol=1e-9)


def test_repetition_penalty_equals_transformers() -> None:
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    logits = random_logits(1)
    prompt, output = [3, 3, 9, 100], [9, 9, 250, 3]
    edits = build([request(prompt, output, repetition_penalty=1.3)], V, "cpu").edits
    assert edits is not None
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + output]), logits.clone())
    torch.testing.assert_close(sampler._edit(logits, edits), expected)


def test_penalties_bias_and_bans_follow_the_formula() -> None:
    """Several rows, also one without edits; repeated tokens count; the caller's logits stay as they were."""
    logits = random_logits(3)
    rows = [
        request([5], [6, 6, 6, 7], presence_penalty=0.5, frequency_penalty=0.25, logit_bias={6: -3.0, 11: 100.0}),
        request([5], [6]),
        request([5], [5], eos=[2, 10**6], repetition_penalty=2.0, min_tokens=3, stop_token_ids=(4,), max_tokens=9),
    ]
    expected = logits.double()
    expected[0, 6] += -0.5 - 3 * 0.25 - 3.0
    expected[0, 7] += -0.5 - 0.25
    expected[0, 11] += 100.0
    expected[2, 5] = expected[2, 5] / 2 if expected[2, 5] > 0 else expected[2, 5] * 2
    expected[2, [2, 4]] = -torch.inf
    before = logits.clone()
    edits = build(rows, V, "cpu").edits
    assert edits is not None
    torch.testing.assert_close(sampler._edit(logits, edits).double(), expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(run(logits, *rows).token_ids, expected.argmax(-1))
    assert torch.equal(logits, before)


def test_penalties_step_by_step_equal_penalties_at_once() -> None:
    """The table that grows with the output gives what a table made from the whole output gives."""
    params = {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1, "logit_bias": {8: 1.0}}
    growing, logits = request([3, 4], **params), random_logits(1)
    for token in [8, 8, 3, 499, 8]:
        growing.output_token_ids.append(token)
        fresh = request([3, 4], growing.output_token_ids, **params)
        one, other = (build([r], V, "cpu").edits for r in (growing, fresh))
        assert one is not None and other is not None
        assert torch.equal(sampler._edit(logits, one), sampler._edit(logits, other))


def test_min_tokens_ends_and_ignore_eos_needs_no_ban() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 2], logits[0, 7] = 5.0, 4.0
    params = {"min_tokens": 2, "max_tokens": 9, "eos": [2]}
    assert run(logits, request(output=[1], **params)).token_ids.tolist() == [7]
    assert run(logits, request(output=[1, 1], **params)).token_ids.tolist() == [2]
    assert run(logits, request(output=[1], ignore_eos=True, **params)).token_ids.tolist() == [2]


def test_logit_bias_of_100_forces_and_forbids() -> None:
    logits = random_logits(1, scale=3.0)
    best = int(logits.argmax())
    sampled = {"temperature": 1.0, "top_k": 50}
    for extra in ({}, sampled):
        tokens = [
            int(run(logits, request(logit_bias={42: 100.0}, **{**extra, "seed": s})).token_ids) for s in range(20)
        ]
        assert set(tokens) == {42}
        tokens = [
            int(run(logits, request(logit_bias={best: -100.0}, **{**extra, "seed": s})).token_ids) for s in range(20)
        ]
        assert best not in tokens


def test_greedy_ignores_filters_and_costs_nothing() -> None:
    logits = random_logits(2).bfloat16()
    rows = [request(), request(top_k=3, top_p=0.1, min_p=0.5, seed=4)]
    assert build(rows, V, "cpu") == SamplingBatch(num_rows=2)
    logits[0, [400, 30, 77]] = 50.0
    tokens = run(logits, *rows).token_ids
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [30, int(logits[1].float().numpy().argmax())], "of equal logits the lowest id"


def test_draws_depend_on_seed_and_index_only() -> None:
    """Same row and seed alone, among neighbours of other kinds, and elsewhere in the batch; another index differs."""
    logits = random_logits(6, seed=8).bfloat16()  # bf16 has many equal logits
    kinds = [
        {"top_k": 5},
        {"top_k": 200, "top_p": 0.9},
        {"top_p": 0.7},
        {"min_p": 0.05},
        {},
        {"top_k": 5, "top_p": 0.5},
    ]
    alone = []
    for i, kind in enumerate(kinds):
        rows = [request(output=[1] * n, seed=100 + i, temperature=1.3, **kind) for n in range(40)]
        alone.append([int(run(logits[i : i + 1], r).token_ids) for r in rows])
        assert len(set(alone[-1])) > 1, "the index of the output token must matter"
    for n in range(40):
        rows = [request(output=[1] * n, seed=100 + i, temperature=1.3, **kind) for i, kind in enumerate(kinds)]
        order = [(i + n) % 6 for i in range(6)]
        together = run(logits[order], *[rows[i] for i in order]).token_ids.tolist()
        assert together == [alone[i][n] for i in order]


def test_greedy_and_random_rows_share_a_batch() -> None:
    logits = random_logits(3)
    rows = [request(), request(temperature=1.0, top_k=1), request(temperature=1.0, top_p=1e-60)]
    assert torch.equal(run(logits, *rows).token_ids, logits.argmax(-1))


@pytest.mark.parametrize("top_k", [50, 1100])
def test_a_neighbour_with_top_p_takes_nothing_from_a_row_without(top_k: int, monkeypatch) -> None:
    """Its least likely tokens weigh less than the rounding of the sum, and are kept all the same."""
    logits = random_logits(2, v=2000, scale=8.0)
    rows = [request(temperature=1.0, top_k=top_k), request(temperature=1.0, top_k=top_k, top_p=0.5)]
    weights = weights_after_filters(monkeypatch, logits, *rows)
    assert (weights > 0).sum(-1)[0] == top_k and (weights > 0).sum(-1)[1] < top_k


def test_without_seed_requests_differ_and_each_keeps_its_own() -> None:
    logits = torch.zeros(8, 10_000)
    rows = [request(seed=None, temperature=1.0) for _ in range(8)]
    first = run(logits, *rows).token_ids
    assert len(set(first.tolist())) > 1
    assert torch.equal(first, run(logits, *rows).token_ids)


def test_equal_logits_are_kept_together() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0, -1.0]])
    for params in ({"top_k": 2}, {"top_p": 0.4}, {"min_p": 1.0}):
        drawn = {int(run(logits, request(temperature=1.0, **{**params, "seed": s})).token_ids) for s in range(60)}
        assert drawn == {1, 2, 4}


def test_uniform_is_exact_in_fp32_and_below_one() -> None:
    values = [uniform(seed, index) for seed in (0, -1, 2**70) for index in range(2000)]
    assert all(0 <= u < 1 and float(np.float32(u)) == u for u in values)
    assert abs(np.mean(values) - 0.5) < 0.02 and len(set(values)) > 5900


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
def test_no_token_of_probability_zero_is_picked(u: float, monkeypatch) -> None:
    """Also where the rounding of a parallel scan makes the running sum fall now and then (here: grossly)."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(4, 100_000, generator=generator) * 1e-3
    weights[:, ::2] = 0.0
    weights[:, -3:] = 0.0
    exact = torch.Tensor.cumsum
    wobble = 1 + 1e-3 * torch.rand(weights.shape, generator=generator)
    for cumsum in (exact, lambda x, dim: exact(x, dim) * wobble):
        monkeypatch.setattr(torch.Tensor, "cumsum", cumsum)
        ids = sampler._pick(weights, torch.full((4, 1), u))
        assert (weights.gather(-1, ids.unsqueeze(-1)) > 0).all()
        assert (abs(ids - u * 100_000) < 1000).all()


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 4, "top_p": 0.9}, {"temperature": 1e-40, "top_p": 0.5}],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinite_logits(params: dict, dtype: torch.dtype) -> None:
    logits = random_logits(5, seed=2).to(dtype)
    logits[0, 17] = torch.nan
    logits[1, 18] = torch.inf
    logits[2, :] = -torch.inf
    logits[3, :] = -torch.inf
    logits[3, 19] = -50.0
    tokens = run(logits, *[request(**{"logprobs": 2, **params}) for _ in range(5)])
    assert tokens.token_ids.tolist()[:4] == [-1, 18, -1, 19]
    assert tokens.token_ids[4] >= 0
    assert tokens.logprobs is not None and tokens.logprobs[[1, 3]].tolist() == [0.0, 0.0]


def test_reported_logprobs_are_raw() -> None:
    logits = random_logits(3)
    rows = [request(logprobs=3, logit_bias={1: 100.0}, temperature=0.5), request(), request(logprobs=0)]
    out = run(logits, *rows)
    packed = out.pack().numpy()
    result = unpack(packed, [r.params.logprobs for r in rows])
    raw = logits.log_softmax(-1)
    (t0, lp0), (t1, lp1), (t2, lp2) = result
    assert [t0, t1, t2] == out.token_ids.tolist() and t0 == 1 and lp1 is None
    assert lp0 is not None and lp2 is not None
    assert lp0.logprob == pytest.approx(float(raw[0, 1]), abs=1e-5)
    assert lp0.rank == int((raw[0] > raw[0, 1]).sum()) + 1
    assert [i for i, _ in lp0.top] == raw[0].topk(3).indices.tolist()
    assert [v for _, v in lp0.top] == pytest.approx(raw[0].topk(3).values.tolist(), abs=1e-5)
    assert (lp2.rank, lp2.top, lp2.token_id) == (1, (), t2)


def test_pack_without_logprobs() -> None:
    packed = SampledTokens(torch.tensor([3, -1, 248_319])).pack()
    assert unpack(packed.numpy(), [None] * 3) == [(3, None), (-1, None), (248_319, None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logprobs_in_slices(dtype: torch.dtype, monkeypatch) -> None:
    logits = random_logits(11, seed=4).to(dtype)
    targets = torch.randint(V, (11,), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(sampler, "SLICE_BYTES", 3 * sampler.BYTES_PER_LOGIT * V)
    found = token_logprobs(logits, targets, 5)
    raw = logits.double().log_softmax(-1)
    at_target = raw.gather(-1, targets[:, None])
    torch.testing.assert_close(found.logprobs.double(), at_target[:, 0], rtol=0, atol=1e-5)
    assert torch.equal(found.ranks, (raw > at_target).sum(-1) + 1)
    best = torch.sort(raw, dim=-1, descending=True, stable=True)
    assert torch.equal(found.top_ids, best.indices[:, :5]), "among equals the lower id first"
    torch.testing.assert_close(found.top_logprobs.double(), best.values[:, :5], rtol=0, atol=1e-5)
    assert token_logprobs(logits, targets, 0).top_ids.shape == (11, 0)
    assert token_logprobs(logits, targets, 10**6).top_ids.shape == (11, V)
    assert token_logprobs(logits[:0], targets[:0], 2).logprobs.shape == (0,)


def test_top_orders_zeros_of_both_signs_by_id() -> None:
    x = torch.tensor([[-1.0, 0.0, -0.0, 0.0, -torch.inf, torch.inf, -0.0]])
    assert sampler._top(x, 7)[1].tolist() == [[5, 1, 2, 3, 6, 0, 4]]


def test_ids_outside_the_vocabulary_are_refused() -> None:
    sampler.check_token_ids(SamplingParams(logit_bias={V - 1: 1.0}, stop_token_ids=(0,)), V)
    for params in (SamplingParams(logit_bias={V: 1.0}), SamplingParams(stop_token_ids=(V,))):
        with pytest.raises(InputError, match=f"token {V}"):
            sampler.check_token_ids(params, V)


def test_no_batch_and_vocabulary_smaller_than_top_k() -> None:
    assert run(torch.zeros(0, V)).token_ids.shape == (0,)
    drawn = {int(run(torch.zeros(1, 3), request(temperature=1.0, top_k=50, seed=s)).token_ids) for s in range(40)}
    assert drawn == {0, 1, 2}


def test_plain_parameters_are_those_for_which_nothing_is_built():
    """A captured step takes its own greedy choice for them and asks no further."""
    assert SamplingParams(max_tokens=3, stop=("x",), prompt_logprobs=1, ignore_eos=True, seed=7).plain
    others = [
        {"temperature": 0.5},
        {"logprobs": 0},
        {"repetition_penalty": 1.1},
        {"presence_penalty": -1.0},
        {"frequency_penalty": 0.5},
        {"logit_bias": {3: 1.0}},
        {"min_tokens": 2, "stop_token_ids": (3,)},
    ]
    for params in others:
        assert not SamplingParams(**params).plain, params
        assert not build([request(output=(5,), **params)], V, "cpu").plain, params
    assert build([request()], V, "cpu").plain
