"""Quantised weights: rounding, what is chosen, on load against from a folder, alone against in a batch."""

from __future__ import annotations

import pytest
import tiny
import torch

from surefoot import canaries, ops
from surefoot.core.config import QUANT_SCHEMES, EngineConfig
from surefoot.core.errors import InputError, ModelError
from surefoot.core.sampling import SamplingParams
from surefoot.engine.engine import Engine
from surefoot.layers.quant_linear import quantised, shapes
from surefoot.models.registry import build
from surefoot.ops import cpu
from surefoot.ops.quant import dequantise_int4, pack_int4
from surefoot.quant.folder import write_quantised
from surefoot.quant.packing import pack_int8, unpack_int8
from surefoot.quant.schemes import (
    INT4_TOPS,
    SCHEMES,
    dequantise_int8,
    quantise_int4,
    quantise_int8,
    quantise_rows,
    scheme,
)
from surefoot.quant.select import in_effect, select, summarise
from surefoot.weights.checkpoint import Checkpoint
from surefoot.weights.load import random_weights

FAMILIES = ["llama-bias", "llama-tied", "qwen3.5", "qwen3.5-untied-equal-heads"]


def quantise_folder(folder, out, name, lm_head=False, group_size=None):
    checkpoint = Checkpoint(folder)
    model = build(checkpoint.config)
    chosen = select(shapes(model), scheme(name, group_size), model.quant_exclude, lm_head)
    write_quantised(checkpoint, out, chosen, tied=model.tied)
    return str(out)


def load(folder, **settings) -> Engine:
    return Engine.load(str(folder), EngineConfig(max_num_seqs=8, kv_cache_tokens=2048, **settings))


def test_the_settings_know_the_schemes():
    assert set(QUANT_SCHEMES) == set(SCHEMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_weight_is_off_by_more_than_half_a_step(dtype):
    weight = torch.randn(33, 256).to(dtype)
    weight[3], weight[4] = 0, weight[4] * 1e-6
    q, scale = quantise_int8(weight)
    assert ((dequantise_int8(q, scale) - weight.float()).abs() <= 0.5001 * scale[:, None]).all()
    assert q.abs().max() == 127 and (q[3] == 0).all()
    for group in (32, 128):
        packed, scale = quantise_int4(weight, group)
        groups = weight.float().unflatten(-1, (-1, group))
        error = (dequantise_int4(packed, scale).unflatten(-1, (-1, group)) - groups).abs()
        # What lies above 7.5 steps may lose one, all else half a step; a scale has 8 bits.
        steps = scale.float()[..., None]
        assert (error <= torch.where(groups > 7.4 * steps, 1.04, 0.54) * steps).all()
        for steps in INT4_TOPS:
            fixed = (groups.abs().amax(-1, keepdim=True) / steps).bfloat16().float()
            other = (groups / fixed.clamp_min(1e-38)).round().clamp(-8, 7) * fixed - groups
            assert (error.square().sum(-1) <= 1.0001 * other.square().sum(-1) + 1e-30).all()


def test_a_weight_that_holds_no_number_is_named():
    for name in SCHEMES:
        for bad in (float("nan"), float("inf")):
            weight = torch.randn(4, 64)
            weight[2, 5] = bad
            with pytest.raises(ModelError, match="layers.0.up_proj.weight holds NaN or infinity"):
                quantise_rows(weight, scheme(name), "layers.0.up_proj.weight")


@pytest.mark.parametrize("inner", [1, 4, 7, 64, 65])
def test_int8_packs_as_the_library_does(inner):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    q = torch.randint(-128, 128, (5, inner), dtype=torch.int8)
    packed = pack_int8(q)
    assert torch.equal(packed, helpers.pack_to_int32(q, 8))
    assert torch.equal(unpack_int8(packed, inner), q)


def test_int4_packs_as_the_library_does():
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    q = torch.randint(-8, 8, (5, 96), dtype=torch.int8)
    assert torch.equal(pack_int4(q), helpers.pack_to_int32(q, 4))


@pytest.mark.parametrize(
    ("name", "group", "says"),
    [
        ("w3a16", None, "unknown quantisation scheme 'w3a16': choose one of w8a16, w8a8, w4a16, w4a8"),
        ("w8a8", 32, "w8a8 has one scale per output channel and takes no group size"),
        ("w4a16", 48, "group size 48 is not supported: choose one of 32, 64, 128"),
    ],
)
def test_impossible_schemes(name, group, says):
    with pytest.raises(InputError) as error:
        scheme(name, group)
    assert str(error.value) == says


def test_what_is_kept_is_reported_with_its_reason():
    layers = {
        "model.layers.0.mlp.up_proj": (8, 64),
        "model.layers.0.mlp.down_proj": (64, 172),
        "model.layers.1.mlp.down_proj": (64, 172),
        "model.layers.0.linear_attn.in_proj_a": (4, 64),
        "lm_head": (99, 64),
    }
    chosen = select(layers, scheme("w4a16"), (r"lm_head", r".*\.in_proj_[ab]"))
    assert chosen.modules == ("model.layers.0.mlp.up_proj",)
    assert summarise(chosen.excluded) == [
        "model.layers.*.mlp.down_proj x 2 (172 inputs are no multiple of 32)",
        "model.layers.*.linear_attn.in_proj_a (excluded by the model)",
        "lm_head (excluded by the model)",
    ]
    assert "lm_head" in select(layers, scheme("w8a8"), (r"lm_head",), lm_head=True).modules
    with pytest.raises(InputError, match="nothing in this model can be quantised by w4a16, groups of 128"):
        select(layers, scheme("w4a16", 128), (r"lm_head",))
    assert in_effect([scheme("w4a16")] * 2, {}, "folder")["group_size"] == 32


@pytest.mark.parametrize("lm_head", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_on_load_and_from_a_folder_give_the_same_bits(family, name, lm_head, tmp_path):
    folder = tiny.save(tiny.reference(family), tmp_path / "full")
    full = load(folder, dtype="float32")
    on_load = load(folder, dtype="float32", quant=name, quant_lm_head=lm_head)
    stored = load(quantise_folder(folder, tmp_path / "quantised", name, lm_head), dtype="float32")
    prompts = tiny.prompts(3, full.vocab_size)
    for whole, one, other in zip(full.score(prompts), on_load.score(prompts), stored.score(prompts)):
        assert torch.equal(one, other)
        assert not torch.equal(one, whole)
    assert on_load.info.num_parameters == full.info.num_parameters
    assert on_load.info.weight_bytes == stored.info.weight_bytes - stored_shapes(stored)
    assert (on_load.info.quant["source"], stored.info.quant["source"]) == ("on load", "folder")
    for engine in (on_load, stored):
        assert engine.info.quant["scheme"] == name
        kept = any("lm_head" in text for text in engine.info.quant["excluded"])
        odd = name.startswith("w4") and full.info.architecture == "LlamaForCausalLM"  # 48 inputs
        assert kept != (lm_head and not odd)
    assert full.info.quant == {}


def stored_shapes(engine: Engine) -> int:
    """Bytes of the weight_shape tensors: read, compared, not kept."""
    return 16 * engine.info.quant["layers"] if engine.info.quant["scheme"] != "w8a8" else 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("family", ["llama-bias", "qwen3.5"])
def test_kernels_agree_with_the_readable_ops(family, name, dtype, tmp_path):
    folder = tiny.save(tiny.reference(family), tmp_path)
    fast, readable = (load(folder, dtype=dtype, quant=name, ops=policy) for policy in ("auto", "reference"))
    prompts = tiny.prompts(2, fast.vocab_size, lengths=(33, 5))
    for one, other in zip(fast.score(prompts), readable.score(prompts)):
        # A rounded activation may fall on the other side of a step, and random layers amplify that.
        limit = 0.05 if dtype == "bfloat16" or name.endswith("a8") else 3e-3
        assert (one - other).norm() < limit * other.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("canary", canaries.CANARIES)
def test_a_request_does_not_see_its_neighbours(canary, name, dtype):
    """Logits of every prompt token, and of the answer, bit by bit alone and in a batch of eight."""
    engine = load(canary, dtype=dtype, quant=name, enable_prefix_caching=False)
    prompts = tiny.prompts(8, engine.vocab_size, lengths=(9, 33, 1, 64, 17, 2, 40, 5))
    together = engine.score(prompts)
    for prompt, logits in zip(prompts, together):
        assert torch.equal(engine.score([prompt])[0], logits)
    params = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=3)
    batch = engine.generate(prompts, params)
    for prompt, completion in zip(prompts[:3], batch):
        (alone,) = engine.generate([prompt], params)
        assert alone.token_ids == completion.token_ids
        assert alone.logprobs == completion.logprobs


def test_random_weights_are_quantised_as_they_are_drawn(tmp_path):
    config = {**tiny.LLAMA, "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    full, model = build(config), build(config)
    random_weights(full, 3, "cpu", torch.bfloat16)
    from surefoot.layers.quant_linear import QuantiseOnLoad

    chosen = select(shapes(model), scheme("w8a8"), (), lm_head=True)
    report = random_weights(model, 3, "cpu", torch.bfloat16, converter=QuantiseOnLoad(chosen))
    weights = full.state_dict()
    assert set(quantised(model)) == set(chosen.modules) >= {"lm_head"}
    for name, layer in quantised(model).items():
        expected = quantise_rows(weights[f"{name}.weight"], chosen.scheme, name)
        assert torch.equal(layer.rows()[0], expected["weight"])
        assert torch.equal(layer.weight_scale, expected["weight_scale"])
    assert torch.equal(model.model.embed_tokens.weight, weights["model.embed_tokens.weight"])
    assert report.bytes == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("name", ["w8a16", "w8a8"])
@pytest.mark.parametrize("canary", canaries.CANARIES)
def test_int8_keeps_the_canaries_answers(canary, name):
    engine = load(canary, quant=name)
    for known in canaries.known_answers(canary)[::9]:
        if "messages" in known:
            ids = engine.tokenizer.encode_chat(known["messages"])
        else:
            ids = engine.tokenizer.encode(known["prompt"])
        (done,) = engine.generate([ids], SamplingParams(max_tokens=200))
        assert done.text == known["answer"]


@pytest.mark.parametrize("name", ["w8a16", "w8a8", "w4a16", "w4a8"])
def test_a_layer_packs_its_weights_once_and_gives_them_back(name):
    from surefoot.layers.quant_linear import QuantLinear

    x, weight = torch.randn(3, 192), torch.randn(48, 192)
    held = quantise_rows(weight, scheme(name, 64 if name.startswith("w4") else None), "w")
    stored = {leaf: tensor.clone() for leaf, tensor in held.items()}
    layer = QuantLinear(192, 48, scheme(name, 64 if name.startswith("w4") else None), None).hold(**held)
    with ops.use("reference"):
        before = layer(x)
        layer.finalize()
        layer.finalize()
        assert layer.layout == ("panels" if cpu.kernels else "rows")
        assert torch.equal(layer(x), before)
    qweight, scale = layer.rows()
    assert torch.equal(qweight, stored.get("weight", stored.get("weight_packed"))) and torch.equal(
        scale, stored["weight_scale"]
    )


def test_workers_run_alone_and_leave_the_setting_as_it_was():
    from surefoot.weights.workers import count, workers

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert count() == 2
        with workers() as pool:
            assert set(pool.map(lambda _: torch.get_num_threads(), range(4))) == {1}
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 2
        with workers() as pool:  # what threads born now inherit
            assert torch.get_num_threads() == 2
        with pytest.raises(KeyError), workers() as pool:
            pool.submit(dict().__getitem__, 1).result()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
