"""The engine against transformers, fp32 on the CPU, and every path of the engine against every other.

For each tiny config: the largest logit error is at most 1e-4 of the logit range, and 256 greedy tokens are identical,
however the work is cut and whoever else is in the batch.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import tiny
import torch

from surefoot.core.config import EngineConfig
from surefoot.core.sampling import SamplingParams
from surefoot.engine.engine import Engine

NEW_TOKENS = 256
LOGIT_TOLERANCE = 1e-4  # of the logit range


@functools.cache
def folder(name: str) -> str:
    return str(tiny.save(tiny.reference(name), Path(tempfile.mkdtemp()) / name))


@functools.cache
def expected(name: str):
    """Ragged prompts, the reference's greedy continuation of each, and its teacher-forced logits.

    One whole forward of the reference over prompt + answer shows that every token of the answer is its own greedy
    choice (by induction over the positions), so the engine's answer is the reference's. Under dynamic rope the
    reference's whole forward differs from its own step-by-step one; there it decodes token by token.
    """
    model = tiny.reference(name)
    asked = tiny.prompts(8, model.config.vocab_size)
    if "dynamic" in name:
        answers = [tiny.reference_greedy(model, p, NEW_TOKENS) for p in asked]
    else:
        answers = tokens(engine(name).generate(asked, greedy()))
        for prompt, answer in zip(asked, answers):
            logits = tiny.reference_logits(model, prompt + answer[:-1])
            assert logits[len(prompt) - 1 :].argmax(-1).tolist() == answer
    logits = [tiny.reference_logits(model, p) for p in asked]
    return asked, answers, logits


def engine(name: str, **settings) -> Engine:
    defaults = {"dtype": "float32", "kv_cache_tokens": 8192, "max_model_len": 400, "num_state_checkpoints": 4}
    return Engine.load(folder(name), EngineConfig(**(defaults | settings)))


def greedy(count: int = NEW_TOKENS, **more) -> SamplingParams:
    return SamplingParams(max_tokens=count, ignore_eos=True, **more)


def tokens(completions) -> list[list[int]]:
    return [c.token_ids for c in completions]


def assert_same_tokens(actual: list[list[int]], wanted: list[list[int]]) -> None:
    """Equal as far as the model length allows; the engine stops at max_model_len, the reference does not."""
    for got, want in zip(actual, wanted, strict=True):
        assert got == want[: len(got)]
        assert len(got) >= min(len(want), 5)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_logits_equal_transformers(name):
    asked, _, logits = expected(name)
    for chunk in (None, 7):
        ours = engine(name, prefill_chunk_size=chunk).score(asked)
        for mine, theirs in zip(ours, logits, strict=True):
            assert relative_error(mine, theirs) <= LOGIT_TOLERANCE


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_alone_and_in_a_ragged_batch(name):
    asked, answers, _ = expected(name)
    one = engine(name)
    assert_same_tokens(tokens(one.generate(asked, greedy())), answers)
    # The same engine again, now one by one: slots and pages are reused.
    assert_same_tokens([tokens(one.generate([p], greedy(64)))[0] for p in asked], answers_of(answers, 64))


@pytest.mark.parametrize("name", ["llama", "qwen3.5"])
def test_transformers_own_generate_agrees(name):
    model = tiny.reference(name)
    asked, answers, _ = expected(name)
    for prompt, answer in list(zip(asked, answers))[4:6]:
        out = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
        assert out[0, len(prompt) :].tolist() == answer


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("name", ["llama", "llama-rope-dynamic", "qwen3.5"])
def test_prefill_chunks(name, chunk):
    asked, answers, _ = expected(name)
    assert_same_tokens(
        tokens(engine(name, prefill_chunk_size=chunk).generate(asked, greedy(64))), answers_of(answers, 64)
    )


def answers_of(answers, count):
    return [a[:count] for a in answers]


@pytest.mark.parametrize("name", ["llama", "llama-rope-dynamic", "qwen3.5", "qwen3.5-all-linear"])
def test_after_preemption_and_resume(name):
    """Pages for about a third of what the batch needs."""
    asked, answers, _ = expected(name)
    tight = engine(name, kv_cache_tokens=640)
    got = tight.generate(asked, greedy())
    if name != "qwen3.5-all-linear":
        assert tight.stats()["preemptions"] > 0
    assert_same_tokens(tokens(got), answers)


@pytest.mark.parametrize("name", ["llama", "qwen3.5"])
def test_after_a_prefix_cache_hit(name):
    model = tiny.reference(name)
    (base,) = tiny.prompts(1, model.config.vocab_size, seed=7, lengths=(70,))
    variants = [base, base + [3], base[:64] + [5, 9, 11], base + base]
    wanted = [tiny.reference_greedy(model, v, 32) for v in variants]
    one = engine(name)
    cold = one.generate([base], greedy(32))
    assert cold[0].num_cached_tokens == 0
    warm = one.generate(variants, greedy(32))
    assert all(c.num_cached_tokens == 64 for c in warm)
    assert_same_tokens(tokens(warm), wanted)


def test_prefix_caching_of_a_hybrid_needs_checkpoints():
    one = engine("qwen3.5", num_state_checkpoints=0)
    asked, answers, _ = expected("qwen3.5")
    for _ in range(2):
        got = one.generate(asked[-1:], greedy(16))
        assert got[0].num_cached_tokens == 0
        assert tokens(got)[0] == answers[-1][:16]
    assert one.info.prefix_caching.startswith("off")


@pytest.mark.parametrize("name", ["llama", "qwen3.5"])
def test_logprobs_of_prompt_and_output(name):
    asked, answers, logits = expected(name)
    got = engine(name, prefill_chunk_size=16).generate(asked, greedy(4, logprobs=3, prompt_logprobs=2))
    model = tiny.reference(name)
    for completion, prompt, answer in zip(got, asked, answers):
        whole = prompt + answer[:4]
        exact = tiny.reference_logits(model, whole).log_softmax(-1)
        assert completion.prompt_logprobs[0] is None
        found = completion.prompt_logprobs[1:] + completion.logprobs
        assert [f.token_id for f in found] == whole[1:]
        for row, lp in zip(exact, found):
            assert lp.logprob == pytest.approx(float(row[lp.token_id]), abs=2e-4)
            assert lp.rank == 1 + int((row > row[lp.token_id]).sum())
            best = row.topk(2)
            assert [i for i, _ in lp.top[:2]] == best.indices.tolist()


@pytest.mark.parametrize("name", ["llama", "qwen3.5"])
def test_long_decode_keeps_its_state(name):
    """2,000 decoded tokens: the logits of that very path equal a fresh whole prefill of the same tokens."""
    one = engine(name, max_model_len=2100, num_state_checkpoints=0)
    (prompt,) = tiny.prompts(1, 190, lengths=(5,))
    (done,) = one.generate([prompt], greedy(2000, logprobs=5))
    (fresh,) = one.score([prompt + done.token_ids])
    exact = fresh.log_softmax(-1)
    assert done.token_ids == fresh[len(prompt) - 1 : -1].argmax(-1).tolist()
    drift = max(abs(lp.logprob - float(exact[len(prompt) - 1 + i, lp.token_id])) for i, lp in enumerate(done.logprobs))
    assert drift < 1e-3


def test_sampling_depends_on_the_seed_alone():
    """Neighbours, chunks and preemption do not change a seeded draw."""
    asked, _, _ = expected("qwen3.5")
    params = SamplingParams(max_tokens=40, temperature=1.0, top_p=0.95, seed=11, ignore_eos=True)
    alone = tokens(engine("qwen3.5").generate(asked[4:5], params))[0]
    batched = tokens(engine("qwen3.5").generate(asked, params))[4]
    tight = tokens(engine("qwen3.5", kv_cache_tokens=400, prefill_chunk_size=3).generate(asked, params))[4]
    assert alone == batched == tight


def test_cancel_frees_everything_and_disturbs_nobody():
    asked, answers, _ = expected("llama")
    one = engine("llama")
    free = one.stats()["free_blocks"]
    ids = [one.add_request(p, greedy(20)) for p in asked]
    got: dict[str, list[int]] = {i: [] for i in ids}
    step = 0
    while one.has_unfinished():
        for output in one.step():
            got[output.request_id] += output.token_ids
        step += 1
        if step == 5:
            one.cancel(ids[2])
            one.cancel("no such request")
    assert len(got[ids[2]]) < 20
    assert_same_tokens([got[i] for i in ids if i != ids[2]], [a[:20] for i, a in enumerate(answers) if i != 2])
    assert one.stats()["free_blocks"] == free
