"""Whole verifications: sound models are proven, each kind of fault is refuted at its check, bad input is one line."""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from pathlib import Path

import pytest
import tiny
import torch

from surefoot.backends import open_backend
from surefoot.backends.native import NativeBackend
from surefoot.cli.main import run_cli
from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError
from surefoot.verify import continuation, drill, run
from surefoot.verify.proof import Proof
from surefoot.verify.shapes import VerifySettings

SMALL = {"skip_parity": True, "continuation_tokens": 12, "long_tokens": 128}
LIMITS = {"max_model_len": 512, "kv_cache_tokens": 8192}


@functools.cache
def folder(name: str) -> str:
    return str(tiny.save(tiny.reference(name), Path(tempfile.mkdtemp()) / name))


@functools.cache
def reference(model: str):
    return open_backend("transformers", model, EngineConfig(dtype="float32"))


def target(settings: VerifySettings) -> NativeBackend:
    return NativeBackend(settings.model, settings.target_config(**LIMITS))


def prove(model: str, plant=None, partial: Path | None = None, **changes) -> Proof:
    settings = VerifySettings(model, **(SMALL | changes))
    backend = target(settings)
    with plant(backend) if plant else contextlib.nullcontext():
        return run.verify(reference(model), backend, settings, partial=partial)


def failed(proof: Proof) -> str | None:
    return next((f.check for f in proof.findings if f.status == "fail"), None)


# ---- sound models


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["canary-llama", "canary-qwen3.5"])
def test_canaries_are_proven(model, dtype):
    tiny.need_transformers_of(model)
    proof = prove(model, dtype=dtype, long_tokens=200)
    assert proof.verdict == "proven", [f.summary for f in proof.findings]
    status = {f.check: f.status for f in proof.findings}
    assert {c for c, s in status.items() if s != "pass"} == {"parity"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "llama-bias", "llama-tied", "qwen3.5", "qwen3.5-untied-equal-heads"])
def test_random_models_are_proven(name, dtype):
    proof = prove(folder(name), dtype=dtype)
    assert proof.verdict == "proven", [f.summary for f in proof.findings]


def test_the_paths_of_the_engine_are_part_of_a_proof(tmp_path):
    proof = prove(folder("llama"), dtype="float32", skip_parity=False)
    assert proof.verdict == "proven"
    assert sum(f.check == "parity" for f in proof.findings) > 5


def test_random_weights_need_only_a_config(tmp_path):
    whole = Path(folder("llama"))
    (tmp_path / "config.json").write_bytes((whole / "config.json").read_bytes())
    settings = VerifySettings(str(tmp_path), random_weights=3, dtype="bfloat16", **SMALL)
    proof = run.verify(run.open_reference(settings), target(settings), settings)
    assert proof.verdict == "proven", [f.summary for f in proof.findings]
    assert "reference" in proof.finding("weights").summary


def test_transformers_and_a_streamed_reference_as_sides():
    settings = VerifySettings(folder("llama"), backend="transformers", dtype="bfloat16", **SMALL)
    proof = run.verify(reference(settings.model), run.open_target(settings), settings)
    assert proof.verdict == "proven", [f.summary for f in proof.findings]
    settings = VerifySettings(folder("llama"), dtype="bfloat16", streamed_reference=True, **SMALL)
    proof = run.verify(run.open_reference(settings), target(settings), settings)
    assert proof.verdict == "proven", [f.summary for f in proof.findings]


# ---- faults, one for each check


@contextlib.contextmanager
def scaled(path: str, factor: float, backend):
    handle = backend.engine.model.get_submodule(path).register_forward_hook(lambda m, a, out: out * factor)
    yield
    handle.remove()


@contextlib.contextmanager
def other_template(backend):
    tokenizer = backend.engine.tokenizer
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    yield


@contextlib.contextmanager
def double_bos(backend):
    tokenizer = backend.engine.tokenizer
    right = tokenizer.encode_chat
    tokenizer.encode_chat = lambda messages, **more: [tokenizer.bos_token_id, *right(messages, **more)]
    yield


@contextlib.contextmanager
def spoilt_weight(backend):
    with torch.inference_mode():
        backend.engine.model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 5] += 0.01
    yield


@contextlib.contextmanager
def wrong_eps(backend):
    backend.engine.model.get_submodule("model.layers.1.input_layernorm").eps *= 10
    yield


@contextlib.contextmanager
def no_offset(backend):
    norm = backend.engine.model.get_submodule("model.layers.1.input_layernorm")
    norm.scale = norm.scale - 1
    yield


@contextlib.contextmanager
def wrong_theta(backend):
    backend.engine.model.rotary.inv_freq *= 0.99
    yield


@contextlib.contextmanager
def repetition_penalty(backend):
    from dataclasses import replace

    def penalised(prompts, params):
        each = params if isinstance(params, list) else [params] * len(prompts)
        return right(prompts, [replace(p, repetition_penalty=3.0) for p in each])

    right = backend.engine.generate
    backend.engine.generate = penalised
    yield


def mlp(factor):
    return functools.partial(scaled, "model.layers.1.mlp.down_proj", factor)


def head(factor):
    return functools.partial(scaled, "lm_head", factor)


@pytest.mark.parametrize(
    "check, model, dtype, plant",
    [
        ("template", "canary-llama", "float32", other_template),
        ("tokens", "canary-llama", "float32", double_bos),
        ("weights", "llama", "bfloat16", spoilt_weight),
        ("config", "llama", "bfloat16", wrong_eps),
        ("config", "llama", "bfloat16", wrong_theta),
        ("config", "qwen3.5", "float32", no_offset),
        ("layers", "llama", "float32", mlp(1.0001)),
        ("layers", "llama", "bfloat16", mlp(1.02)),
        ("layers", "qwen3.5", "float16", mlp(1.01)),
        ("layers", "qwen3.5", "bfloat16", mlp(float("nan"))),
        ("head", "llama", "bfloat16", head(1.01)),
        ("head", "qwen3.5", "float32", head(1.0001)),
        ("sampler", "canary-llama", "float32", repetition_penalty),
    ],
)
def test_each_fault_is_refuted_at_its_check(check, model, dtype, plant):
    proof = prove(model if model.startswith("canary") else folder(model), plant, dtype=dtype)
    assert proof.verdict == "refuted"
    assert failed(proof) == check, [f.summary for f in proof.findings]
    after = [f.status for f in proof.findings][[f.check for f in proof.findings].index(check) + 1 :]
    assert set(after) <= {"not_reached"}
    if check == "layers":
        assert proof.finding("layers").details["module"].startswith("model.layers.1.mlp")
        assert proof.data["localisation"]["module"].startswith("model.layers.1.mlp")


def test_one_wrong_row_among_many_is_refuted():
    class OneWrongRow:
        """Wraps a backend: the logits of one token of the long text are those of its neighbour."""

        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def score(self, sequences):
            scored = [logits.clone() for logits in self.inner.score(sequences)]
            for logits in scored:
                if len(logits) > 100:
                    logits[77] = logits[78]
            return scored

    settings = VerifySettings(folder("llama"), dtype="bfloat16", **SMALL)
    proof = run.verify(reference(settings.model), OneWrongRow(target(settings)), settings)
    assert failed(proof) == "logits"
    assert "position 77" in proof.finding("logits").summary


def test_a_failing_search_for_the_module_leaves_the_verdict(monkeypatch):
    from surefoot.verify import causes

    def broken(*args):
        raise RuntimeError("no\nidea")

    monkeypatch.setattr(causes, "find", broken)
    proof = prove(folder("llama"), mlp(1.5), dtype="bfloat16")
    assert proof.verdict == "refuted"
    assert "no idea" in proof.data["notes"][0]


# ---- the reference's continuation


def test_drafting_gives_the_reference_s_own_answers():
    """Whoever drafts, and however badly."""
    name = folder("qwen3.5")
    right = reference(name)
    prompts = [[1, 2, 3], [7] * 9, [5]]

    def plain(count):
        from surefoot.core.sampling import SamplingParams

        done = right.generate(prompts, SamplingParams(max_tokens=count, ignore_eos=True))
        return [p + c.token_ids for p, c in zip(prompts, done)]

    good, bad = NativeBackend(name, EngineConfig(dtype="float32", **LIMITS)), None
    bad = NativeBackend(name, EngineConfig(dtype="bfloat16", **LIMITS))
    wanted = plain(16)
    assert continuation.greedy(right, good, prompts, 16, 400) == wanted
    with scaled("model.layers.0", -1.0, bad):
        assert continuation.greedy(right, bad, prompts, 16, 400) == wanted
    assert [len(s) for s in continuation.greedy(right, good, prompts, 16, 12)] == [12, 12, 12]


# ---- bad input and interruptions


def test_two_different_models_are_one_line():
    settings = VerifySettings(folder("llama"), dtype="float32", **SMALL)
    with pytest.raises(InputError, match="two different models: the reference has 199 .* the target 211"):
        run.verify(reference(folder("llama")), target(VerifySettings(folder("qwen3.5"))), settings)
    with pytest.raises(InputError, match="two different models: .*k_proj.weight has shape"):
        run.verify(reference(folder("llama")), target(VerifySettings(folder("llama-one-kv-head"))), settings)


def test_tokenizers_of_different_size_are_one_line():
    settings = VerifySettings("canary-llama", **SMALL)
    backend = target(settings)
    backend.engine.tokenizer.vocab_size += 1
    with pytest.raises(InputError, match="two different tokenizers: the reference's has"):
        run.verify(reference("canary-llama"), backend, settings)


def test_an_interrupted_run_leaves_partial_evidence(tmp_path):
    partial = tmp_path / "proof.partial.json"

    @contextlib.contextmanager
    def interrupted(backend):
        def score(sequences):
            raise KeyboardInterrupt

        backend.score = score
        yield

    with pytest.raises(KeyboardInterrupt):
        prove(folder("llama"), interrupted, partial, dtype="float32")
    proof = Proof.load(partial)
    assert proof.partial
    assert proof.verdict == "undecided"
    assert proof.finding("weights").status == "pass"
    assert proof.finding("logits").status == "not_reached"
    assert proof.check() == []


def test_prompts_from_files(tmp_path):
    (tmp_path / "p.txt").write_text("Hello there\n\n中国的首都是哪里?\n", encoding="utf-8")
    lines = [{"messages": [{"role": "user", "content": "hi"}]}, {"prompt": "你好"}, {"turns": ["one", "two"]}]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(x) for x in lines), encoding="utf-8")
    for name, count in (("p.txt", 2), ("p.jsonl", 3)):
        proof = prove("canary-llama", dtype="float32", prompts=tmp_path / name)
        assert proof.verdict == "proven"
        assert proof.data["prompts"]["count"] == count
    for name, text in (("bad.jsonl", "{"), ("empty.txt", "\n"), ("odd.jsonl", '{"x": 1}'), ("nil.jsonl", "[]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError):
            prove("canary-llama", prompts=tmp_path / name)
    with pytest.raises(InputError, match="cannot read"):
        prove("canary-llama", prompts=tmp_path / "none.txt")


# ---- the command


def test_the_command_writes_a_proof_and_says_so(tmp_path, capsys):
    path = tmp_path / "proof.json"
    argv = ["verify", folder("llama"), "--dtype", "bfloat16", "--skip-parity", "--no-sensitivity", "-o", str(path)]
    assert run_cli(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith("PROVEN")
    assert len(out.splitlines()) < 25
    assert [p.name for p in tmp_path.iterdir()] == ["proof.json"]
    assert run_cli(["proof", "check", str(path)]) == 0


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--graph", "yes"], "graph must be"),
        (["--backend", "vllm", "--url", "http://localhost:1"], "--url"),
        (["--backend", "nonsense"], "unknown backend"),
        (["--dtype", "int8"], "unknown dtype"),
        (["-o", "/no/such/folder/p.json"], "cannot write"),
    ],
)
def test_what_cannot_be_done_is_one_line(argv, says, capsys):
    assert run_cli(["verify", "canary-llama", *argv]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("verdict, code", [("proven", 0), ("refuted", 1)])
def test_the_drill_is_a_flag(verdict, code, capsys, monkeypatch):
    """Its page goes to the screen, its outcome is the exit code; the drill itself: tests/test_drill.py."""
    canary, fault = drill.specimens.canary("canary-llama"), drill.catalogue()["norm_eps"]
    found = ("layers", "", "model.layers.1.input_layernorm", None, "norm_eps", "", None, 0.1)
    planted = drill.Outcome(drill.Case(canary, "float32", fault), "refuted", *found)
    sound = drill.Outcome(drill.Case(canary, "float32"), verdict, None, "", None, None, None, "", None, 0.1)
    monkeypatch.setattr(drill, "run", lambda progress: drill.DrillResult([planted, sound]))
    assert run_cli(["verify", "--drill"]) == code
    assert f"{code} of 1 sound runs" in capsys.readouterr().out


def test_no_model_is_one_line(capsys):
    assert run_cli(["verify"]) == 2
    assert "which MODEL" in capsys.readouterr().err
