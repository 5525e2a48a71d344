"""The selftest passes on a right device and fails, naming the canary, when something is broken."""

from __future__ import annotations

import pytest
import tiny
import torch

from surefoot import canaries, ops
from surefoot.bringup import selftest
from surefoot.cli.main import run_cli
from surefoot.core.config import EngineConfig
from surefoot.core.errors import DeviceError
from surefoot.engine.engine import Engine
from tools import make_expected_logits


@pytest.fixture
def few_answers(monkeypatch):
    """Eight known answers instead of all, for speed."""
    all_answers = canaries.known_answers
    monkeypatch.setattr(canaries, "known_answers", lambda name: all_answers(name)[::25])


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


CONFIG = EngineConfig(num_threads=1)


@pytest.mark.parametrize("name", canaries.CANARIES)
def test_the_stored_logits_are_those_of_transformers(name):
    tiny.need_transformers_of(name)
    assert make_expected_logits.same(name, make_expected_logits.compute(name))
    assert (canaries.path(name) / selftest.EXPECTED_FILE).stat().st_size < 100_000


def test_a_right_device_passes(few_answers, capsys):
    assert run_cli(["selftest", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert out.count("ok  ") == 4 and "8 of 8 exact" in out
    assert out.splitlines()[-1].startswith("PASS: cpu computes both canaries right (4 checks")


def test_a_wrong_rope_base_is_found(few_answers, monkeypatch, capsys):
    load = Engine.load

    def load_broken(*args):
        engine = load(*args)
        engine.model.rotary.inv_freq *= 1.3
        return engine

    monkeypatch.setattr(Engine, "load", staticmethod(load_broken))
    assert run_cli(["selftest", "--dtype", "float32"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  canary-llama" in out and "FAIL  canary-qwen3.5" in out
    assert "of 8 exact; to " in out and "with --ops reference" in out


def test_not_a_number_fails(few_answers, monkeypatch):
    score = Engine.score
    monkeypatch.setattr(Engine, "score", lambda self, x: [torch.full_like(t, float("nan")) for t in score(self, x)])
    failed = [c for c in selftest.run(CONFIG, ("float32",)) if not c.passed]
    assert [c.what for c in failed] == ["logits", "logits"] and "largest error inf" in failed[0].detail


def test_a_crashing_kernel_is_a_finding_and_the_rest_goes_on(few_answers, monkeypatch):
    def crash(*args, **kwargs):
        raise RuntimeError("no kernel for this shape\nat line 7")

    delta = [spec for name, spec in ops.REGISTRY.items() if "gated_delta" in name or "delta_rule" in name]
    assert delta
    for spec in delta:
        monkeypatch.setattr(spec, "reference", crash)
        monkeypatch.setattr(spec, "implementations", [])
    checks = selftest.run(CONFIG, ("float32",))
    assert [(c.canary, c.passed) for c in checks] == [("canary-llama", True)] * 2 + [("canary-qwen3.5", False)] * 2
    assert checks[-1].detail.endswith("RuntimeError: no kernel for this shape at line 7")


def test_an_absent_device_is_one_error_and_no_table(capsys):
    with pytest.raises(DeviceError):
        selftest.run(EngineConfig(device="npu:63"), ("float32",))
    assert run_cli(["selftest", "--device", "npu:63"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1


def test_half_precision_is_within_its_tolerance(few_answers):
    assert all(c.passed for c in selftest.run(CONFIG, ("bfloat16",)))
