"""Where a target goes wrong and why: recipes against the reference, sound targets, faults of each kind, no guessing."""

from __future__ import annotations

import pytest
import torch

from surefoot.backends.native import NativeBackend
from surefoot.backends.transformers import TransformersBackend
from surefoot.core.config import EngineConfig
from surefoot.verify import causes, inject, opreplay, recipes, specimens
from surefoot.verify.candidates import Case
from surefoot.verify.candidates_attention import facts as attention_facts
from surefoot.verify.candidates_delta import facts as delta_facts
from surefoot.verify.faults import catalogue
from surefoot.verify.localise import localise, search, suspects
from surefoot.verify.pathcapture import PATHS, captures
from surefoot.verify.replay import Replay
from surefoot.verify.shapes import VerifySettings
from surefoot.verify.streamed import StreamedReference

TOKENS = 40
FAMILIES = ("llama", "qwen3.5")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("specimens")
    return {family: specimens.random(folder, family, 11) for family in FAMILIES}


@pytest.fixture(scope="module")
def references(models):
    with specimens.quiet():
        config = EngineConfig(dtype="float32")
        return {family: TransformersBackend(m.model_ref, config) for family, m in models.items()}


def target_of(specimen, dtype="float32", **more) -> NativeBackend:
    limits = {"max_model_len": 256, "kv_cache_tokens": 1024, "max_num_seqs": 8}
    return NativeBackend(specimen.model_ref, EngineConfig(dtype=dtype, **(limits | more)))


def tokens(count=TOKENS, seed=0) -> list[int]:
    return torch.randint(0, 199, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def settings_for(specimen) -> VerifySettings:
    return VerifySettings(specimen.model_ref)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_recipes_are_the_reference_modules(references, models, family):
    """Every mixer, step by step, gives what transformers' module gives."""
    replay = Replay(references[family], tokens())
    (on,) = captures(target_of(models[family]), tokens(), ["whole"])
    seen = 0
    for suspect in suspects(replay, on, torch.float32):
        case = Case(suspect, replay, {})
        if suspect.path.endswith("self_attn"):
            output = recipes.attention(attention_facts(case), case.x)
        elif suspect.path.endswith("linear_attn"):
            output = recipes.delta(delta_facts(case), case.x)
        else:
            continue
        seen += 1
        assert causes.apart(case, output) < 1
    assert seen == len(references[family].model.model.layers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_target_has_no_guilty_module_on_any_path(references, models, family, dtype):
    target = target_of(models[family], dtype)
    seen = [on.path for on in captures(target, tokens())]
    assert set(seen) == set(PATHS), "a path was left out"
    assert localise(references[family], target, tokens(), settings_for(models[family])) is None


def test_one_wrong_row_is_enough(references, models):
    """One token of many, off by a thousandth in one module: no average hides it."""

    def spoil(y):
        y = y.clone()
        y[33] *= 1.001
        return y

    target = target_of(models["llama"])
    with inject.output(inject.layer_with(target, "mlp", 1), spoil):
        place = localise(references["llama"], target, tokens(), settings_for(models["llama"]))
    assert place.module == "model.layers.1.mlp"
    (row,) = (r for r in place.table if r["path"] == place.module)
    assert row["token"] == 33
    # Later modules inherit the error; their own is not exceeded.
    after = place.table[place.table.index(row) + 1 :]
    assert all(r["own_error"] <= r["budget"] for r in after)


OPS = {"mask_off_by_one": "paged_attention", "kv_not_written": "kv_write", "kernel_tail": "swiglu"}


@pytest.mark.parametrize("name", OPS)
def test_the_op_is_named(references, models, name):
    fault, target = catalogue()[name], target_of(models["llama"])
    with fault.apply(target, 1.0):
        place, cause = causes.find(references["llama"], target, tokens(), settings_for(models["llama"]))
    assert (
        place.op == {"mask_off_by_one": "paged_attention", "kv_not_written": "kv_write", "kernel_tail": "swiglu"}[name]
    )
    assert cause.name in fault.names


def test_what_is_not_in_the_catalogue_gets_no_name(references, models):
    """A small random error outside any op has no candidate: better no cause than a wrong one."""
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0))
    target = target_of(models["llama"])
    with inject.output(inject.layer_with(target, "mlp", 1), lambda y: y + 0.01 * noise):
        place, cause = causes.find(references["llama"], target, tokens(), settings_for(models["llama"]))
    assert place.module == "model.layers.1.mlp"
    assert cause is None


def test_runner_up_is_far(references, models):
    target = target_of(models["llama"])
    with catalogue()["rope_layout"].apply(target, 1.0):
        found = search(references["llama"], target, tokens(), settings_for(models["llama"]))
        cause = causes.explain(found, target, settings_for(models["llama"]))
    assert cause.name == "rope_layout"
    assert cause.distance < 4 < cause.runner_up_distance


def test_eps_is_fitted_when_it_is_none_of_the_usual(references, models):
    target = target_of(models["llama"])
    norm = inject.layer_with(target, "input_layernorm", 2)
    with inject.attribute(norm, "eps", 3.7e-4):
        _, cause = causes.find(references["llama"], target, tokens(), settings_for(models["llama"]))
    assert cause.name == "norm_eps"
    assert "0.00037 instead of 1e-06" in cause.sentence


def test_a_streamed_reference_localises_too(models):
    """Layers come into memory when they are asked for."""
    specimen = models["qwen3.5"]
    with specimens.quiet():
        reference = StreamedReference(specimen.model_ref)
    target = target_of(specimen)
    assert search(reference, target, tokens(), settings_for(specimen), ["whole"]) is None
    fault = catalogue()["decay_wrong"]
    with fault.apply(target, 1.0):
        place, cause = causes.find(reference, target, tokens(), settings_for(specimen))
    assert place.module == "model.layers.1.linear_attn"
    assert cause.name == "decay_wrong"


def test_a_target_of_another_backend(references, models):
    """transformers as the target: one path, no ops of ours, the same verdict."""
    specimen = models["llama"]
    with specimens.quiet():
        target = TransformersBackend(specimen.model_ref, EngineConfig(dtype="bfloat16"))
    settings = settings_for(specimen)
    assert localise(references["llama"], target, tokens(), settings) is None
    target.model.model.layers[1].self_attn.scaling = 1 / 16
    place, cause = causes.find(references["llama"], target, tokens(), settings)
    assert place.module == "model.layers.1.self_attn"
    assert cause.name == "score_scale"


def test_nothing_stays_planted(references, models):
    """After its block a fault is gone, and watching leaves no trace in the op registry."""
    from surefoot.ops.spec import REGISTRY

    before = {name: list(spec.implementations) for name, spec in REGISTRY.items()}
    for family in FAMILIES:
        target = target_of(models[family])
        config = references[family].model.config
        (clean,) = target.score([tokens()])
        for fault in catalogue().values():
            if family in fault.models and fault.needs(config) and fault.where != "tokens":
                with fault.apply(target, 1.0):
                    pass
        (after,) = target.score([tokens()])
        assert torch.equal(clean, after)
        opreplay.guilty_op(target, "model.layers.0.mlp", "whole", tokens())
    assert before == {name: list(spec.implementations) for name, spec in REGISTRY.items()}
