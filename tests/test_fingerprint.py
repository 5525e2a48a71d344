"""The digest of a checkpoint: another number is another digest, another file layout is not."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from surefoot.backends import open_backend
from surefoot.core import confighash
from surefoot.core.config import EngineConfig
from surefoot.weights import fingerprint as module
from surefoot.weights.checkpoint import INDEX, Checkpoint
from surefoot.weights.fingerprint import PIECE_BYTES, fingerprint
from surefoot.weights.hub import resolve


def folder_of(path, **files: dict[str, torch.Tensor]):
    path.mkdir()
    (path / "config.json").write_text("{}")
    for name, tensors in files.items():
        save_file(tensors, path / f"{name}.safetensors")
    if len(files) > 1:
        weight_map = {tensor: f"{name}.safetensors" for name, tensors in files.items() for tensor in tensors}
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return Checkpoint(path)


def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {"a": torch.randn(64, 256, generator=draw), "b": torch.randn(8, generator=draw)}


@pytest.mark.parametrize("limit", [module.FULL_BYTES, 0])
def test_every_tensor_counts_and_sharding_does_not(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(module, "FULL_BYTES", limit)
    one = fingerprint(folder_of(tmp_path / "one", model=tensors()))
    assert one.startswith("sha256:" if limit else "sampled-sha256:")
    parts = {name: {name: tensor} for name, tensor in tensors().items()}
    assert fingerprint(folder_of(tmp_path / "two", **parts)) == one
    for i, change in enumerate(({"a": tensors()["a"] + 1}, {"b": tensors()["b"] + 1}, {"b": tensors()["b"].half()})):
        assert fingerprint(folder_of(tmp_path / f"other{i}", model=tensors() | change)) != one


def test_what_sampling_does_not_see_the_full_digest_does(tmp_path, monkeypatch):
    changed = tensors()
    changed["a"].view(-1)[PIECE_BYTES // 4 + 1] += 1  # the first number after the first piece
    before, after = folder_of(tmp_path / "x", model=tensors()), folder_of(tmp_path / "y", model=changed)
    assert fingerprint(before) != fingerprint(after)
    monkeypatch.setattr(module, "FULL_BYTES", 0)
    assert fingerprint(before) == fingerprint(after)


def test_other_weights_are_another_configuration(tmp_path):
    """Same name, same config.json, one number changed: a proof of the one does not cover the other."""
    folder = tmp_path / "model"
    shutil.copytree(resolve("canary-llama"), folder)
    config = EngineConfig(dtype="float32", max_model_len=64, kv_cache_tokens=256, num_threads=1)
    for backend in ("native", "transformers"):
        facts = [confighash.identity(open_backend(backend, str(folder), config).info(), str(folder))]
        held = load_file(folder / "model.safetensors")
        held["model.norm.weight"][0] += 0.5
        save_file(held, folder / "model.safetensors")
        facts.append(confighash.identity(open_backend(backend, str(folder), config).info(), str(folder)))
        (said,) = confighash.differences(*facts)
        assert said.startswith("weights_digest sha256:")
        assert confighash.digest(facts[0]) != confighash.digest(facts[1])


def test_random_weights_have_no_digest():
    config = EngineConfig(max_model_len=64, kv_cache_tokens=256, num_threads=1, random_weights=1)
    assert open_backend("native", "canary-llama", config).info()["weights_digest"] is None
