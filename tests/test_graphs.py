"""Captured decode steps: a graph computes what eager steps compute, on every path, and is captured once.

No GPU or NPU is needed: the capture is emulated on the CPU (emulated_npu/capture.py), which records the calls of a step
and replays exactly those, at their addresses, with the host values of the recording.
"""

from __future__ import annotations

import random

import pytest
import tiny
import torch
from emulated_npu.capture import CaptureError, GraphCpu

from surefoot import ops
from surefoot.core.config import EngineConfig
from surefoot.core.errors import DeviceError, InputError
from surefoot.core.sampling import SamplingParams
from surefoot.device.graphs import Graph, capturing, host_call
from surefoot.engine import padding as padding_module
from surefoot.engine.decode_graphs import StaticInputs
from surefoot.engine.engine import Engine
from surefoot.engine.graphs import GraphPlan, default_buckets, plan_graphs
from surefoot.engine.load import load_engine
from surefoot.ops.attention import paged_sample
from surefoot.ops.torch_native import paged_attention_padded

CANARIES = ("canary-llama", "canary-qwen3.5")
SIZES = {"max_num_seqs": 8, "max_model_len": 192, "kv_cache_tokens": 2048, "num_state_checkpoints": 4}
BUCKETS = (2, 4, 8)  # a batch of one is padded too


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def get(name: str) -> str:
        if name.startswith("canary"):
            return name
        if name not in made:
            made[name] = str(tiny.save(tiny.reference(name), tmp_path_factory.mktemp(name)))
        return made[name]

    return get


def with_graphs(ref: str, device: GraphCpu | None = None, **settings) -> Engine:
    config = {"graph": "full", "batch_buckets": BUCKETS, "dtype": "float32"} | SIZES | settings
    return load_engine(ref, EngineConfig(**config), device=device or GraphCpu())


def eager(ref: str, **settings) -> Engine:
    return load_engine(ref, EngineConfig(**({"graph": "off", "dtype": "float32"} | SIZES | settings)))


def paths(vocab: int) -> list[tuple[list[int], SamplingParams, int]]:
    """(prompt, parameters, step at which it arrives): mixed lengths, a common beginning, stops, and all of sampling."""
    prompts = tiny.prompts(10, vocab, seed=3, lengths=(1, 2, 5, 17, 33, 48, 64))
    shared = tiny.prompts(1, vocab, seed=4, lengths=(50,))[0]
    greedy = SamplingParams(max_tokens=24, ignore_eos=True, logprobs=3)
    kinds = [
        greedy,
        SamplingParams(max_tokens=30, ignore_eos=True),
        SamplingParams(max_tokens=20, temperature=0.9, top_p=0.8, seed=5),
        SamplingParams(max_tokens=20, temperature=1.2, top_k=7, seed=6, logprobs=0),
        SamplingParams(max_tokens=20, repetition_penalty=1.3, presence_penalty=0.5, logit_bias={3: 2.0}),
        SamplingParams(max_tokens=40, stop_token_ids=tuple(range(0, vocab, 5)), min_tokens=3),
    ]
    asked = [(p, kinds[i % len(kinds)], (i * 3) % 11) for i, p in enumerate(prompts)]
    asked += [(shared + p, greedy, 4 + 6 * i) for i, p in enumerate(prompts[:3])]
    return sorted(asked, key=lambda ask: ask[2])


def play(engine: Engine, asked) -> list[tuple]:
    """Every token and log-probability of each request, which arrive while others run."""
    got: dict[str, list] = {}
    waiting, step = list(asked), 0
    while waiting or engine.has_unfinished():
        while waiting and waiting[0][2] <= step:
            prompt, params, _ = waiting.pop(0)
            got[engine.add_request(prompt, params)] = []
        for out in engine.step():
            got[out.request_id].append((out.token_ids, out.logprobs, out.finish_reason))
        step += 1
    return list(got.values())


def recheck(engine: Engine) -> None:
    """Record every graph again: the same calls at the same addresses, or CaptureError."""
    graphs = engine.runner.graphs
    with torch.inference_mode():
        for bucket, (inputs, graph) in graphs._graphs.items():
            inputs.fill(engine.runner.padding.rows(bucket))
            graph.recheck()


# ---- graph = eager


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CANARIES)
def test_canaries_compute_the_same_bits_on_every_path(name, dtype):
    plain, graphed = eager(name, dtype=dtype), with_graphs(name, dtype=dtype)
    asked = paths(plain.vocab_size)
    assert play(graphed, asked) == play(plain, asked)
    assert graphed.runner.graphs.replays > 20
    recheck(graphed)


@pytest.mark.parametrize(
    "name",
    ["llama-mha-odd-head-dim", "llama-bias", "llama-rope-dynamic", "qwen3.5-untied-equal-heads", "qwen3.5-all-linear"],
)
def test_tiny_models_compute_the_same_bits(name, folders):
    plain, graphed = eager(folders(name)), with_graphs(folders(name))
    asked = paths(plain.vocab_size)
    assert play(graphed, asked) == play(plain, asked)
    recheck(graphed)


@pytest.mark.parametrize("name", ["llama", "qwen3.5"])
def test_preemption_and_chunks(name, folders):
    """Few pages, so that requests lose them and come back; prompts in pieces of seven, some of one token."""
    tight = {"kv_cache_tokens": 192, "prefill_chunk_size": 7, "num_state_checkpoints": 2}
    plain, graphed = eager(folders(name), **tight), with_graphs(folders(name), **tight)
    asked = paths(plain.vocab_size)
    assert play(graphed, asked) == play(plain, asked)
    assert graphed.scheduler.num_preemptions == plain.scheduler.num_preemptions > 0


def test_prefix_hits(folders):
    plain, graphed = eager(folders("qwen3.5")), with_graphs(folders("qwen3.5"))
    prompt = tiny.prompts(1, plain.vocab_size, lengths=(60,))[0]
    for _ in range(3):
        params = SamplingParams(max_tokens=9, logprobs=2)
        (a,), (b,) = graphed.generate([prompt], params), plain.generate([prompt], params)
        assert (a.token_ids, a.logprobs, a.num_cached_tokens) == (b.token_ids, b.logprobs, b.num_cached_tokens)
    assert a.num_cached_tokens > 0


def test_scores_prompt_logprobs_and_watched_ops_run_eagerly():
    engine, plain = with_graphs("canary-llama"), eager("canary-llama")
    ids = [5, 6, 7]
    assert torch.equal(engine.score([ids[:1]])[0], plain.score([ids[:1]])[0])
    engine.generate([ids[:1]], SamplingParams(max_tokens=1, prompt_logprobs=2))
    assert engine.runner.graphs.replays == 0
    seen = []
    with ops.intercept(lambda spec, args, kwargs, run: (seen.append(spec.name), run())[1]):
        engine.generate([ids], SamplingParams(max_tokens=4, ignore_eos=True))
    with engine.runner.eagerly():
        engine.generate([ids], SamplingParams(max_tokens=4, ignore_eos=True))
    assert engine.runner.graphs.replays == 0 and "paged_attention" in seen
    engine.generate([ids], SamplingParams(max_tokens=4, ignore_eos=True))
    assert engine.runner.graphs.replays == 3


# ---- captured once


@pytest.mark.parametrize("name", CANARIES)
def test_no_capture_after_loading_over_200_random_requests(name):
    device = GraphCpu()
    engine = with_graphs(name, device, batch_buckets=None, max_num_seqs=12)
    plan = engine.info.batch_buckets
    assert plan == (1, 2, 4, 8, 12) and len(device.graphs) == engine.runner.graphs.captures == len(plan)
    draw = random.Random(1)
    asked = []
    for i in range(200):
        prompt = [draw.randrange(engine.vocab_size) for _ in range(draw.choice((1, 3, 15, 16, 17, 40)))]
        asked.append((prompt, SamplingParams(max_tokens=draw.randint(1, 12), ignore_eos=True), i // 3))
    asked.append(([1, 2], SamplingParams(max_tokens=4, ignore_eos=True), 400))
    play(engine, asked)
    assert len(device.graphs) == engine.runner.graphs.captures == len(plan)
    decodes = {n for kind, n in engine.runner.padding.seen if kind == "decode"}
    assert decodes == set(plan), "every bucket was used, and nothing else"
    recheck(engine)


def test_an_address_that_moves_is_noticed():
    engine = with_graphs("canary-llama")
    engine.runner.layers[0].k = torch.empty_like(engine.runner.layers[0].k)
    with pytest.raises(CaptureError, match="kv_write: argument 2 was"):
        recheck(engine)


# ---- planted faults


def _stale_lengths(monkeypatch):
    right = StaticInputs.fill

    def wrong(self, items):
        kept = self._seq_lens.copy()
        right(self, items)
        self._seq_lens[:] = kept
        self._device.copy_(self._host)

    monkeypatch.setattr(StaticInputs, "fill", wrong)


@pytest.mark.parametrize("name", ["llama", "qwen3.5"])
def test_padded_rows_in_a_requests_slot_are_caught(name, folders, monkeypatch):
    """The first page and slot that a request gets, as in engines whose dummy is row 0 and where row 0 is given out."""
    plain = eager(folders(name))
    asked = paths(plain.vocab_size)
    dummies = with_graphs(folders(name)).scheduler.block_pool.num_dummies
    right = padding_module._dummy
    monkeypatch.setattr(padding_module, "_dummy", lambda n, t, blocks, slot: right(n, t, [dummies], dummies))
    broken = with_graphs(folders(name))
    assert play(broken, asked) != play(plain, asked)


def test_stale_lengths_are_caught(folders, monkeypatch):
    plain = eager(folders("llama"))
    asked = paths(plain.vocab_size)
    _stale_lengths(monkeypatch)
    assert play(with_graphs(folders("llama")), asked) != play(plain, asked)


def test_host_lengths_baked_into_a_graph_are_caught(folders, monkeypatch):
    """An attention that reads lengths on the host, taken by mistake: tokens change, and so would the calls."""
    sdpa = next(i for i in ops.REGISTRY["paged_attention"].implementations if i.name == "sdpa")
    plain = eager(folders("llama"))
    asked = paths(plain.vocab_size)
    monkeypatch.setattr(ops.REGISTRY["paged_attention"], "implementations", [type(sdpa)("baked", "any", sdpa.fn)])
    assert play(with_graphs(folders("llama")), asked) != play(plain, asked)


# ---- the plan


def planned(no_graphs=None, stream_limit=None, free_bytes=10**10, each=10**6, most_rows=None, **settings) -> GraphPlan:
    return plan_graphs(
        EngineConfig(**settings),
        no_graphs=no_graphs,
        stream_limit=stream_limit,
        free_bytes=free_bytes,
        bytes_for=lambda buckets: each * len(buckets),
        most_rows=most_rows,
    )


def test_plan():
    assert default_buckets(32) == (1, 2, 4, 8, 16, 24, 32) and default_buckets(5) == (1, 2, 4, 5)
    plan = planned()
    assert (plan.mode, plan.num_captures, plan.memory_bytes) == ("full", 7, 7 * 10**6)
    assert plan.line == "7 graphs, for batches of 1, 2, 4, 8, 16, 24, 32; about 6.7 MiB"
    assert (plan.num_dummy_rows, plan.num_dummy_tokens) == (7, 0)  # 8 requests too few for 16
    assert planned(token_buckets=(16, 64)).num_dummy_tokens == 47
    few = planned(stream_limit=3)
    assert few.batch_buckets == (1, 8, 32)
    assert planned(most_rows=10).batch_buckets == (1, 2, 4, 8)
    assert "larger batches than 8 run eagerly" in planned(most_rows=10).why
    assert planned(free_bytes=45 * 10**6).batch_buckets == (1, 2, 4, 8)


@pytest.mark.parametrize(
    "settings, why",
    [
        ({"no_graphs": "cpu has no graphs"}, "cpu has no graphs"),
        ({"ops": "reference"}, "reference ops"),
        ({"stream_limit": 1, "batch_buckets": (1, 2)}, "2 graphs need as many streams, the device has 1"),
        ({"free_bytes": 10**6, "each": 10**6}, "graphs up to batch 32 need 6.7 MiB of 97.7 KiB"),
    ],
)
def test_a_plan_that_cannot_be_runs_eagerly_and_says_why_or_is_an_error(settings, why):
    plan = planned(**settings)
    assert plan.mode == "off" and why in plan.line and plan.num_captures == 0
    with pytest.raises(InputError, match=f"--graph full is not possible: .*{why}"):
        planned(graph="full", **settings)


@pytest.mark.parametrize("sizes", [(), (0, 1), (2, 1), (4, 4)])
def test_impossible_buckets(sizes):
    with pytest.raises(InputError, match="batch_buckets must be ascending"):
        EngineConfig(batch_buckets=sizes)


def test_what_is_in_effect_is_told():
    engine = with_graphs("canary-llama")
    assert (engine.info.graph, engine.info.batch_buckets) == ("full", BUCKETS)
    assert any(note.startswith("3 graphs captured in ") for note in engine.info.notes)
    plain = eager("canary-llama", token_buckets=(64, 512))
    assert (plain.info.graph, plain.info.token_buckets) == ("off", (64, 512))
    assert "steps that prefill are padded to 64, 512 tokens" in plain.info.notes
    limited = load_engine("canary-llama", EngineConfig(ops="reference", **SIZES), device=GraphCpu())
    assert "graphs off: the reference ops read sequence lengths on the host" in limited.info.notes


# ---- padding without graphs


@pytest.mark.parametrize("name", ["llama", "llama-rope-dynamic", "qwen3.5"])
def test_padded_steps_compute_the_same_tokens(name, folders):
    """Bucketed and fixed against dynamic; every shape that runs is one of the buckets."""
    dynamic = eager(folders(name), prefill_chunk_size=64, max_num_batched_tokens=128)
    asked = paths(dynamic.vocab_size)
    want = play(dynamic, asked)
    for batches, tokens in (((1, 2, 4, 8), (16, 17, 32, 64, 128)), ((8,), (128,))):
        padded = eager(
            folders(name),
            batch_buckets=batches,
            token_buckets=tokens,
            prefill_chunk_size=64,
            max_num_batched_tokens=128,
        )
        got = play(padded, asked)
        assert [[out[0] for out in one] for one in got] == [[out[0] for out in one] for one in want]
        assert padded.runner.padding.unplanned() == []
    assert len(dynamic.runner.padding.seen) > 10


# ---- host values that are updated


def test_host_values_are_updated_before_each_replay():
    """The form that the fused attention of NPUs takes: lengths as a list that is changed in place."""
    lengths, held, x = [1, 2], torch.zeros(1, 1, 1), torch.ones(4)
    pages, slots = (torch.zeros(1, 4, 1, 1), torch.zeros(1, 4, 1, 1)), torch.tensor([2])

    def step():
        host_call(lambda: held.fill_(sum(lengths)))
        ops.kv_write(held, held, *pages, slots)
        return pages[0].flatten() * x

    graph = GraphCpu().capture(step)
    lengths[1] = 40
    graph.replay()
    assert graph.output.tolist() == [0.0, 0.0, 41.0, 0.0]
    graph._calls.clear()
    with pytest.raises(CaptureError, match="without new host values"):
        graph.replay()


def test_reading_a_value_inside_a_capture_is_refused():
    x = torch.ones(3)
    with pytest.raises(CaptureError, match="cannot wait for the host"):
        GraphCpu().capture(lambda: x * float(x.sum()))


def test_a_device_without_updates_refuses_host_values():
    with pytest.raises(DeviceError, match="--graph off"), capturing(Graph()):
        host_call(lambda: None)


# ---- attention of graphs on devices without a kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_attention(dtype):
    generator = torch.Generator().manual_seed(0)
    call = paged_sample(dtype, torch.device("cpu"), generator, [1] * 5, [1, 7, 16, 17, 60], 6, 2, 16, 16)
    call["k_cache"][0], call["v_cache"][0] = torch.nan, torch.nan  # the page that short rows are padded with
    spec = ops.REGISTRY["paged_attention"]
    want = spec.reference(**call).float()
    allowed = spec.tolerance[dtype]
    torch.testing.assert_close(paged_attention_padded(**call).float(), want, atol=allowed.atol, rtol=allowed.rtol)
    with capturing(Graph()), ops.use("auto"):
        chosen = [i.name for i in spec.candidates("cuda") if i.supports is None or i.supports(**call)]
    assert chosen == ["padded"]


@pytest.mark.parametrize("name", CANARIES)
def test_padded_attention_in_a_graph(name, monkeypatch):
    """As on a GPU: no kernel of its own for the op, so eager steps take one implementation and graphs another."""
    spec = ops.REGISTRY["paged_attention"]
    monkeypatch.setattr(spec, "implementations", [i for i in spec.implementations if i.device == "any"])
    plain, graphed = eager(name), with_graphs(name)
    asked = [ask for ask in paths(plain.vocab_size) if ask[1].temperature == 0]
    tokens = [[[out[0] for out in one] for one in play(engine, asked)] for engine in (plain, graphed)]
    assert tokens[0] == tokens[1]
