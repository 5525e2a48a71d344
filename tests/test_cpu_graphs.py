"""A CPU's captured decode steps: the kernels' calls again, bit by bit what an eager step computes."""

from __future__ import annotations

import pytest
import torch

from surefoot import canaries, ops
from surefoot.core.config import EngineConfig
from surefoot.core.errors import DeviceError, InputError
from surefoot.core.sampling import SamplingParams
from surefoot.device import get_device
from surefoot.engine.engine import Engine

PROMPTS = [[5, 6, 7], list(range(40, 90)), [9], list(range(3, 20))]
BASE = {"num_threads": 1, "kv_cache_tokens": 2048, "max_num_seqs": 6, "max_model_len": 256}


def load(model: str, **settings) -> Engine:
    return Engine.load(model, EngineConfig(**{**BASE, **settings}))


@pytest.mark.parametrize("model", canaries.CANARIES)
@pytest.mark.parametrize(
    "settings", [{"dtype": "float32"}, {"dtype": "bfloat16", "quant": "w8a8"}], ids=["fp32", "w8a8"]
)
def test_the_same_tokens_and_logits(model, settings):
    """Batches that grow, shrink and are padded; greedy and drawn, with log-probabilities that show every bit."""
    params = [
        SamplingParams(max_tokens=9 + 3 * i, ignore_eos=True, logprobs=3, temperature=0.7 * (i % 2), seed=i)
        for i in range(len(PROMPTS))
    ]
    eager, graphed = (
        load(model, graph="off", batch_buckets=(1, 2, 4, 6), **settings),
        load(model, graph="full", **settings),
    )
    for _ in range(2):
        wanted, found = eager.generate(PROMPTS, params), graphed.generate(PROMPTS, params)
        assert [c.token_ids for c in found] == [c.token_ids for c in wanted]
        assert [c.logprobs for c in found] == [c.logprobs for c in wanted]
    assert graphed.runner.graphs.replays > 20 and graphed.info.graph == "full"


def test_a_replay_calls_no_module():
    engine, seen = load("canary-llama", dtype="float32", graph="full"), []
    engine.model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    engine.generate([[5, 6, 7]], SamplingParams(max_tokens=9, ignore_eos=True))
    # The prefill is eager, and the first decode step is the capture.
    assert len(seen) == 2 and engine.runner.graphs.replays == 7


def test_replayed_results_lie_where_they_were():
    x, weight = torch.randn(2, 64), torch.randn(32, 64)

    def fn() -> torch.Tensor:
        y = ops.linear(x, weight)
        return torch.where(y > 0, y, -1.0).sum(-1, keepdim=True) * x[:, :1] + y.argmax(-1, keepdim=True)

    graph = get_device("cpu").capture(fn)
    at = graph.output.data_ptr()
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(graph.output, fn()) and graph.output.data_ptr() == at


def test_a_value_on_the_host_is_refused():
    x = torch.ones(3)
    with pytest.raises(DeviceError, match="--graph off"):
        get_device("cpu").capture(lambda: x * x.sum().item())


def test_the_first_step_of_a_size_is_its_capture():
    engine = load("canary-qwen3.5", dtype="float32", graph="full")
    graphs = engine.runner.graphs
    assert engine.info.batch_buckets == (1, 2, 3, 4, 5, 6) and graphs.captures == 0
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    first = [c.token_ids for c in engine.generate(PROMPTS[:3], params)]
    assert set(graphs._graphs) == {1, 3} and graphs.captures == 2
    assert [c.token_ids for c in engine.generate(PROMPTS[:3], params)] == first
    assert graphs.captures == 2


def test_auto_captures():
    engine = load("canary-llama", dtype="float32")
    assert engine.info.graph == "full" and engine.info.batch_buckets == (1, 2, 3, 4, 5, 6)


def test_without_kernels_there_is_nothing_to_record(monkeypatch):
    """PyTorch's calls, one by one and with all their results kept, took ten times as long as the eager step."""
    monkeypatch.setattr("surefoot.engine.graph_setup.kernels", None)
    with pytest.raises(InputError, match="--graph full is not possible: without the C.. kernels"):
        load("canary-llama", graph="full")
    assert load("canary-llama").info.graph == "off"
