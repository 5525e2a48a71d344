"""The drill: a sample of it as it is, its arithmetic on made-up outcomes, prompts and sampling, the smallest faults."""

from __future__ import annotations

import pytest
import torch

from surefoot.backends.native import NativeBackend
from surefoot.backends.transformers import TransformersBackend
from surefoot.canaries import path
from surefoot.core.config import EngineConfig
from surefoot.verify import drill, drill_page, specimens
from surefoot.verify.drill_record import Record
from surefoot.verify.faults import CAUSE_CLASSES, Fault, catalogue
from surefoot.verify.measure import Measurer
from surefoot.verify.prompt_causes import name_prompt_cause, prompt_mistakes, sampler_cause
from surefoot.verify.sensitivity import smallest_faults
from surefoot.weights.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def sample():
    return drill.run(sample=True)


def lines(outcomes) -> str:
    return "\n".join(f"{o.case.fault and o.case.fault.id} {o.case.name}: {o.verdict} {o.line} {o}" for o in outcomes)


def test_every_planted_fault_is_found_placed_and_named(sample):
    assert len({o.case.fault.cause for o in sample.planted}) == len(CAUSE_CLASSES)
    missed = [o for o in sample.planted if not o.detected]
    assert not missed, lines(missed)
    misplaced = [o for o in sample.planted if not o.right_module]
    assert sample.share(lambda o: o.right_module) >= drill.RIGHT_MODULE, lines(misplaced)
    misnamed = [o for o in sample.planted if not o.right_cause]
    assert sample.share(lambda o: o.right_cause) >= drill.RIGHT_CAUSE, lines(misnamed)


def test_no_sound_run_is_refused(sample):
    assert {o.case.dtype for o in sample.sound} == {"float32", "bfloat16", "float16"}
    assert not sample.false_alarms, lines(sample.false_alarms)


def test_the_page_says_what_happened(sample):
    text = drill_page.page(sample)
    for fault in {o.case.fault.id for o in sample.planted}:
        assert f"| {fault} |" in text
    assert f"0 of {len(sample.sound)} sound runs" in text
    assert "✗" not in text


def test_the_catalogue_covers_every_class():
    faults = catalogue()
    assert len(faults) >= 30
    assert {f.cause for f in faults.values()} == set(CAUSE_CLASSES)


def outcome(fault: Fault | None, verdict="refuted", module=None, cause=None, check="layers") -> drill.Outcome:
    case = drill.Case(specimens.Specimen("m", "llama", "random", "m"), "float32", fault)
    return drill.Outcome(case, verdict, check, "", module, None, cause, "", None, 0.0)


def test_the_drill_counts_what_it_should():
    fault = catalogue()["norm_eps"]
    right = outcome(fault, module="model.layers.1.input_layernorm", cause="norm_eps")
    assert right.detected and right.right_module and right.right_cause
    assert not outcome(fault, module="model.layers.2.input_layernorm").right_module
    assert not outcome(fault, "proven", module="model.layers.1.input_layernorm", cause="norm_eps").right_cause
    assert not outcome(fault, "undecided").detected
    assert outcome(catalogue()["double_bos"], check="template").right_module
    good = drill.DrillResult([right, outcome(None, "proven")])
    assert good.passed and good.confusion() == {"norm_eps": {"norm_eps": 1}}
    assert not drill.DrillResult([right, outcome(None, "refuted")]).passed
    assert not drill.DrillResult([right, outcome(fault, "proven")]).passed


def test_a_drill_that_was_stopped_goes_on(tmp_path, monkeypatch):
    """What is on file is not run again; half a line is dropped, and so is all that other code has said."""
    keep = tmp_path / "drill.jsonl"
    case = drill.Case(specimens.canary("canary-llama"), "float32")
    shot = []
    monkeypatch.setattr(drill, "models_in", lambda *_: [case.specimen])
    monkeypatch.setattr(drill, "fault_cases", lambda *_: [])
    monkeypatch.setattr(drill, "sound_cases", lambda *_: [case, drill.Case(case.specimen, "bfloat16")])
    monkeypatch.setattr(drill.Range, "shoot", lambda self, c: shot.append(c.key) or outcome(None, "proven"))
    first = drill.run(sample=True, keep=keep)
    assert len(shot) == 2 and len(first.sound) == 2
    keep.write_text(keep.read_text()[:-5])
    again = drill.run(sample=True, keep=keep)
    assert shot[2:] == ["sound: canary-llama bfloat16 seed=0"]
    assert [o.case.dtype for o in again.sound] == ["float32", "bfloat16"]
    assert set(Record(keep).values) == set(shot)
    monkeypatch.setattr("surefoot.verify.drill_record.code_digest", lambda: "other")
    assert not Record(keep).values


def test_prompt_mistakes_are_told_apart():
    tokenizer = Tokenizer.load(path("canary-llama"))
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    right = tokenizer.encode_chat(messages)
    assert name_prompt_cause(tokenizer, messages, right) is None
    for name, _, ids in prompt_mistakes(tokenizer, messages):
        if ids != right:
            assert name_prompt_cause(tokenizer, messages, ids).name == name or ids in [
                other for n, _, other in prompt_mistakes(tokenizer, messages) if n != name
            ]
    assert name_prompt_cause(tokenizer, messages, [*right, 5, 5]) is None


def test_a_sampling_default_is_found_by_its_effect():
    rows = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    greedy = rows.argmax(-1).tolist()
    assert sampler_cause([1, 2, 3], greedy, rows) is None
    penalised = []
    for row in rows:
        changed = row.clone()
        ids = torch.tensor(sorted({*greedy, 1, *penalised}))
        changed[ids] = torch.where(changed[ids] > 0, changed[ids] / 1.3, changed[ids] * 1.3)
        penalised.append(int(changed.argmax()))
    assert "repetition_penalty 1" in sampler_cause([*greedy, 1], penalised, rows).sentence
    worst = rows.argmin(-1).tolist()
    assert "drawn" in sampler_cause([1], worst, rows).sentence


def test_the_smallest_fault_is_measured(tmp_path):
    """Small faults pass, larger ones do not, and the border lies where the dtype's noise is."""
    specimen = specimens.random(tmp_path, "qwen3.5", 21)
    ids = torch.randint(0, 199, (80,), generator=torch.Generator().manual_seed(3)).tolist()
    borders = {}
    with specimens.quiet():
        reference = TransformersBackend(specimen.model_ref, EngineConfig(dtype="float32"))
        for dtype in ("float32", "bfloat16"):
            expected = reference
            if dtype != "float32":
                expected = TransformersBackend(specimen.model_ref, EngineConfig(dtype=dtype))
            target = NativeBackend(specimen.model_ref, EngineConfig(dtype=dtype, max_model_len=128))
            found = smallest_faults(Measurer(reference, expected, target, getattr(torch, dtype)), ids)
            borders[dtype] = {f["fault"]: f["seen"] for f in found}
    assert set(borders["float32"]) >= {"norm_eps", "gain", "rope_theta", "mask_leak", "one_token", "state_rounding"}
    assert borders["float32"]["gain"] < 1e-4 < borders["bfloat16"]["gain"] < 0.1
    assert borders["float32"]["one_token"] < 1e-3
    assert borders["float32"]["state_rounding"] < 2**-8, "a bf16 state would pass"
