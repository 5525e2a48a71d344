"""Path parity: a healthy engine passes on every path; an engine that is broken on one path is told where."""

from __future__ import annotations

import contextlib
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from surefoot import canaries
from surefoot.backends.native import NativeBackend
from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError
from surefoot.core.outputs import Completion, TokenLogprob
from surefoot.core.sampling import SamplingParams
from surefoot.ops.cpu import kernels
from surefoot.verify.comparison import Comparison, Kept, difference
from surefoot.verify.parity import causality_probe, path_parity
from surefoot.verify.shapes import VerifySettings

ALWAYS = {
    "repeat",
    "prefill = decode",
    "chunked = whole",
    "alone = batched",
    "lengths",
    "mixed lengths",
    "prefill beside decodes",
    "causality",
    "decode alone",
    "decode batched",
    "decode across boundaries",
    "before = after preemption",
    "server, 1 at a time",
    "server, 8 at a time",
    "server, 32 at a time",
    "repeat after all others",
}
CACHED = {"prefix miss = hit"}
GRAPHED = {"graph = eager"} if kernels else set()


def backend_of(name: str, **settings) -> NativeBackend:
    if name in tiny.CONFIGS:
        name = str(tiny.save(tiny.reference(name), Path(tempfile.mkdtemp())))
    defaults = {"dtype": "float32", "max_model_len": 400, "kv_cache_tokens": 4096, "max_num_seqs": 32}
    return NativeBackend(name, EngineConfig(**(defaults | settings)))


def parity(backend: NativeBackend, **options) -> dict[str, list[str]]:
    """Names of the paths by status."""
    outcome: dict[str, list[str]] = {}
    for finding in path_parity(backend, VerifySettings("any"), **options):
        assert finding.check == "parity" and "\n" not in finding.summary
        outcome.setdefault(finding.status, []).append(finding.details["path"])
    return outcome


@pytest.fixture(scope="module")
def llama() -> NativeBackend:
    return backend_of("canary-llama", graph="off")  # what is planted into a batch does not reach a recorded step


@pytest.fixture(scope="module")
def qwen() -> NativeBackend:
    return backend_of("canary-qwen3.5", graph="off")


# ---- healthy engines


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in canaries.CANARIES for dtype in ("float32", "bfloat16")] + [("canary-llama", "float16")],
)
def test_canaries_pass_on_every_path(name, dtype):
    outcome = parity(backend_of(name, dtype=dtype))
    assert set(outcome["pass"]) == ALWAYS | CACHED | GRAPHED
    assert "fail" not in outcome


@pytest.mark.parametrize("name", ["llama-one-kv-head", "llama-rope-dynamic", "qwen3.5-untied-equal-heads"])
def test_awkward_configs_pass_on_every_path(name):
    outcome = parity(backend_of(name, max_model_len=300))
    assert set(outcome["pass"]) == ALWAYS | CACHED | GRAPHED


@pytest.mark.parametrize(
    "settings",
    [
        {"block_size": 1},
        {"block_size": 48},
        {"max_num_seqs": 2},
        {"max_model_len": 20, "kv_cache_tokens": 64},
        {"prefill_chunk_size": 5},
        {"max_num_batched_tokens": 30},
    ],
    ids=str,
)
def test_cramped_engines_are_no_false_alarm(settings):
    outcome = parity(backend_of("llama", **settings))
    assert "fail" not in outcome
    assert {"repeat", "prefill = decode", "lengths", "server, 8 at a time"} <= set(outcome["pass"])


def test_what_the_engine_cannot_do_is_said():
    backend = backend_of("qwen3.5", num_state_checkpoints=0)
    (finding,) = path_parity(backend, VerifySettings("any"), only=["prefix miss = hit"])
    assert finding.status == "not_possible"
    assert "checkpoints" in finding.summary


def test_the_engine_is_left_as_it_was(llama):
    engine = llama.engine
    prompt, params = list(range(40)), SamplingParams(max_tokens=8)
    before, free, chunk = engine.generate([prompt], params), engine.stats()["free_blocks"], 0
    chunk = engine.scheduler.prefill_chunk_size
    parity(llama)
    assert engine.generate([prompt], params)[0].token_ids == before[0].token_ids
    assert (engine.stats()["free_blocks"], engine.scheduler.prefill_chunk_size) == (free, chunk)
    assert not engine.has_unfinished()


def test_a_busy_engine_is_refused():
    busy = backend_of("llama")
    busy.engine.add_request([1, 2, 3], SamplingParams(max_tokens=4))
    with pytest.raises(InputError, match="idle engine"):
        path_parity(busy, VerifySettings("any"))


def test_progress_tells_each_path(llama):
    seen: list[tuple[str, float | None]] = []
    path_parity(llama, VerifySettings("any"), lambda what, share: seen.append((what, share)))
    assert len(seen) == 16
    assert ("paths: server", 13 / 16) in seen
    assert [share for _, share in seen] == sorted(share for _, share in seen)


# ---- broken engines: each fault shows on the paths that it is on, and not on those that it is not on


@contextlib.contextmanager
def patched(owner, name, value):
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def altered_batch(backend, change):
    model = backend.engine.model
    forward = model.forward
    return patched(model, "forward", lambda batch: forward(change(batch)))


def one_page_too_few(batch):
    """Decodes forget their sequence's first token where a page begins."""
    table = batch.block_table.clone()
    for i, (new, length) in enumerate(zip(batch.query_lens_host, batch.seq_lens_host)):
        if new == 1 and length % 16 == 1 and length > 1:
            table[i, 0] = table[i, length // 16]
    return replace(batch, block_table=table)


def last_row_wins(batch):
    slots = batch.state_slots.clone()
    slots[:1] = batch.state_slots[-1]
    return replace(batch, state_slots=slots)


def test_a_fault_at_page_edges_is_told_with_its_first_position(llama):
    with altered_batch(llama, one_page_too_few):
        found = {f.details["path"]: f for f in path_parity(llama, VerifySettings("any"))}
    broken = found["prefill = decode"]
    assert broken.status == "fail"
    assert (broken.details["first"]["position"], broken.details["first"]["row"]) == (16, 0)
    assert "from position 16 on" in broken.summary
    assert found["decode across boundaries"].status == "fail"
    for path in ("repeat", "alone = batched", "lengths", "causality"):
        assert found[path].status == "pass"


def test_a_state_shared_within_a_batch(qwen):
    with altered_batch(qwen, last_row_wins):
        outcome = parity(qwen)
    assert {"alone = batched", "mixed lengths", "decode batched", "server, 8 at a time"} <= set(outcome["fail"])
    assert {"repeat", "prefill = decode", "lengths", "decode alone", "server, 1 at a time"} <= set(outcome["pass"])


def test_a_prefix_found_under_the_wrong_hash():
    backend = backend_of("canary-llama")

    def hashes(request, count):
        return [i.to_bytes(32, "big") for i in range(count)]

    with patched(backend.engine.scheduler, "_hashes", hashes):
        outcome = parity(backend, only=["chunked = whole", "decode batched", "prefix miss = hit", "server"])
    assert "prefix miss = hit" in outcome["fail"]
    assert outcome["pass"][:2] == ["chunked = whole", "decode batched"]


def test_a_request_that_resumes_where_it_was_preempted(llama):
    scheduler = llama.engine.scheduler
    preempt, admit, done = scheduler._preempt, scheduler._admit, {}

    def keep(request, step):
        done[request.request_id] = request.num_computed_tokens
        preempt(request, step)

    def resume(request, step):
        admitted = admit(request, step)
        if admitted:
            request.num_computed_tokens = done.pop(request.request_id, request.num_computed_tokens)
        return admitted

    with patched(scheduler, "_preempt", keep), patched(scheduler, "_admit", resume):
        outcome = parity(llama, only=["mixed lengths", "decode batched", "before = after preemption"])
    assert outcome["fail"] == ["before = after preemption"]


def test_a_server_that_adds_a_penalty(llama):
    engine = llama.engine
    add = engine.add_request

    def added(prompt, params, request_id=None, score=False):
        through_http = request_id is not None
        return add(prompt, replace(params, repetition_penalty=1.5) if through_http else params, request_id, score)

    with patched(engine, "add_request", added):
        outcome = parity(llama, only=["decode batched", "server"])
    assert set(outcome["fail"]) == {f"server, {n} at a time" for n in (1, 8, 32)}


def test_runs_that_do_not_repeat(llama):
    """A few units in the last place, at random: far below the tolerance, and still not the same bits."""
    norm, generator = llama.engine.model.model.norm, torch.Generator().manual_seed(0)
    forward = norm.forward
    wobble = lambda x, *args: forward(x, *args) * (1 + 1e-6 * torch.rand(1, generator=generator))  # noqa: E731
    with patched(norm, "forward", wobble):
        found = path_parity(llama, VerifySettings("any"), only=["repeat", "chunked = whole", "decode batched"])
    (failed,) = [f for f in found if f.status == "fail"]
    assert failed.details["path"] == "repeat"
    assert "not the same bits" in failed.summary


def test_a_path_that_raises_is_a_finding_and_the_next_ones_run(llama):
    engine = llama.engine
    preempt = engine.scheduler._preempt

    def broken(request, step):
        preempt(request, step)
        raise IndexError("no such page")

    with patched(engine.scheduler, "_preempt", broken):
        only = ["before = after preemption", "repeat after all others"]
        found = {f.details["path"]: f for f in path_parity(llama, VerifySettings("any"), only=only)}
    assert found["before = after preemption"].status == "fail"
    assert "IndexError: no such page" in found["before = after preemption"].summary
    assert found["repeat after all others"].status == "pass"


def test_a_mask_that_lets_the_future_through(llama):
    class Leaky:
        name, vocab_size = "leaky", llama.vocab_size

        def score(self, sequences):
            scored = [logits.clone() for logits in llama.score(sequences)]
            for logits in scored:
                logits[40] += 0.01 * logits[-1]  # position 40 sees the last token
            return scored

    ids = torch.randint(0, llama.vocab_size, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    assert causality_probe(llama, ids).status == "pass"
    finding = causality_probe(Leaky(), ids)
    assert finding.status == "fail"
    assert finding.details["first"]["position"] == 40


def test_a_model_that_ignores_its_input(llama):
    class Deaf:
        name, vocab_size = "deaf", 50

        def score(self, sequences):
            return [torch.arange(50.0).repeat(len(s), 1) for s in sequences]

    finding = causality_probe(Deaf(), list(range(20)))
    assert finding.status == "fail"
    assert "logits stay the same" in finding.summary


# ---- the comparison itself


def comparison() -> Comparison:
    return Comparison("p", tolerance=1e-4, spread=10.0, page=16)


def test_differences_see_every_kind_of_nonsense():
    inf, nan = math.inf, math.nan
    rows = torch.tensor([[1.0, 2.0], [inf, 0.0], [inf, 0.0], [nan, 0.0], [nan, 0.0], [0.0, 0.0]])
    other = torch.tensor([[1.0, 2.5], [inf, 0.0], [-inf, 0.0], [nan, 0.0], [0.0, 0.0], [-0.0, 0.0]])
    assert difference(rows, other).tolist() == [0.5, 0.0, inf, inf, inf, 0.0]


def test_a_large_vocabulary_is_sampled_and_every_column_counts_through_the_sum():
    kept, logits = Kept(100_000), torch.randn(3, 100_000)
    outside = next(i for i in range(100_000) if i not in set(kept.columns.tolist()))
    rows = kept.rows(logits)
    assert rows.shape == (3, 2049)
    logits[1, outside] = 30.0
    assert (difference(rows, kept.rows(logits)) > 1).tolist() == [False, True, False]


def answer(logits: torch.Tensor, tokens: list[int]) -> Completion:
    exact = logits.log_softmax(-1)
    entries = [TokenLogprob(t, float(row[t]), 1) for t, row in zip(tokens, exact)]
    return Completion("r", [1, 2, 3], tokens, "", "length", logprobs=entries)


def test_another_token_counts_only_beyond_the_tolerance():
    logits = torch.tensor([[0.0, 5.0, 4.9995], [0.0, 5.0, 4.0]])
    near, far = comparison(), comparison()
    near.answer(logits.log_softmax(-1), answer(logits, [2, 1]), 2)
    assert (near.finding().status, near.near_ties, near.flips) == ("pass", 1, 0)
    far.answer(logits.log_softmax(-1), answer(logits, [1, 2]), 2)
    finding = far.finding()
    assert (finding.status, far.flips, finding.details["first"]["position"]) == ("fail", 1, 4)
    assert "another token is chosen from position 4 on" in finding.summary


def test_an_answer_that_is_too_short_is_broken():
    compared = comparison()
    compared.answer(torch.zeros(1, 3).log_softmax(-1), answer(torch.zeros(1, 3), [0]), 4)
    assert compared.finding().status == "fail"
    assert "1 tokens instead of 4" in compared.finding().summary
