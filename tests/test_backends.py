"""Both backends behind one protocol: the same scores, the same tokens, the same module paths with the same values."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import tiny
import torch

from surefoot.backends import open_backend
from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError
from surefoot.core.sampling import SamplingParams


@pytest.fixture(scope="module", params=["llama-bias", "qwen3.5"])
def pair(request):
    """(ours, transformers') over one tiny checkpoint."""
    folder = str(tiny.save(tiny.reference(request.param), Path(tempfile.mkdtemp()) / request.param))
    config = EngineConfig(dtype="float32", max_model_len=256, kv_cache_tokens=2048, prefill_chunk_size=16)
    return open_backend("native", folder, config), open_backend("transformers", folder, config)


def test_scores_agree(pair):
    ours, theirs = pair
    for a, b in zip(*(backend.score(tiny.prompts(6, ours.vocab_size)) for backend in pair), strict=True):
        assert float((a - b).abs().max() / (b.max() - b.min())) <= 1e-4
    assert ours.vocab_size == theirs.vocab_size


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=24),
        SamplingParams(max_tokens=24, temperature=0.8, top_k=20, seed=5, repetition_penalty=1.2),
        SamplingParams(max_tokens=24, frequency_penalty=0.5, logit_bias={3: 5.0}, logprobs=2),
    ],
)
def test_generations_agree(pair, params):
    asked = tiny.prompts(4, pair[0].vocab_size, seed=3)
    ours, theirs = (backend.generate(asked, params) for backend in pair)
    assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]
    assert [c.finish_reason for c in ours] == [c.finish_reason for c in theirs]
    if params.logprobs is not None:
        for a, b in zip(ours[0].logprobs, theirs[0].logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_captures_have_the_same_paths_and_values(pair):
    """Chunked prefill on our side: 40 tokens in chunks of 16 come back as 40 rows."""
    (ids,) = tiny.prompts(1, pair[0].vocab_size, lengths=(40,))
    ours, theirs = (backend.capture(ids, with_inputs=True) for backend in pair)
    common = set(ours.outputs) & set(theirs.outputs)
    for name in ("model.embed_tokens", "model.layers.2", "model.layers.0.mlp.down_proj", "model.norm", "lm_head"):
        assert name in common
    assert len(common) >= 30
    for name in common:
        a, b = ours.outputs[name], theirs.outputs[name]
        if name.endswith("rotary_emb"):  # ours holds each angle once, transformers' twice
            b = b[:, : a.shape[1]]
        b = b.view(a.shape)  # transformers folds heads into rows before the gated norm
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
        assert len(ours.inputs[name]) == len(a) == 40, name


def test_a_capture_leaves_no_hooks_behind(pair):
    for backend in pair:
        model = backend.engine.model if hasattr(backend, "engine") else backend.model
        backend.capture([1, 2, 3], "model.norm")
        assert not any(m._forward_hooks for m in model.modules())


def test_random_weights_are_the_same_model_in_both():
    folder = Path(__file__).parents[1] / "surefoot" / "canaries" / "canary-qwen3.5"
    config = EngineConfig(dtype="float32", random_weights=3, max_model_len=64)
    ours, theirs = (open_backend(name, str(folder), config) for name in ("native", "transformers"))
    (a,), (b,) = ours.score([[5, 6, 7, 8]]), theirs.score([[5, 6, 7, 8]])
    assert float((a - b).abs().max() / (b.max() - b.min())) <= 1e-4


def test_unknown_backend_names_the_known_ones():
    with pytest.raises(InputError, match="native, transformers"):
        open_backend("magic", "canary-llama", EngineConfig())
