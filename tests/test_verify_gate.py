"""The gate on synthetic numbers whose truth is known: what other tools' rules get wrong must come out right here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from verify_synthetic import (
    GOOD,
    NOISE,
    bhattacharyya,
    failed_tests,
    generator,
    judge_activation,
    judge_logits,
    logit_evidence,
    logits,
    msprobe_accepts,
    noisy,
    null_runs,
)

from surefoot.verify import gate, metrics
from surefoot.verify.judge import tail_limit
from surefoot.verify.pack import pack, pack_index, unpack, unpack_index
from surefoot.verify.summary import batch_means_se, summary

# ---- the cases that msprobe's rule gets wrong


def summed_in_bf16(parts: list[torch.Tensor], order: list[int]) -> torch.Tensor:
    total = torch.zeros_like(parts[0], dtype=torch.bfloat16)
    for i in order:
        total = total + parts[i].bfloat16()
    return total.float()


def test_case_a_massive_activations_rounded_to_bf16_are_right():
    gen = generator(1)
    parts = [torch.randn(256, 384, generator=gen) * 0.3 for _ in range(24)]
    for channel in (7, 200):
        for part in parts:
            part[:, channel] += 3000 / 24 + 20 * torch.randn(256, generator=gen)
    right = torch.stack(parts).double().sum(0).float()
    orders = [torch.randperm(24, generator=gen).tolist() for _ in range(5)]
    run, *nulls = [summed_in_bf16(parts, order) for order in orders]
    assert (run - right).abs().max() > 10
    assert not msprobe_accepts(right, run)
    assert judge_activation(right, run, nulls).status == "pass"


def rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps).float()


def dithered(x: torch.Tensor, seed: int) -> torch.Tensor:
    return x * (1 + 2.0**-9 * (2 * torch.rand(x.shape, generator=generator(seed)) - 1))


@pytest.mark.parametrize("rms", [0.02, 0.005])
def test_case_b_norm_epsilon_ten_times_too_large_is_wrong(rms):
    x = rms * torch.randn(512, 256, generator=generator(2))
    right = rms_norm(x, 1e-6)
    nulls = [rms_norm(dithered(x, i), 1e-6).bfloat16().float() for i in range(4)]
    good, bad = (rms_norm(dithered(x, 9), eps).bfloat16().float() for eps in (1e-6, 1e-5))
    assert msprobe_accepts(right, bad)
    assert judge_activation(right, good, nulls).status == "pass"
    assert judge_activation(right, bad, nulls).status == "fail"


def rotate(x: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    angle = torch.arange(len(x)).float()[:, None] * inv_freq
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def test_case_c_rope_scaling_ignored_at_short_positions_is_wrong():
    from surefoot.layers.rotary import RopeConfig, inverse_frequencies

    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192.0,
    }
    configs = [RopeConfig(64, 8192, 500000.0, kind, scaling=scaling) for kind in ("llama3", "default")]
    scaled, plain = (inverse_frequencies(c, torch.device("cpu")) for c in configs)
    x = torch.randn(128, 64, generator=generator(3))
    right = rotate(x, scaled)
    nulls = [rotate(dithered(x, i), scaled).bfloat16().float() for i in range(4)]
    good, bad = (rotate(dithered(x, 9), f).bfloat16().float() for f in (scaled, plain))
    assert msprobe_accepts(right, bad)
    assert judge_activation(right, good, nulls).status == "pass"
    assert judge_activation(right, bad, nulls).status == "fail"


def test_case_d2_the_last_of_2048_rows_replaced_is_wrong():
    right = 0.1 * torch.randn(2048, 128, generator=generator(4))
    nulls = [dithered(right, i).bfloat16().float() for i in range(4)]
    good = dithered(right, 9).bfloat16().float()
    bad = good.clone()
    bad[-1] = 0.1 * torch.randn(128, generator=generator(5))
    assert msprobe_accepts(right, bad)
    assert judge_activation(right, good, nulls).status == "pass"
    finding = judge_activation(right, bad, nulls)
    assert finding.status == "fail"
    assert "position 2047" in finding.summary


def test_case_e_first_and_second_choice_swapped_is_wrong():
    right = logits(256)
    run = noisy(right, 1)
    top = right.topk(2).indices
    run = run.scatter(1, top, run.gather(1, top).flip(1))
    finding = judge_logits(right, run)
    assert finding.status == "fail"
    assert "flip" in failed_tests(finding)
    assert finding.details["agreement"] < 0.05


def test_case_f_opposite_infinities_are_wrong():
    right = logits(100)
    right[40, 7] = -math.inf
    run = noisy(right, 1)
    assert judge_logits(right, run).status == "pass"
    run[40, 7] = math.inf
    finding = judge_logits(right, run)
    assert finding.status == "fail"
    assert "odd" in failed_tests(finding)
    assert finding.details["non_finite"] == 1
    activation = torch.randn(64, 32, generator=generator(1))
    activation[3, 3] = math.inf
    nulls = [dithered(activation, i) for i in range(4)]
    assert judge_activation(activation, dithered(activation, 9), nulls).status == "pass"
    wrong = dithered(activation, 9)
    wrong[3, 3] = -math.inf
    assert msprobe_accepts(activation, wrong)
    assert judge_activation(activation, wrong, nulls).status == "fail"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_single_non_finite_logit_is_wrong(value):
    right = logits(100)
    run = noisy(right, 1)
    run[99, 3] = value
    assert judge_logits(right, run).status == "fail"


def test_minus_zero_is_counted_and_is_no_error():
    right = logits(100)
    right[5, :10] = 0.0
    run = noisy(right, 1)
    run[5, :10] = -0.0
    finding = judge_logits(right, run)
    assert finding.status == "pass"
    assert finding.details["signed_zeros"] == 10


# ---- the cases that vLLM-Neuron's rule gets wrong


@pytest.mark.parametrize("tokens", [64, 512, 2048])
def test_one_wrong_token_is_wrong(tokens):
    right = logits(tokens, seed=tokens)
    run = noisy(right, 1)
    assert judge_logits(right, run).status == "pass"
    wrong = run.clone()
    wrong[tokens // 3] = logits(1, seed=7)[0]
    if tokens > 64:
        assert bhattacharyya(right, noisy(right, 2), wrong) > 0.99
    finding = judge_logits(right, wrong)
    assert finding.status == "fail"
    assert any(c["position"] == tokens // 3 for c in finding.details["complaints"])


@pytest.mark.parametrize("seed", range(7))
@pytest.mark.parametrize("factor", [1.0, 1.1, 1.3, 2.2])
def test_a_right_device_with_other_noise_is_not_refused(factor, seed):
    right = logits(512, vocab=200, seed=seed)
    assert judge_logits(right, noisy(right, seed + 50, factor * NOISE)).status == "pass"


def test_noise_that_differs_from_token_to_token_is_no_fault():
    """Long right tails: the noise of a token is lognormal, shared by all runs but for a factor of its own."""
    gen = generator(8)
    right = logits(512, vocab=200)
    shared = torch.exp(0.5 * torch.randn(512, 1, generator=gen))

    def draw() -> torch.Tensor:
        own = torch.exp(0.15 * torch.randn(512, 1, generator=gen))
        return right + NOISE * shared * own * torch.randn(right.shape, generator=gen)

    for _ in range(10):
        evidence = {"logits": logit_evidence(right, draw(), [draw() for _ in range(4)])}
        assert gate.examine("logits", evidence)[0].status == "pass"


def test_size_of_the_noise_between_right_and_wrong_is_undecided():
    right = logits(256)
    assert judge_logits(right, noisy(right, 1, 4 * NOISE)).status == "undecided"
    assert judge_logits(right, noisy(right, 1, 8 * NOISE)).status == "fail"
    # A device whose own repeat runs spread twice as much may be off twice as much, but not without end.
    assert judge_logits(right, noisy(right, 1, 4 * NOISE), device=2.0).status == "pass"
    assert judge_logits(right, noisy(right, 1, 30 * NOISE), device=50.0).status == "fail"


@pytest.mark.parametrize("noise", [1.0, 1.3])
def test_one_percent_too_large_is_wrong(noise):
    right = logits(256)
    finding = judge_logits(right, 1.01 * noisy(right, 1, noise * NOISE))
    assert finding.status == "fail"
    assert "gain" in failed_tests(finding)


def test_late_positions_that_are_further_off_are_wrong():
    """No single token stands out from noise this uneven, but the late ones together do."""
    gen = generator(8)
    right = logits(512, vocab=200)

    def draw(late: float = 1.0) -> torch.Tensor:
        own = torch.exp(0.3 * torch.randn(512, 1, generator=gen))
        own[256:] *= late
        return right + NOISE * own * torch.randn(right.shape, generator=gen)

    nulls = [draw() for _ in range(4)]
    assert gate.examine("logits", {"logits": logit_evidence(right, draw(), nulls)})[0].status == "pass"
    (finding,) = gate.examine("logits", {"logits": logit_evidence(right, draw(2.6), nulls)})
    assert finding.status == "fail"
    assert failed_tests(finding) == ["position"]


def test_a_flip_counts_only_beyond_the_noise():
    right = logits(100)
    right[:, 0] = right.amax(-1) + 0.5 * NOISE  # ties within the noise
    right[:, 1] = right[:, 0] - 0.1 * NOISE
    finding = judge_logits(right, noisy(right, 1))
    assert finding.details["agreement"] < 0.9
    assert finding.status == "pass"


def test_few_tokens_decide_nothing():
    right = logits(40)
    assert judge_logits(right, noisy(right, 1)).status == "undecided"


def test_a_reference_with_nan_decides_nothing():
    right = logits(100)
    run = noisy(right, 1)
    right[3, 3] = math.nan
    run[3, 3] = math.nan
    assert judge_logits(right, run).status == "undecided"


# ---- the verdict over all checks


@pytest.fixture(scope="module")
def evidence():
    right = logits(100, vocab=100)
    return GOOD | {"logits": logit_evidence(right, noisy(right, 1), null_runs(right))}


def test_all_good_is_proven(evidence):
    verdict, findings = gate.decide(evidence)
    assert verdict == "proven"
    assert [f.check for f in findings] == list(gate.CHECKS)


BROKEN = {
    "template": {"items": [{"name": "a", "reference": "x", "target": "y", "at": 3, "shows": "'b' instead of 'a'"}]},
    "tokens": {"items": [{"name": "a", "reference": "x", "target": "y", "shows": "2 BOS tokens instead of 1"}]},
    "weights": GOOD["weights"] | {"items": [["w", "1", "2"]]},
    "config": {"items": [{"module": "m", "key": "eps", "reference": 1e-6, "target": 1e-5, "rtol": 1e-5}]},
    "sampler": GOOD["sampler"] | {"items": [{"prompt": 0, "step": 2, "token": 1, "rank": 3}]},
    "parity": {"findings": [{"check": "parity", "status": "fail", "summary": "batched differs", "details": {}}]},
}
ALSO_BROKEN = {
    "missing": ("weights", GOOD["weights"] | {"missing": ["v"]}),
    "unexpected": ("weights", GOOD["weights"] | {"unexpected": ["v"]}),
    "untied": ("weights", GOOD["weights"] | {"tied": [["lm_head", "model.embed_tokens", True, False]]}),
    "eos": ("sampler", GOOD["sampler"] | {"eos": [[2, 9], [2]]}),
    "frequencies": ("config", {"items": [{"module": "r", "key": "f", "reference": [1.0, 0.5], "target": [1.0, 0.4]}]}),
    "forged path": (
        "parity",
        {"findings": [{"check": "parity", "status": "pass", "summary": "", "details": {"path": "p", "ratio": 1.5}}]},
    ),
    "absent": ("config", {"items": [{"module": "r", "key": "heads", "reference": 2, "target": 4}]}),
}


@pytest.mark.parametrize("check, broken", [*BROKEN.items(), *ALSO_BROKEN.values()])
def test_the_first_failure_stops_and_refutes(evidence, check, broken):
    verdict, findings = gate.decide(evidence | {check: broken})
    assert verdict == "refuted"
    status = {f.check: f.status for f in findings}
    order = list(gate.CHECKS)
    assert status[check] == "fail"
    assert all(status[c] in ("pass", "not_possible") for c in order[: order.index(check)])
    assert all(status[c] == "not_reached" for c in order[order.index(check) + 1 :])


def test_without_logits_nothing_is_proven(evidence):
    assert gate.decide(evidence | {"logits": {"not_possible": "the endpoint gives no logprobs"}})[0] == "undecided"
    assert gate.decide({k: v for k, v in evidence.items() if k != "logits"})[0] == "undecided"


# ---- the measures


def test_kl_equals_the_plain_formula_and_survives_fp32_noise():
    right = logits(50).double()
    for size in (1e-6, 0.02, 3.0):
        run = right + size * torch.randn(right.shape, generator=generator(1), dtype=torch.float64)
        p, q = right.softmax(-1), run.log_softmax(-1)
        plain = (p * (right.log_softmax(-1) - q)).sum(-1).numpy()
        found = metrics.logit_rows(right, run)["kl"]
        assert np.allclose(found, plain, rtol=1e-6 if size > 1e-3 else 1e-2)
    assert metrics.logit_rows(right, right + 5.0)["kl"].max() < 1e-25  # softmax ignores a shift


def test_masked_logits_and_a_lost_candidate():
    right = logits(4)
    right[:, :50] = -math.inf
    assert np.isfinite(metrics.logit_rows(right, noisy(right, 1))["kl"]).all()
    lost = right.clone()
    lost[2, right[2].argmax()] = -math.inf
    assert metrics.logit_rows(right, lost)["odd"].tolist() == [0, 0, 1, 0]


def test_standard_error_knows_that_neighbours_are_alike():
    """AR(1) with phi 0.8: the true SE of the mean is 3 times the naive one."""
    rng = np.random.default_rng(0)
    means, errors, naive = [], [], []
    for _ in range(200):
        x, values = 0.0, []
        for e in rng.normal(size=600):
            x = 0.8 * x + e
            values.append(x)
        series = np.array(values)
        means.append(series.mean())
        errors.append(batch_means_se(series, np.zeros(600)))
        naive.append(series.std(ddof=1) / math.sqrt(600))
    assert 0.7 < np.mean(errors) / np.std(means) < 1.1
    assert np.mean(naive) / np.std(means) < 0.5
    assert summary(series, np.zeros(600))["count"] == 600


def test_tail_limit_is_rarely_exceeded_and_not_far():
    """Half-normal values: twice the largest of the nulls, and never below."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        nulls = np.abs(rng.normal(size=(4, 500)))
        limit = tail_limit(nulls)
        assert np.abs(rng.normal(size=500)).max() < limit < 25
        assert limit >= 2 * nulls.max()


@pytest.mark.parametrize("values", [[], [0.0], [1.5, -2.25, math.inf, -math.inf, math.nan, 3e-12, 7e30, 4096.0]])
def test_packed_numbers_come_back(values):
    back = unpack(pack(np.array(values, float)))
    assert np.allclose(back, values, rtol=2.0**-11, equal_nan=True)


def test_packed_indices_come_back():
    for values in ([], [3], [0, 0, 0, 1, 1, 2], [0, 1, 2, 3, 0, 1, 0], [5, 4, 9]):
        assert unpack_index(pack_index(np.array(values, int))).tolist() == values
