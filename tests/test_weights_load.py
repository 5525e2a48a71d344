"""Strict loading: all tensors accounted for, right values and dtypes, ties shared, bounded memory; random weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from surefoot.core.config import EngineConfig
from surefoot.core.errors import ModelError
from surefoot.engine.engine import Engine
from surefoot.weights import mapped, reader
from surefoot.weights.checkpoint import Checkpoint
from surefoot.weights.load import load_weights, random_weights

VOCAB, HIDDEN = 11, 6


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(HIDDEN, 4 * HIDDEN)
        self.A_log = nn.Parameter(torch.empty(HIDDEN))
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("cos", torch.zeros(3), persistent=False)


class Tiny(nn.Module):
    """The contract between a model and its loader, in small."""

    ignored = (r"mtp\.", r".*\.rotary_emb\.inv_freq$")

    def __init__(self, tied: bool = True, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, hidden)
        self.layers = nn.ModuleList([Mixer(), Mixer()])
        self.lm_head = nn.Linear(hidden, VOCAB, bias=False)
        self.tied = {"lm_head.weight": "embed_tokens.weight"} if tied else {}
        self.finalized = 0

    def param_dtype(self, name: str, default: torch.dtype) -> torch.dtype:
        return torch.float32 if name.endswith("A_log") else default

    def init_weight(self, name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
        if tensor.is_floating_point():
            tensor.normal_(0.0, 0.02, generator=generator)
        else:
            tensor.fill_(7)

    def finalize(self) -> None:
        assert all(not p.is_meta for p in self.parameters())
        self.finalized += 1
        for layer in self.layers:
            layer.cos = torch.ones(3)


def tiny(**kwargs) -> Tiny:
    with torch.device("meta"):
        return Tiny(**kwargs)


def tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = {}
    for name, slot in tiny().state_dict().items():
        if name == "lm_head.weight":
            continue
        if slot.is_floating_point():
            kept = torch.float32 if name.endswith("A_log") else dtype
            made[name] = torch.randn(slot.shape, generator=generator).to(kept)
        else:
            made[name] = torch.arange(slot.numel()).reshape(slot.shape)
    return made


def folder_with(path: Path, weights: dict[str, torch.Tensor], config: dict | None = None) -> Checkpoint:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {}))
    save_file({k: v.contiguous() for k, v in weights.items()}, path / "model.safetensors")
    return Checkpoint(path)


def complaint(model: nn.Module, checkpoint: Checkpoint) -> str:
    with pytest.raises(ModelError) as error:
        load_weights(model, checkpoint, "cpu", torch.float32)
    assert "\n" not in str(error.value)
    assert all(p.is_meta for p in model.parameters()), "a refused checkpoint leaves the model as it was"
    return str(error.value)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_values_dtypes_and_ties(tmp_path, stored, held):
    weights = tensors(stored)
    extra = {"mtp.layer.weight": torch.ones(2), "layers.0.rotary_emb.inv_freq": torch.ones(2), "mtp.b": torch.ones(1)}
    checkpoint = folder_with(tmp_path, {**weights, **extra})
    model, steps = tiny(), []
    report = load_weights(model, checkpoint, "cpu", held, progress=lambda what, done: steps.append(done))
    for name, slot in model.state_dict(keep_vars=True).items():
        source = weights["embed_tokens.weight" if name == "lm_head.weight" else name]
        dtype = source.dtype if not slot.is_floating_point() else torch.float32 if name.endswith("A_log") else held
        assert slot.dtype == dtype and not slot.requires_grad
        assert torch.equal(slot, source.to(dtype)), name
    assert model.lm_head.weight is model.embed_tokens.weight
    assert isinstance(model.lm_head.weight, nn.Parameter)
    assert model.finalized == 1
    assert report.used == len(weights) and report.ignored == {r"mtp\.": 2, r".*\.rotary_emb\.inv_freq$": 1}
    assert report.bytes == sum(t.nbytes for n, t in model.state_dict().items() if n != "lm_head.weight")
    assert steps == sorted(steps) and steps[-1] == 1.0


def test_everything_wrong_is_in_one_message(tmp_path):
    weights = tensors()
    del weights["layers.1.A_log"], weights["layers.0.steps"]
    weights["layers.0.extra.weight"] = torch.ones(1)
    weights["layers.0.in_proj.weight"] = torch.ones(3, 2)
    message = complaint(tiny(), folder_with(tmp_path, weights))
    assert "2 missing: layers.0.steps, layers.1.A_log" in message
    assert "1 unexpected: layers.0.extra.weight" in message
    assert f"1 of another shape: layers.0.in_proj.weight (file [3, 2], model [{4 * HIDDEN}, {HIDDEN}])" in message


def test_long_lists_are_cut(tmp_path):
    message = complaint(tiny(), folder_with(tmp_path, {f"x.{i}": torch.ones(1) for i in range(100)}))
    assert "100 unexpected: x.0, x.1, x.10, x.11, x.12 and 95 more" in message and len(message) < 700


def test_untied_model_wants_its_head(tmp_path):
    assert '"tie_word_embeddings": true' in complaint(tiny(tied=False), folder_with(tmp_path, tensors()))
    head = torch.randn(VOCAB, HIDDEN)
    model = tiny(tied=False)
    load_weights(model, folder_with(tmp_path, {**tensors(), "lm_head.weight": head}), "cpu", torch.float32)
    assert torch.equal(model.lm_head.weight, head) and model.lm_head.weight is not model.embed_tokens.weight


def test_stored_twice_although_tied(tmp_path):
    weights = tensors()
    same = {**weights, "lm_head.weight": weights["embed_tokens.weight"].clone()}
    model = tiny()
    report = load_weights(model, folder_with(tmp_path, same), "cpu", torch.float32)
    assert model.lm_head.weight is model.embed_tokens.weight and report.used == len(same)
    other = {**same, "lm_head.weight": same["lm_head.weight"].clone()}
    other["lm_head.weight"][-1, -1] += 1
    with pytest.raises(ModelError, match='ties lm_head.weight to embed_tokens.weight.*"tie_word_embeddings": false'):
        load_weights(tiny(), folder_with(tmp_path, other), "cpu", torch.float32)
    wrong = {**weights, "lm_head.weight": torch.ones(2, 2)}
    assert "1 of another shape: lm_head.weight" in complaint(tiny(), folder_with(tmp_path, wrong))


def test_tied_pair_stored_under_the_other_name(tmp_path):
    weights = tensors()
    embedding = weights.pop("embed_tokens.weight")
    model = tiny()
    load_weights(model, folder_with(tmp_path, {**weights, "lm_head.weight": embedding}), "cpu", torch.bfloat16)
    assert torch.equal(model.embed_tokens.weight, embedding)
    assert "1 missing: embed_tokens.weight" in complaint(tiny(), folder_with(tmp_path, weights))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("layers.0.in_proj.weight", torch.int8),
        ("layers.0.in_proj.weight", torch.float8_e4m3fn),
        ("layers.0.steps", torch.float32),
        ("layers.0.steps", torch.int32),
    ],
)
def test_unusable_dtypes(tmp_path, name, dtype):
    weights = tensors()
    weights[name] = weights[name].to(dtype)
    message = complaint(tiny(), folder_with(tmp_path, weights))
    assert f"{name} ({str(dtype).removeprefix('torch.')})" in message and "cannot be used here" in message


@pytest.mark.parametrize(
    "where", [lambda q: {"quantization_config": q}, lambda q: {"text_config": {"quantization_config": q}}]
)
def test_quantised_checkpoints_are_refused_by_name(tmp_path, where):
    message = complaint(tiny(), folder_with(tmp_path, tensors(), where({"quant_method": "gptq"})))
    assert "quant_method 'gptq'" in message and "not supported yet" in message


def test_a_later_overwrite_of_the_file_does_not_reach_the_model(tmp_path):
    model, weights = tiny(), tensors()
    checkpoint = folder_with(tmp_path, weights)
    load_weights(model, checkpoint, "cpu", torch.bfloat16)
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(0)
    assert torch.equal(model.embed_tokens.weight, weights["embed_tokens.weight"])


class LookedUp(nn.Embedding):
    looked_up = True


def with_lookup(tied: bool) -> Tiny:
    model = tiny(tied=tied)
    with torch.device("meta"):
        model.embed_tokens = LookedUp(VOCAB, HIDDEN)
    return model


def test_an_embedding_stays_in_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "MIN_BYTES", 1)
    weights = {**tensors(), "lm_head.weight": torch.randn(VOCAB, HIDDEN).bfloat16()}
    checkpoint = folder_with(tmp_path, weights)
    model = with_lookup(tied=False)
    report = load_weights(model, checkpoint, "cpu", torch.bfloat16)
    assert len(report.mapped.files) == 1 and report.bytes == sum(t.nbytes for t in model.state_dict().values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    path = tmp_path / "model.safetensors"
    model.embed_tokens.weight[3] = 1.0  # private to the process
    assert torch.equal(checkpoint.load("embed_tokens.weight"), weights["embed_tokens.weight"])
    report.mapped.check()
    (tmp_path / "new").write_bytes(path.read_bytes()[::-1])
    (tmp_path / "new").rename(path)
    report.mapped.check()
    assert torch.equal(model.embed_tokens.weight[4:], weights["embed_tokens.weight"][4:])


def test_a_mapped_file_that_changes_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "MIN_BYTES", 1)
    weights = {**tensors(), "lm_head.weight": torch.randn(VOCAB, HIDDEN).bfloat16()}
    for change in (lambda file: file.write(b"x"), lambda file: file.truncate(100)):
        report = load_weights(with_lookup(False), folder_with(tmp_path, weights), "cpu", torch.bfloat16)
        with (tmp_path / "model.safetensors").open("r+b") as file:
            change(file)
        with pytest.raises(ModelError, match=r"model.safetensors was changed while .* load the model again"):
            report.mapped.check()


@pytest.mark.parametrize(("tied", "held"), [(True, torch.bfloat16), (False, torch.float32)])
def test_what_a_layer_multiplies_by_or_holds_otherwise_is_not_mapped(tmp_path, monkeypatch, tied, held):
    monkeypatch.setattr(mapped, "MIN_BYTES", 1)
    weights = tensors() | ({} if tied else {"lm_head.weight": torch.randn(VOCAB, HIDDEN).bfloat16()})
    report = load_weights(with_lookup(tied), folder_with(tmp_path, weights), "cpu", held)
    assert not report.mapped.files


def test_spans_fill_all_tensors_whatever_their_size(tmp_path, monkeypatch):
    """Cut in the middle of tensors, gaps between them, empty ones."""
    generator = torch.Generator().manual_seed(0)
    sizes = [0, 1, 7, 4096, 1 << 16, 3, 12345, 0, 99999]
    data = {f"t{i}": torch.randint(256, (n,), dtype=torch.uint8, generator=generator) for i, n in enumerate(sizes)}
    checkpoint = folder_with(tmp_path, data)
    for least, views, threads in ((1, 1024, 3), (1000, 2, 2), (1 << 20, 1, 16)):
        monkeypatch.setattr(reader, "MIN_SPAN_BYTES", least)
        monkeypatch.setattr(reader, "MAX_VIEWS", views)
        for left_out in ("", "t3"):
            out = {name: torch.zeros_like(data[name]) for name in checkpoint.names() if name != left_out}
            parts = reader.spans([(checkpoint.info(name), tensor) for name, tensor in out.items()], threads)
            assert sum(map(reader.read, parts)) == sum(t.nbytes for t in out.values())
            assert all(torch.equal(tensor, data[name]) for name, tensor in out.items())


def test_an_engine_checks_its_mapped_files_before_each_step():
    engine = Engine.load("canary-llama", EngineConfig(kv_cache_tokens=64))
    engine.score([[1, 2, 3]])

    def changed() -> None:
        raise ModelError("the file was changed")

    engine.runner.check = changed
    with pytest.raises(ModelError, match="the file was changed"):
        engine.score([[1, 2, 3]])


def test_random_weights_depend_on_seed_and_name_only():
    def drawn(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        model = tiny()
        report = random_weights(model, seed, "cpu", dtype)
        assert model.finalized == 1 and model.lm_head.weight is model.embed_tokens.weight
        assert report.used == len(model.state_dict()) - 1
        return model.state_dict()

    first, again, other, rounded = drawn(0), drawn(0), drawn(1), drawn(0, torch.bfloat16)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor.to(rounded[name].dtype), rounded[name]), "same model in every dtype"
        if tensor.is_floating_point():
            assert not torch.equal(tensor, other[name])
    assert not torch.equal(first["layers.0.A_log"], first["layers.1.A_log"])
    assert rounded["layers.0.A_log"].dtype == torch.float32
    assert first["layers.0.steps"].tolist() == [7, 7]


def test_random_weights_of_large_tensors(monkeypatch):
    """Rows are drawn slice by slice: all of them, none twice, whatever the number of threads."""
    monkeypatch.setattr("surefoot.weights.random_init.BUFFER_ELEMENTS", 1000)
    monkeypatch.setattr("surefoot.weights.random_init.SMALL_ELEMENTS", 10)
    results = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        model = tiny(tied=False, hidden=301)
        random_weights(model, 5, "cpu", torch.float32)
        results.append(model.state_dict())
    weight = results[0]["lm_head.weight"]
    assert torch.equal(weight, results[1]["lm_head.weight"])
    assert weight.unique().numel() > 0.99 * weight.numel()
    assert 0.015 < weight.std() < 0.025


def test_a_model_that_cannot_draw_fails_loudly(monkeypatch):
    def refuse(self, name, tensor, generator):
        raise NotImplementedError(name)

    monkeypatch.setattr(Tiny, "init_weight", refuse)
    with pytest.raises(NotImplementedError):
        random_weights(tiny(), 0, "cpu", torch.float32)


PEAK = """
import sys, torch
from pathlib import Path
from torch import nn
from surefoot.weights.checkpoint import Checkpoint
from surefoot.weights.load import load_weights, random_weights

class Big(nn.Module):
    ignored, tied = (), {}
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4096, 4096, bias=False) for _ in range(6)])
    def param_dtype(self, name, default): return default
    def init_weight(self, name, tensor, generator): tensor.normal_(generator=generator)
    def finalize(self): pass

def status(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) * 1024

def grown(load, dtype):
    with torch.device("meta"):
        model = Big()
    before = status("VmRSS")
    report = load(model, dtype)
    print(report.bytes, status("VmHWM") - before)

torch.set_num_threads(2)
checkpoint = Checkpoint(Path(sys.argv[1]))
torch.ones(8).bfloat16().float()
# Smallest first: the high-water mark never falls.
grown(lambda model, dtype: load_weights(model, checkpoint, "cpu", dtype), torch.bfloat16)
grown(lambda model, dtype: random_weights(model, 0, "cpu", dtype), torch.bfloat16)
grown(lambda model, dtype: load_weights(model, checkpoint, "cpu", dtype), torch.float32)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see the peak memory")
def test_peak_memory(tmp_path):
    """200 MB in a process of its own: as stored, drawn, and cast up; nothing is ever there twice."""
    (tmp_path / "config.json").write_text("{}")
    save_file(
        {f"layers.{i}.weight": torch.zeros(4096, 4096, dtype=torch.bfloat16) for i in range(6)},
        tmp_path / "model.safetensors",
    )
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [held for held, _ in results] == [6 * 4096 * 4096 * size for size in (2, 2, 4)]
    for held, grown in results:
        assert held * 0.9 < grown < 1.05 * held + 80e6, f"held {held / 1e6:.0f} MB, peak {grown / 1e6:.0f} MB"
