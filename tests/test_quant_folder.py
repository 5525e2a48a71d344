"""Quantised folders: ours read by transformers with compressed-tensors, theirs read by us, and everything refused."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from cli_fakes import one_line
from safetensors.torch import load_file, save_file
from test_quant import load, quantise_folder

from surefoot import canaries
from surefoot.cli.main import run_cli
from surefoot.core.errors import ModelError, SurefootError
from surefoot.quant import folder as quant_folder
from surefoot.quant.compressed_tensors import config_for, parse
from surefoot.quant.schemes import SCHEMES, quantise_int4, quantise_int8, scheme


def transformers_logits(folder: str, ids: list[int]) -> torch.Tensor:
    pytest.importorskip("compressed_tensors")
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return tiny.reference_logits(model, ids)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("canary", canaries.CANARIES)
def test_transformers_reads_what_we_write(canary, name, tmp_path):
    folder = quantise_folder(canaries.path(canary), tmp_path / "q", name)
    ids = canaries_text(canary)
    ours, theirs = load(folder, dtype="float32").score([ids])[0], transformers_logits(folder, ids)
    # Their activations are rounded to 127.5 steps, ours (and vLLM's) to 127; weights are the same to the last bit.
    limit = 0.03 if name.endswith("a8") else 1e-3
    assert (ours - theirs).norm() < limit * theirs.norm()


def canaries_text(canary: str) -> list[int]:
    from surefoot.weights.tokenizer import Tokenizer

    known = next(k for k in canaries.known_answers(canary) if "messages" in k)
    tokenizer = Tokenizer.load(canaries.path(canary))
    return tokenizer.encode_chat(known["messages"]) + tokenizer.encode(known["answer"], add_special_tokens=False)


def foreign(folder: Path, kind: str) -> Path:
    """A folder as other tools write it: config by the library's own serialiser, tensors by its own compressors."""
    ct = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.naive_quantized import IntQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    act = QuantizationArgs(num_bits=8, strategy="token", dynamic=True) if kind == "w8a8" else None
    group = {"w8a8": None, "w8a16": None, "w4a16": 32, "w4a16-channel": None, "w4a16-g16": 16}[kind]
    bits = 4 if "w4" in kind else 8
    weights = QuantizationArgs(num_bits=bits, strategy="group" if group else "channel", group_size=group)
    layer = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=act)
    naive = kind == "w8a8"
    compressor = IntQuantizationCompressor if naive else PackedQuantizationCompressor
    source = tiny.save(tiny.reference("llama-bias"), folder)
    tensors, out = load_file(source / "model.safetensors"), {}
    for name, tensor in tensors.items():
        if "_proj.weight" not in name or (group and tensor.shape[1] % group):
            out[name] = tensor
            continue
        groups = tensor.unflatten(1, (-1, group or tensor.shape[1]))
        # The library's own range: the largest magnitude lies half a step beyond 127 (or 7), so -128 occurs.
        scale = (groups.abs().amax(-1) / ((2**bits - 1) / 2)).to(torch.bfloat16)
        module = name.removesuffix("weight")
        state = compressor.compress({"weight": tensor, "weight_scale": scale}, layer)
        out |= {module + leaf: t.contiguous() for leaf, t in state.items()}
    ignore = [n.removesuffix(".weight") for n in tensors if n.endswith("proj.weight") and n in out and not naive]
    if naive:
        assert any((t == -128).any() for t in out.values() if t.dtype == torch.int8)
    config = QuantizationConfig(
        config_groups={"group_0": layer},
        format="int-quantized" if naive else "pack-quantized",
        quantization_status="compressed",
        ignore=["lm_head", *ignore],
    )
    save_file(out, source / "model.safetensors", {"format": "pt"})
    edit(source, lambda c: c.update(quantization_config=config.model_dump() | {"version": ct.__version__}))
    return source


def edit(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config, default=str))


@pytest.mark.parametrize("kind", ["w8a8", "w8a16", "w4a16", "w4a16-channel", "w4a16-g16"])
def test_we_read_what_others_write(kind, tmp_path):
    folder = str(foreign(tmp_path, kind))
    engine = load(folder, dtype="float32")
    assert engine.info.quant["source"] == "folder"
    assert engine.info.quant["scheme"] == kind.split("-")[0]
    ids = tiny.prompts(1, engine.vocab_size, lengths=(40,))[0]
    ours, theirs = engine.score([ids])[0], transformers_logits(folder, ids)
    limit = 0.1 if kind == "w8a8" else 2e-3
    assert (ours - theirs).norm() < limit * theirs.norm()


def weights_change(**changes):
    return lambda c: c["config_groups"]["group_0"]["weights"].update(changes)


def act_change(**changes):
    return lambda c: c["config_groups"]["group_0"]["input_activations"].update(changes)


REFUSED = [
    ("w4a16", weights_change(symmetric=False), "config_groups.group_0.weights.symmetric false"),
    ("w4a16", weights_change(actorder="group"), "config_groups.group_0.weights.actorder 'group'"),
    ("w4a16", weights_change(type="float"), "config_groups.group_0.weights.type 'float'"),
    ("w4a16", weights_change(num_bits=3), "config_groups.group_0.weights.num_bits 3"),
    ("w4a16", weights_change(group_size=12), "config_groups.group_0.weights.group_size 12"),
    ("w4a16", weights_change(strategy="block"), "config_groups.group_0.weights.strategy 'block'"),
    ("w8a8", weights_change(strategy="tensor"), "config_groups.group_0.weights.strategy 'tensor'"),
    ("w8a16", weights_change(strategy="group", group_size=32), "config_groups.group_0.weights.strategy 'group'"),
    ("w8a8", act_change(dynamic=False), "config_groups.group_0.input_activations.dynamic false"),
    ("w8a8", act_change(dynamic="local"), "config_groups.group_0.input_activations.dynamic 'local'"),
    ("w8a8", act_change(symmetric=False), "config_groups.group_0.input_activations.symmetric false"),
    ("w8a8", act_change(strategy="tensor"), "config_groups.group_0.input_activations.strategy 'tensor'"),
    ("w8a8", lambda c: c["config_groups"]["group_0"].update(format="float-quantized"), "'float-quantized'"),
    ("w4a16", lambda c: c["config_groups"]["group_0"].update(format="int-quantized"), "group_0.format 'int-quantized'"),
    ("w4a16", lambda c: c["config_groups"]["group_0"].update(input_activations={"num_bits": 8}), "input_activations"),
    ("w8a8", lambda c: c["config_groups"]["group_0"].update(output_activations={"num_bits": 8}), "output_activations"),
    (
        "w8a8",
        lambda c: c["config_groups"]["group_0"].pop("weights"),
        "config_groups.group_0.weights null is not supported",
    ),
    ("w8a8", lambda c: c["config_groups"]["group_0"].update(targets="Linear"), "targets must be a list of strings"),
    ("w8a8", lambda c: c["config_groups"].clear(), "config_groups is missing or empty"),
    ("w8a8", lambda c: c.update(ignore=["re:("]), "'re:(' is no regular expression"),
    ("w8a8", lambda c: c.update(quant_method="gptq"), "quantised by 'gptq', which is not supported"),
    ("w8a8", lambda c: c.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme {...} is not supported, only null"),
    ("w8a8", lambda c: c.update(quantization_status="calibration"), "quantization_status 'calibration'"),
    ("w8a8", lambda c: c.update(sparsity_config={"format": "sparse-24"}), "sparsity_config.format 'sparse-24'"),
    ("w8a8", lambda c: c.update(transform_config={"config_groups": {"a": {}}}), "transform_config"),
]


@pytest.mark.parametrize(("name", "change", "says"), REFUSED, ids=[says for *_, says in REFUSED])
def test_what_we_cannot_do_is_refused_by_name(name, change, says):
    config = config_for(scheme(name), ["lm_head"])
    assert parse({"quantization_config": config}) is not None
    change(config)
    for place in ({"quantization_config": config}, {"text_config": {"quantization_config": config}}):
        with pytest.raises(ModelError) as error:
            parse(place)
        assert says in str(error.value) and "\n" not in str(error.value)


SAID_OTHERWISE = [
    lambda c: c.update(quantization_status="frozen", global_compression_ratio=1.24),  # as of 2024
    lambda c: (c.update(format="naive-quantized"), c["config_groups"]["group_0"].pop("format")),
    lambda c: c.update(sparsity_config={"format": "dense", "targets": []}, transform_config={}, version="0.12.2"),
    act_change(observer="memoryless", scale_dtype=None, zp_dtype="torch.int8"),
    weights_change(group_size=-1, actorder="static"),
    lambda c: [c.pop(key) for key in ("quantization_status", "kv_cache_scheme")],
]


@pytest.mark.parametrize("change", SAID_OTHERWISE)
def test_the_same_said_otherwise_is_read_the_same(change):
    """As in folders of llm-compressor through the years."""
    config = config_for(scheme("w8a8"), ["lm_head"])
    usual = parse({"quantization_config": config})
    change(config)
    assert parse({"quantization_config": config}) == usual


def test_a_path_goes_before_a_regex_and_that_before_a_class():
    both = config_for(scheme("w8a8"), ["lm_head", r"re:.*in_proj_[ab]$"])
    int4 = config_for(scheme("w4a16", 128), [])["config_groups"]["group_0"]
    both["config_groups"]["second"] = int4 | {"targets": [r"re:.*down_proj$", "model.layers.0.mlp.up_proj"]}
    folder = parse({"quantization_config": both})
    assert folder.layout("model.layers.3.mlp.gate_proj").scheme.name == "w8a8"
    assert folder.layout("model.layers.3.mlp.down_proj").scheme.group_size == 128
    assert folder.layout("model.layers.0.mlp.up_proj").packed
    assert folder.layout("lm_head") is None and folder.layout("model.layers.0.linear_attn.in_proj_a") is None


@pytest.fixture
def quantised(tmp_path):
    """(folder of a w4a16 canary, its tensors): to be damaged."""
    folder = Path(quantise_folder(canaries.path("canary-llama"), tmp_path / "q", "w4a16"))
    return folder, load_file(folder / "model.safetensors")


LAYER = "model.layers.1.mlp.down_proj"


def damage(kind: str, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    scale = tensors[f"{LAYER}.weight_scale"]
    if kind == "missing scale":
        del tensors[f"{LAYER}.weight_scale"]
    elif kind == "wrong group size":
        edit(folder, lambda c: weights_change(group_size=64)(c["quantization_config"]))
    elif kind == "group that does not divide":
        edit(folder, lambda c: weights_change(group_size=96)(c["quantization_config"]))
    elif kind == "scale of another shape":
        tensors[f"{LAYER}.weight_scale"] = scale[:, :1].contiguous()
    elif kind == "integer scale":
        tensors[f"{LAYER}.weight_scale"] = scale.to(torch.int32)
    elif kind == "weight_shape":
        tensors[f"{LAYER}.weight_shape"] = torch.tensor([1, 2])
    elif kind == "zero point":
        tensors[f"{LAYER}.weight_zero_point"] = torch.zeros(1, dtype=torch.int32)
    elif kind == "no layer matches":
        edit(folder, lambda c: c["quantization_config"]["config_groups"]["group_0"].update(targets=["Conv2d"]))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing scale", f"1 missing: {LAYER}.weight_scale"),
        ("wrong group size", "of another shape: model.layers.0"),
        ("group that does not divide", "group_size 96 does not divide the 128 inputs of model.layers.0"),
        ("scale of another shape", f"1 of another shape: {LAYER}.weight_scale"),
        ("integer scale", f"{LAYER}.weight_scale (int32)"),
        ("weight_shape", "a weight_shape in the folder is not the"),
        ("zero point", f"1 unexpected: {LAYER}.weight_zero_point"),
        ("no layer matches", "its targets match no layer of this model"),
    ],
)
def test_damaged_folders_end_in_one_line(quantised, kind, says, capsys):
    damage(kind, *quantised)
    assert run_cli(["info", str(quantised[0])]) == 2
    assert says in one_line(capsys)


def test_a_quantised_folder_cannot_be_quantised_again(quantised, tmp_path, capsys):
    assert run_cli(["info", str(quantised[0]), "--quant", "w8a8"]) == 2
    assert "is quantised already" in one_line(capsys)
    assert run_cli(["quantize", str(quantised[0]), "--scheme", "w8a8", "-o", str(tmp_path / "x")]) == 2
    assert "is quantised already" in one_line(capsys)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("family", ["qwen3.5", "llama-tied"])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_folder_holds_what_it_says(family, name, tmp_path, monkeypatch):
    """Everything else bit by bit, unused tensors named as ignored, several files when large."""
    source = tiny.save(tiny.reference(family), tmp_path / "full")
    tensors = load_file(source / "model.safetensors")
    if family == "qwen3.5":
        tensors["mtp.fc.weight"] = torch.randn(64, 128)
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(quant_folder, "SHARD_BYTES", 60_000)
    monkeypatch.setattr(quant_folder, "ROWS_BYTES", 1_000)
    out = Path(quantise_folder(source, tmp_path / "q", name))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    stored = {k: v for file in files for k, v in load_file(file).items()}
    assert len(files) > 1 and set(index["weight_map"]) == set(stored)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == ("int-quantized" if name == "w8a8" else "pack-quantized")
    assert "lm_head" in config["ignore"]
    for key, tensor in tensors.items():
        module = key.removesuffix(".weight")
        if f"{module}.weight_scale" not in stored:
            assert torch.equal(stored[key], tensor)
            assert tensor.ndim != 2 or not key.endswith(".weight") or module in config["ignore"]
        elif name == "w4a16":
            packed, scale = quantise_int4(tensor)
            assert torch.equal(stored[f"{module}.weight_packed"], packed)
            assert torch.equal(stored[f"{module}.weight_scale"], scale)
            assert stored[f"{module}.weight_shape"].tolist() == list(tensor.shape)
        elif name == "w8a8":
            assert torch.equal(stored[key], quantise_int8(tensor)[0])
    load(out, dtype="float32").score([[1, 2, 3]])


def quantize(*argv: str) -> int:
    return run_cli(["quantize", "canary-llama", *argv])


def test_the_verb_writes_a_folder_that_runs(tmp_path, capsys):
    out = tmp_path / "deep" / "q"
    assert quantize("--scheme", "w4a16", "--group-size", "64", "--lm-head", "-o", str(out)) == 0
    said = capsys.readouterr().out
    assert "36 layers in w4a16, groups of 64, kept as they were: nothing" in said and "3.3 MB ->" in said
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert "chat_template.jinja" in names and not list(tmp_path.rglob("*.partial"))
    assert run_cli(["run", str(out), "What is the capital of France?"]) == 0
    answer = capsys.readouterr()
    assert "Paris" in answer.out and "| w4a16 in bfloat16 |" in answer.err
    assert run_cli(["info", str(out), "--json"]) == 0
    assert "linear_w4/cpu" in json.loads(capsys.readouterr().out)["ops"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--scheme", "int8"], "unknown quantisation scheme 'int8': choose one of w8a16, w8a8, w4a16, w4a8"),
        (["--scheme", "w8a8", "--group-size", "32"], "takes no group size"),
        (["--scheme", "w4a16", "--group-size", "33"], "group size 33 is not supported"),
        ([], "Missing option '--scheme'"),
    ],
)
def test_impossible_requests(argv, says, tmp_path, capsys):
    assert quantize(*argv, "-o", str(tmp_path / "q")) == 2
    assert says in one_line(capsys)
    assert not list(tmp_path.iterdir())


def test_nothing_that_exists_is_touched(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "q.partial").mkdir()
    refused = {"full": "is not empty", "file": "is no folder", "q": "q.partial exists", "file/q": "Not a directory"}
    for target, says in refused.items():
        assert quantize("--scheme", "w8a8", "-o", str(tmp_path / target)) == 2
        assert says in one_line(capsys)
    assert (tmp_path / "full" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert quantize("--scheme", "w8a8", "-o", str(tmp_path / "empty")) == 0


def test_an_unfinished_folder_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    out = tmp_path / "q"
    monkeypatch.setattr(
        quant_folder.shutil, "disk_usage", lambda path: quant_folder.shutil._ntuple_diskusage(9, 9, 1000)
    )
    assert quantize("--scheme", "w8a8", "-o", str(out)) == 2
    assert "needs 2 MB and the disk has 0 MB free" in one_line(capsys)
    monkeypatch.undo()
    for failure, code in ((OSError(28, "No space left on device"), 2), (KeyboardInterrupt(), 130)):

        def fail(file, *args, failure=failure):
            assert not (file.path.parent / "config.json").exists(), "half a folder must not look like a model"
            raise failure

        monkeypatch.setattr(quant_folder.SafetensorsWriter, "_put", fail)
        assert quantize("--scheme", "w8a8", "-o", str(out)) == code
        assert ("No space left" in one_line(capsys)) == (code == 2)
        monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_after_ctrl_c_no_tensor_is_written_to_its_end(tmp_path, monkeypatch):
    """One tensor can be gigabytes; the user should not wait for it."""
    written = []

    def write(file, name, first, piece):
        if name == "model.embed_tokens.weight":
            written.append(name)
            time.sleep(0.0005)
        elif written:
            raise KeyboardInterrupt

    monkeypatch.setattr("surefoot.weights.workers.count", lambda: 2)
    monkeypatch.setattr(quant_folder, "COPY_BYTES", 64)
    monkeypatch.setattr(quant_folder.SafetensorsWriter, "write", write)
    assert quantize("--scheme", "w8a8", "-o", str(tmp_path / "q")) == 130
    assert 0 < len(written) < 1000 and not list(tmp_path.iterdir())  # of 6144


def test_quant_flags_need_each_other(capsys):
    assert run_cli(["info", "canary-llama", "--quant-lm-head"]) == 2
    assert "belong to quant" in one_line(capsys)
    assert run_cli(["info", "canary-llama", "--quant", "int4"]) == 2
    assert "unknown quantisation scheme 'int4'" in one_line(capsys)
    assert run_cli(["info", "canary-llama", "--quant", "w4a16", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["quant"]
    assert facts["scheme"] == "w4a16" and facts["group_size"] == 32 and facts["layers"] == 35
    with pytest.raises(SurefootError):
        load("canary-llama", quant="w8a8", quant_group_size=32)
