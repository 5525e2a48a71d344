"""Both canaries through the engine on an emulated NPU: known answers, batches, chunks, graphs, quantised weights, the
proof; and planted mistakes in the calls of the fused operators, each caught."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from emulated_npu import graphs, wheel
from emulated_npu.kernels import RefusedByCann
from emulated_npu.machine import machine
from emulated_npu.plants import PLANTS, plant

from surefoot import canaries, ops
from surefoot.analyze.registry import Status
from surefoot.core.batch import KVPages
from surefoot.core.config import EngineConfig
from surefoot.core.errors import StepError
from surefoot.core.sampling import SamplingParams
from surefoot.engine.engine import Engine
from surefoot.verify.run import open_reference, open_target, verify
from surefoot.verify.shapes import VerifySettings

pytestmark = pytest.mark.skipif(wheel.missing() is not None, reason=str(wheel.missing()))
SMALL = {"device": "npu:0", "dtype": "bfloat16", "kv_cache_tokens": 8192, "max_model_len": 512, "graph": "off"}
FEW = 6
# Largest error of a logit as a share of the logits' range in bf16, as `surefoot selftest` allows it.
ALLOWED = 0.02
SAME_WITH_ONE_HEAD = ("wrong_layout", "wrong_heads")


@pytest.fixture(scope="module")
def device():
    with machine() as emulator:
        yield emulator


@pytest.fixture
def npu(device):
    """The machine with an empty record."""
    ops.forget_chosen()
    device.found.clear()
    device.npu_calls.clear()
    return device


def _id(value) -> str:
    return getattr(value, "__name__", str(value))


def questions(name: str, count: int = FEW) -> list[dict]:
    """Known answers spread over all of them."""
    answers = canaries.known_answers(name)
    return answers[:: max(1, len(answers) // count)][:count]


def answers(engine: Engine, asked: list[dict], max_tokens: int = 128) -> list[str]:
    prompts = [engine.tokenizer.encode_chat(q["messages"]) for q in asked]
    return [done.text for done in engine.generate(prompts, SamplingParams(max_tokens=max_tokens))]


@pytest.mark.parametrize("name", canaries.CANARIES)
def test_known_answers_in_a_batch_and_in_chunks(npu, name):
    asked = questions(name)
    config = EngineConfig(**SMALL, max_num_seqs=FEW, prefill_chunk_size=7)
    engine = Engine.load(name, config)
    assert answers(engine, asked) == [q["answer"] for q in asked]
    assert npu.npu_calls["npu_fused_infer_attention_score"] > 0
    assert {use.status for use in npu.uses} <= {Status.FUSED, Status.NATIVE, Status.COMPOSITE}
    assert not [chosen for op, chosen in engine.info.ops.items() if op == "paged_attention/npu" and chosen == "sdpa"]


@pytest.mark.parametrize("name", canaries.CANARIES)
def test_graphs_give_the_same_answers(npu, name):
    """Captured decode steps, their attention lengths updated before each replay."""
    asked, before = questions(name, 3), graphs.NPUGraph.captured
    engine = Engine.load(name, EngineConfig(**SMALL | {"graph": "full", "max_num_seqs": 3, "batch_buckets": (1, 3)}))
    assert graphs.NPUGraph.captured == before + 2
    assert answers(engine, asked) == [q["answer"] for q in asked]
    assert graphs.NPUGraph.captured == before + 2


@pytest.mark.parametrize("quant", ["w8a16", "w8a8", "w4a16"])
def test_quantised_weights(npu, quant):
    """The fused products, and the answers that the reference gives with the same weights."""
    asked = questions("canary-llama", 2)
    engine = Engine.load("canary-llama", EngineConfig(**SMALL, quant=quant))
    given = answers(engine, asked)
    product = "npu_quant_matmul" if quant == "w8a8" else "npu_weight_quant_batchmatmul"
    assert npu.npu_calls[product] > 0 and ("npu_dynamic_quant" in npu.npu_calls) == (quant == "w8a8")
    cpu = Engine.load("canary-llama", EngineConfig(**SMALL | {"device": "cpu"}, quant=quant, ops="reference"))
    assert given == answers(cpu, asked)


@pytest.mark.parametrize("name", canaries.CANARIES)
def test_the_proof_is_green(npu, tmp_path, name):
    """Template, token ids, weights, every layer, logits, sampler, and every path of the engine against every other."""
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"messages": q["messages"]}) for q in questions(name, 2)]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    settings = VerifySettings(
        name,
        device="npu:0",
        dtype="bfloat16",
        graph="off",
        prompts=prompts,
        continuation_tokens=8,
        long_tokens=40,
    )
    proof = verify(open_reference(settings), open_target(settings), settings)
    assert proof.verdict == "proven", [f.summary for f in proof.findings if f.status != "pass"]


def logits(engine: Engine) -> torch.Tensor:
    """Teacher-forced logits of two sequences of 28 tokens, which come in chunks of 9, 9, 9 and a single token."""
    ids = engine.tokenizer.encode("The capital of France is Paris. 中国的首都是北京。" * 4)
    return torch.cat(engine.score([ids[:28], ids[5:33]]))


@pytest.fixture(scope="module")
def sound(device):
    """name -> an engine on the NPU, and the logits of one on the CPU."""
    config = SMALL | {"prefill_chunk_size": 9, "max_num_seqs": 2, "enable_prefix_caching": False}

    @functools.cache
    def load(name: str) -> tuple[Engine, torch.Tensor]:
        right = logits(Engine.load(name, EngineConfig(**config | {"device": "cpu"})))
        engine = Engine.load(name, EngineConfig(**config))
        for layer in engine.runner.layers:
            if isinstance(layer, KVPages):  # what a length too long would read
                layer.k.fill_(1.0), layer.v.fill_(50.0)
        return engine, right

    return load


def _planted() -> list:
    """Qwen3.5's canary has one KV head: neither the order of heads in a page nor their mapping can be wrong."""
    return [(n, c) for n in canaries.CANARIES for c in PLANTS if "llama" in n or c.__name__ not in SAME_WITH_ONE_HEAD]


@pytest.mark.parametrize("name,change", _planted(), ids=_id)
def test_a_planted_mistake_changes_the_logits(sound, monkeypatch, name, change):
    """What the tests of the op find, the logits of a canary show too, or the call is refused."""
    engine, right = sound(name)
    extent = right.max() - right.min()
    assert (logits(engine) - right).abs().max() < ALLOWED * extent
    plant(monkeypatch, change)
    try:
        wrong = logits(engine)
    except (RefusedByCann, StepError):
        return
    assert not (wrong - right).abs().max() < 2 * ALLOWED * extent
