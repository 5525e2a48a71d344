"""Quantised targets: proven against their own scheme, cost reported, faults of scales and groups named, folders."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from pathlib import Path

import pytest
import tiny
import torch

from surefoot.backends.native import NativeBackend
from surefoot.cli.main import run_cli
from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError
from surefoot.verify import drill, gate, report_text, run, sides, specimens
from surefoot.verify.candidates_quant import QUANTISED
from surefoot.verify.faults_quant import FAULTS
from surefoot.verify.proof import Proof
from surefoot.verify.quantised import QuantisedLinear, dequantised
from surefoot.verify.shapes import VerifySettings

SCHEMES = ("w8a16", "w8a8", "w4a16")
SMALL = {"skip_parity": True, "continuation_tokens": 8, "long_tokens": 96}
LIMITS = {"max_model_len": 512, "kv_cache_tokens": 8192}


def prove(model: str, plant=None, **changes) -> Proof:
    settings = VerifySettings(model, **(SMALL | changes))
    target = NativeBackend(model, settings.target_config(**LIMITS))
    with plant(target) if plant else contextlib.nullcontext():
        return run.verify(sides.open_reference(settings, getattr(torch, target.info()["dtype"])), target, settings)


@functools.cache
def folder(name: str) -> str:
    return str(tiny.save(tiny.reference(name), Path(tempfile.mkdtemp()) / name))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("model", ["canary-llama", "canary-qwen3.5"])
def test_canaries_are_proven_in_every_scheme(model, scheme):
    dtype = "bfloat16" if scheme == "w8a8" else "float32"
    proof = prove(model, quant=scheme, dtype=dtype)
    assert proof.verdict == "proven", [f.summary for f in proof.findings]
    assert "quantised" in proof.finding("weights").summary
    cost = proof.finding("cost").details
    assert 0 < cost["sides"]["target"]["mean"] < 0.1
    assert cost["sides"]["target"]["agreement"] > 0.8
    assert ("dtype" in cost["sides"]) == (dtype == "bfloat16")
    assert cost["sides"]["target"]["perplexity"] == pytest.approx(cost["perplexity"], rel=0.2)
    text = report_text.lines(proof)
    assert scheme in text[0]
    assert any(line.strip().startswith("cost") and "KL" in line for line in text)


@pytest.mark.parametrize("scheme, dtype", [("w8a8", "float32"), ("w8a16", "bfloat16"), ("w4a16", "float16")])
def test_random_models_and_their_paths_are_proven(scheme, dtype):
    proof = prove(folder("qwen3.5"), quant=scheme, dtype=dtype, skip_parity=False)
    assert proof.verdict == "proven", [f.summary for f in proof.findings]
    assert sum(f.check == "parity" and f.status == "pass" for f in proof.findings) > 5


def test_random_weights_and_a_streamed_reference(tmp_path):
    (tmp_path / "config.json").write_bytes((Path(folder("llama")) / "config.json").read_bytes())
    for changes in ({"random_weights": 3}, {"streamed_reference": True}):
        model = str(tmp_path) if "random_weights" in changes else folder("llama")
        proof = prove(model, quant="w4a16", quant_group_size=None, dtype="bfloat16", **changes)
        assert proof.verdict == "proven", [f.summary for f in proof.findings]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantised_folder_is_proven_and_its_cost_counted_from_the_base(scheme, tmp_path):
    out = str(tmp_path / "q")
    assert run_cli(["quantize", "canary-llama", "--scheme", scheme, "-o", out]) == 0
    proof = prove(out, dtype="bfloat16", base="canary-llama")
    assert proof.verdict == "proven", [f.summary for f in proof.findings]
    assert proof.finding("cost").details["sides"]["target"]["mean"] > 0
    if scheme == "w8a16":
        alone = prove(out, dtype="bfloat16")
        assert alone.finding("cost") is None
        assert "--base" in alone.data["notes"][0]
        with pytest.raises(InputError, match="quantised already"):
            prove(out, quant="w8a16")
        with pytest.raises(InputError, match="quantised itself"):
            prove(out, base=out)


def test_a_quantised_head_is_part_of_it():
    proof = prove("canary-llama", quant="w8a8", quant_lm_head=True, dtype="bfloat16")
    assert proof.verdict == "proven", [f.summary for f in proof.findings]
    assert proof.finding("head").status == "pass"


def test_the_reference_has_the_targets_numbers_without_its_loader():
    settings = VerifySettings("canary-llama", quant="w4a16", dtype="float32")
    reference = sides.open_reference(settings)
    ours = NativeBackend("canary-llama", settings.target_config(**LIMITS)).engine.model
    path = "model.layers.1.mlp.up_proj"
    layer = reference.model.get_submodule(path)
    assert isinstance(layer, QuantisedLinear)
    assert torch.equal(layer.weight, dequantised(ours.get_submodule(path)))
    assert torch.equal(layer.integers * layer.spread(layer.scales), layer.weight)
    stays = reference.model.to(torch.bfloat16).get_submodule(path)
    assert stays.weight.dtype == torch.float32


# ---- faults


@pytest.fixture(scope="module")
def random_llama(tmp_path_factory):
    return specimens.random(tmp_path_factory.mktemp("specimen"), "llama", 31)


@pytest.fixture(scope="module")
def gallery():
    return drill.Range()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.id)
def test_a_fault_in_a_quantised_kernel_is_named(fault, random_llama, gallery):
    outcome = gallery.shoot(drill.Case(random_llama, "float32", fault))
    assert outcome.right_module and outcome.right_cause, outcome
    assert outcome.op in ("linear_w8", "linear_w4")


def test_every_quantised_mistake_of_the_faults_is_a_candidate():
    assert {name for fault in FAULTS for name in fault.names} <= {candidate.name for candidate in QUANTISED}


@contextlib.contextmanager
def altered(leaf: str, change, target):
    parameter = target.engine.model.get_parameter(f"model.layers.1.mlp.up_proj.{leaf}")
    with torch.no_grad():
        parameter.copy_(change(parameter.clone()))
    yield


@pytest.mark.parametrize(
    "leaf, change", [("weight_scale", lambda s: s * s), ("weight_scale", lambda s: s.roll(1)), ("weight", lambda q: -q)]
)
def test_what_is_held_in_memory_is_compared(leaf, change):
    proof = prove(folder("llama"), functools.partial(altered, leaf, change), quant="w8a16", dtype="float32")
    failed = next(f for f in proof.findings if f.status == "fail")
    assert proof.verdict == "refuted"
    assert failed.check == "weights" and "model.layers.1.mlp.up_proj" in failed.summary


def test_weights_that_are_not_the_nearest_are_refuted():
    given = {"items": [], "missing": [], "unexpected": [], "tied": [], "source": "checkpoint"}
    given["steps"] = [["a.weight", 0.5, 0.501], ["b.weight", 0.7, 0.501]]
    (found,) = gate.examine("weights", {"weights": given})
    assert found.status == "fail" and "b.weight" in found.summary


# ---- the command


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--quant", "int3"], "unknown quantisation scheme"),
        (["--base", "canary-llama"], "--base"),
        (["--quant", "w8a8", "--backend", "transformers"], "transformers"),
        (["--quant", "w8a8", "--quant-lm-head", "--streamed-reference"], "streamed"),
    ],
)
def test_what_cannot_be_done_is_one_line(argv, says, capsys):
    assert run_cli(["verify", "canary-llama", *argv]) == 2
    err = capsys.readouterr().err.splitlines()
    assert says in err[-1]


def test_a_plain_target_is_not_a_quantised_one():
    """A target that ignores the scheme is refuted by its weights."""
    settings = VerifySettings(folder("llama"), quant="w8a8", dtype="float32", **SMALL)
    target = NativeBackend(settings.model, EngineConfig(dtype="float32", **LIMITS))
    proof = run.verify(sides.open_reference(settings), target, settings)
    assert proof.verdict == "refuted"
    assert next(f.check for f in proof.findings if f.status == "fail") == "weights"
