"""Checkpoints: what is read is what was saved, and each kind of damage gives one clear line."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from surefoot.core.errors import ModelError
from surefoot.weights.checkpoint import INDEX, Checkpoint

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "c.bias": torch.tensor([1, 2, 3], dtype=torch.int64),
    "d.scalar": torch.tensor(2.5, dtype=torch.float16),
    "e.empty": torch.empty(0, 4),
}
SHARDS = {
    "model-00001-of-00002.safetensors": ["a.weight", "c.bias"],
    "model-00002-of-00002.safetensors": ["b.weight", "d.scalar", "e.empty"],
}


def single(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file(TENSORS, folder / "model.safetensors")
    return folder


def sharded(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    for file, names in SHARDS.items():
        save_file({name: TENSORS[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in SHARDS.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


def complaint(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        Checkpoint(folder).names()
    message = str(error.value)
    assert message and "\n" not in message
    return message


@pytest.mark.parametrize("make", [single, sharded])
def test_round_trip(tmp_path, make):
    checkpoint = Checkpoint(make(tmp_path))
    assert set(checkpoint.names()) == set(TENSORS)
    assert checkpoint.total_bytes == sum(t.nbytes for t in TENSORS.values())
    for name, expected in TENSORS.items():
        info = checkpoint.names()[name]
        assert (info.dtype, info.shape) == (expected.dtype, tuple(expected.shape))
        assert torch.equal(checkpoint.load(name), expected)
        copy = torch.empty(info.shape, dtype=info.dtype)
        checkpoint.read_into(name, copy)
        assert torch.equal(copy, expected)
        pieces = [piece.clone() for _, piece in checkpoint.chunks(name, torch.empty(17, dtype=torch.uint8))]
        assert torch.equal(torch.cat([*pieces, expected.new_empty(0)]), expected.flatten())


def test_order_is_that_of_the_disk(tmp_path):
    infos = list(Checkpoint(sharded(tmp_path)).names().values())
    assert infos == sorted(infos, key=lambda info: (info.file, info.offset, info.nbytes))


def test_loose_files_without_index(tmp_path):
    (sharded(tmp_path) / INDEX).unlink()
    save_file({"lora": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    assert set(Checkpoint(tmp_path).names()) == set(TENSORS)


def test_digest_depends_on_content_and_nothing_else(tmp_path):
    one, two = Checkpoint(single(tmp_path / "1")), Checkpoint(sharded(tmp_path / "2"))
    assert one.content_digest() == two.content_digest()
    assert len({one.digest(name) for name in TENSORS}) == len(TENSORS)
    changed = {**TENSORS, "c.bias": torch.tensor([1, 2, 4])}
    save_file(changed, tmp_path / "1" / "model.safetensors")
    three = Checkpoint(tmp_path / "1")
    assert three.digest("c.bias") != two.digest("c.bias") and three.digest("a.weight") == two.digest("a.weight")
    assert three.content_digest() != two.content_digest()


def test_has_weights(tmp_path):
    assert Checkpoint(single(tmp_path / "1")).has_weights
    assert Checkpoint(sharded(tmp_path / "2")).has_weights
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "config.json").write_text("{}")
    assert not Checkpoint(tmp_path / "3").has_weights


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b'{"a": 1,\n "b": }', r"is not valid JSON: Expecting value at line 2, column 7"),
        (b"", r"is not valid JSON: Expecting value at line 1, column 1"),
        (b"[1, 2]", r"must be a JSON object \{\.\.\.\}, but it is a list"),
        (b'{"a": "\xff"}', r"is not UTF-8 text \(byte 7\)"),
        (b"[" * 100_000, r"nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"cannot be read: Exceeds the limit"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"Git LFS pointer"),
    ],
)
def test_broken_json(tmp_path, name, content, pattern):
    (single(tmp_path) / name).write_bytes(content)
    message = complaint(tmp_path)
    assert name in message and re.search(pattern, message), message


def test_byte_order_mark_is_harmless(tmp_path):
    (single(tmp_path) / "config.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert Checkpoint(tmp_path).config == {"a": 1}


def test_no_config(tmp_path):
    assert complaint(tmp_path) == f"not a model folder: {tmp_path} has no config.json"


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        (None, r"no \*\.safetensors file; copy the weights there .run, serve and bench also take --random-weights"),
        ("pytorch_model.bin", r"only pytorch_model.bin; convert them"),
        ("m.gguf", r"only m.gguf; GGUF is not supported"),
        ("consolidated.00.pth", r"only consolidated.00.pth; get the model's Hugging Face"),
        ("adapter_config.json", r"LoRA adapter"),
    ],
)
def test_no_safetensors(tmp_path, file, pattern):
    (single(tmp_path) / "model.safetensors").unlink()
    if file:
        (tmp_path / file).write_bytes(b"x")
    assert re.search(pattern, complaint(tmp_path)), complaint(tmp_path)


def rewrite_index(folder: Path, **changes: str | None) -> None:
    index = json.loads((folder / INDEX).read_text())
    for name, file in changes.items():
        index["weight_map"].pop(name, None)
        if file is not None:
            index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


def test_absent_shard_is_named(tmp_path):
    (sharded(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    assert "1 of 2 weight files" in complaint(tmp_path) and "model-00002-of-00002.safetensors" in complaint(tmp_path)


def test_index_and_shards_must_agree(tmp_path):
    first, second = SHARDS
    rewrite_index(sharded(tmp_path / "1"), **{"z.weight": first})
    assert f"1 tensors that {INDEX} lists are not in their file" in complaint(tmp_path / "1")
    assert f"z.weight (in {first})" in complaint(tmp_path / "1")
    rewrite_index(sharded(tmp_path / "2"), **{"a.weight": second})
    assert f"a.weight (in {second})" in complaint(tmp_path / "2")
    rewrite_index(sharded(tmp_path / "3"), **{"c.bias": None})
    assert f"c.bias (in {first})" in complaint(tmp_path / "3") and "are not in model" in complaint(tmp_path / "3")
    save_file(
        {n: TENSORS[n] for n in ("b.weight", "d.scalar", "e.empty", "a.weight")}, sharded(tmp_path / "4") / second
    )
    assert f"tensor a.weight is in both {first} and {second}" in complaint(tmp_path / "4")
    rewrite_index(sharded(tmp_path / "5"), **{"a.weight": "../1/model.safetensors"})
    assert "must be a plain file name" in complaint(tmp_path / "5")
    (sharded(tmp_path / "6") / INDEX).write_text('{"metadata": {}}')
    assert "has no weight_map" in complaint(tmp_path / "6")


def with_header(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


DAMAGE = {
    "empty": (b"", r"is empty \(0 bytes\)"),
    "two bytes": (b"\x01\x02", r"not a safetensors file"),
    "lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid",
        r"Git LFS pointer, not the weights: run `git lfs pull`",
    ),
    "web page": (b"<!DOCTYPE html><html>", r"not a safetensors file"),
    "header longer than the file": (
        with_header({}, length=10_000),
        r"truncated: its header needs 10,008 bytes, the file has 10",
    ),
    "header not json": (with_header(b'{"w": '), r"damaged: its header is not valid JSON: .* line 1, column 7"),
    "header not text": (with_header(b"\xff\xfe{}"), r"damaged: its header is not text"),
    "header not an object": (with_header([1]), r"damaged: its header must be a JSON object"),
    "entry not an object": (with_header({"w": 3}), r"header entry for w makes no sense"),
    "negative size": (with_header(entry(shape=[-2])), r"header entry for w makes no sense"),
    "size not a number": (with_header(entry(shape=[True, 2])), r"header entry for w makes no sense"),
    "one offset": (with_header(entry(offsets=[0])), r"header entry for w makes no sense"),
    "offsets reversed": (with_header(entry(offsets=[8, 0])), r"header entry for w makes no sense"),
    "dtype a list": (with_header(entry(dtype=["F32"])), r"header entry for w makes no sense"),
    "line break in a name": (with_header({"a\nb": 3}), r"header entry for a b makes no sense"),
    "dtype unknown": (with_header(entry(dtype="F4"), b"\0" * 8), r"tensor w has unknown dtype 'F4'"),
    "size and shape differ": (
        with_header(entry(shape=[3]), b"\0" * 8),
        r"tensor w of shape \[3\] and dtype F32 cannot have 8 bytes",
    ),
    "hole": (with_header(entry(offsets=[4, 12]), b"\0" * 12), r"data of w overlaps another tensor or leaves a hole"),
    "overlap": (with_header({**entry(), **{"v": entry()["w"]}}, b"\0" * 8), r"overlaps another tensor"),
    "truncated": (with_header(entry(), b"\0" * 7), r"truncated: it should have [\d,]+ bytes and has"),
    "trailing bytes": (with_header(entry(), b"\0" * 9), r"damaged: it has 1 bytes more than its header says"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files(tmp_path, damage):
    content, pattern = DAMAGE[damage]
    (single(tmp_path) / "model.safetensors").write_bytes(content)
    message = complaint(tmp_path)
    assert "model.safetensors" in message and re.search(pattern, message), message


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flip_or_cut_is_read_or_refused(tmp_path_factory, data):
    """Whatever happens to a file's header or length: either a ModelError, or tensors of the promised size."""
    folder = single(tmp_path_factory.mktemp("flip"))
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    checkpoint = Checkpoint(folder)
    try:
        for name, info in checkpoint.names().items():
            out = torch.empty(info.shape, dtype=info.dtype)
            checkpoint.read_into(name, out)
    except ModelError as error:
        assert "\n" not in str(error)
    finally:
        shutil.rmtree(folder)


def test_file_that_shrinks_after_the_check(tmp_path):
    checkpoint = Checkpoint(single(tmp_path))
    last = list(checkpoint.names())[-1]
    path = checkpoint.info(last).file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="became shorter while it was read"):
        checkpoint.read_into(last, torch.empty(TENSORS[last].shape, dtype=TENSORS[last].dtype))


def test_unknown_name(tmp_path):
    with pytest.raises(ModelError, match="has no tensor nope"):
        Checkpoint(single(tmp_path)).load("nope")
