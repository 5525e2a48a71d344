"""The streamed reference: equal to the plain one, and never more in memory than a layer or so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from surefoot import canaries
from surefoot.backends.transformers import TransformersBackend
from surefoot.core.config import EngineConfig
from surefoot.core.errors import ModelError
from surefoot.core.sampling import SamplingParams
from surefoot.verify.streamed import StreamedReference

OF_RANGE = 1e-6
CONFIGS = [
    "llama",
    "llama-bias",
    "llama-tied",
    "llama-rope-llama3",
    "llama-rope-dynamic",
    "qwen3.5",
    "qwen3.5-bias-one-kv-head",
]


def conditional(folder: Path) -> Path:
    """A Qwen3.5 folder as released: a multimodal container, its vision tower and an mtp head among the weights."""
    import transformers
    from safetensors.torch import load_file, save_file

    vision = {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
    config = transformers.Qwen3_5Config(
        text_config=tiny.QWEN, vision_config=vision, tie_word_embeddings=True, initializer_range=0.15
    )
    torch.manual_seed(3)
    transformers.Qwen3_5ForConditionalGeneration(config).float().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    assert any(name.startswith("model.language_model.layers.") for name in tensors)
    save_file(tensors | {"mtp.fc.weight": torch.zeros(2, 2)}, folder / "model.safetensors", {"format": "pt"})
    return folder


def worst(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    assert [o.shape for o in ours] == [t.shape for t in theirs]
    return max(float((o - t).abs().max() / (t.max() - t.min())) for o, t in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module", params=[*CONFIGS, "conditional"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    if request.param == "conditional":
        conditional(folder)
    else:
        tiny.save(tiny.reference(request.param), folder)
    return StreamedReference(str(folder)), TransformersBackend(str(folder), EngineConfig(dtype="float32"))


def test_logits_equal_the_plain_reference(pair):
    streamed, plain = pair
    asked = tiny.prompts(8, streamed.vocab_size)
    assert worst(streamed.score(asked), plain.score(asked)) <= OF_RANGE
    for layer in streamed.text.layers:
        assert all(p.is_meta for p in layer.parameters()), "a layer stayed in memory"


def test_captures_equal_under_the_same_paths(pair):
    streamed, plain = pair
    ids = tiny.prompts(6, streamed.vocab_size)[-1]
    ours, theirs = (b.capture(ids, with_inputs=True) for b in pair)
    assert ours.outputs.keys() == theirs.outputs.keys()
    assert ours.inputs.keys() == theirs.inputs.keys()
    assert "model.layers.1.mlp.down_proj" in ours.outputs
    for mine, other in ((ours.outputs, theirs.outputs), (ours.inputs, theirs.inputs)):
        for path, tensor in mine.items():
            torch.testing.assert_close(tensor, other[path], rtol=1e-5, atol=1e-5, msg=lambda m, p=path: f"{p}: {m}")
    assert worst([ours.logits], [theirs.logits]) <= OF_RANGE


def test_greedy_tokens_equal_the_plain_reference(pair):
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=2)
    asked = tiny.prompts(4, pair[0].vocab_size)
    ours, theirs = (b.generate(asked, params) for b in pair)
    assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]
    assert ours[2].logprobs[5].logprob == pytest.approx(theirs[2].logprobs[5].logprob, abs=1e-4)


@pytest.mark.parametrize("name", canaries.CANARIES)
def test_canaries_in_each_dtype(name):
    tokenizer = StreamedReference(name).tokenizer
    ids = [tokenizer.encode_chat(k["messages"]) for k in canaries.known_answers(name)[:3] if "messages" in k]
    for dtype in ("float32", "bfloat16"):
        plain = TransformersBackend(name, EngineConfig(dtype=dtype)).score(ids)
        assert worst(StreamedReference(name, getattr(torch, dtype)).score(ids), plain) <= OF_RANGE


def test_random_weights_are_the_engines(tmp_path):
    tiny.reference("qwen3.5").config.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["Qwen3_5ForCausalLM"]})
    )
    asked = tiny.prompts(3, 200)
    plain = TransformersBackend(str(tmp_path), EngineConfig(dtype="float32", random_weights=5))
    assert (
        worst(StreamedReference(str(tmp_path), config=EngineConfig(random_weights=5)).score(asked), plain.score(asked))
        <= OF_RANGE
    )


def test_what_does_not_fit_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tiny.save(tiny.reference("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][:5].clone()
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj.weight \(file \[5, 48\], model \[96, 48\]\), lm_head.weight"):
        StreamedReference(str(folder))


MEASURE = """
import json, sys, threading, torch
from pathlib import Path
torch.set_num_threads(1)
from surefoot.verify.streamed import StreamedReference

def status(key):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))
    return int(line.split()[1]) * 1024

reference = StreamedReference(sys.argv[1])
sequences = json.loads(sys.argv[2])
torch.ones(64, 64) @ torch.ones(64, 64)           # the libraries are loaded, no layer has been yet
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")     # the peak counts from here
for logits in reference.score_each(sequences):
    del logits
print(json.dumps({"grown": status("VmHWM") - before}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux' /proc")
def test_peak_memory_is_three_layers(tmp_path):
    """198 MB in bf16, 396 MB in fp32, in 14 layers."""
    import transformers

    hidden, inter, vocab, layers = 768, 2048, 2048, 14
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inter,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=12,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).bfloat16()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.save_pretrained(tmp_path)
    del model
    sequences = [list(range(i, i + 96)) for i in range(4)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), json.dumps(sequences)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    layer = 4 * (4 * hidden**2 + 3 * hidden * inter)
    embedding = 4 * vocab * hidden
    activations = 4 * 4 * 96 * (2 * hidden) + 4 * 96 * (4 * hidden + 3 * inter) + 4 * 96 * vocab
    grown = json.loads(done.stdout)["grown"]
    assert grown <= 3 * layer + embedding + activations, f"grew by {grown / 1e6:.0f} MB, a layer has {layer / 1e6:.0f}"
    assert 3 * layer + embedding + activations < 0.3 * 4 * (layer // 4 * layers)
