"""Memory while quantising, in processes of their own: the full-precision model is never held.

Promised: quantised size + 2 layers + 700 MB for the whole process. Tested is the part that depends on the model: what
loading adds to a process that has imported everything may exceed the quantised size by two layers and some buffers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from surefoot.models.registry import build
from surefoot.weights.assign import tensor_slots
from surefoot.weights.writer import Entry, SafetensorsWriter

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")

MEGABYTE = 1_000_000
BUFFERS = 100 * MEGABYTE
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}
LAYER_BYTES = 2 * (4 * 1024 * 1024 + 3 * 1024 * 4096)

PRELUDE = """
import json, sys
import torch
torch.set_num_threads(1)
from surefoot.cli.main import run_cli
from surefoot.core.config import EngineConfig
from surefoot.engine.engine import Engine

def kilobytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

def warm(config):
    Engine.load("canary-llama", config).score([[1, 2, 3]])
"""
ON_LOAD = """
config = EngineConfig(quant=sys.argv[2], num_threads=1, kv_cache_tokens=512, max_model_len=256)
warm(config)
before = kilobytes("VmRSS")
engine = Engine.load(sys.argv[1], config)
added = kilobytes("VmHWM") - before
assert engine.score([[1, 2, 3]])[0].isfinite().all()
print(json.dumps({"added": added * 1024, "held": engine.info.weight_bytes}))
"""
COPY = """
warm(EngineConfig(quant=sys.argv[2], num_threads=1, kv_cache_tokens=512))
before = kilobytes("VmRSS")
assert run_cli(["quantize", sys.argv[1], "--scheme", sys.argv[2], "-o", sys.argv[3]]) == 0
print(json.dumps({"added": (kilobytes("VmHWM") - before) * 1024}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of 277 MB in bf16."""
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    model = build(CONFIG)
    slots = {n: t for n, t in tensor_slots(model).items() if n not in model.tied}
    entries = {name: Entry(torch.bfloat16, tuple(slot.shape)) for name, slot in slots.items()}
    values = torch.randn(4096 * 4096).mul_(0.02).bfloat16()
    with SafetensorsWriter(path / "model.safetensors", entries) as file:
        for name, slot in slots.items():
            file.write(name, 0, values[: slot.numel()])
    assert (path / "model.safetensors").stat().st_size > 270 * MEGABYTE
    return path


def run(script: str, *argv: str) -> dict[str, int]:
    done = subprocess.run([sys.executable, "-c", PRELUDE + script, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_quantising_on_load_holds_only_the_result(folder, scheme):
    got = run(ON_LOAD, str(folder), scheme)
    assert got["held"] < (0.55 if scheme == "w8a8" else 0.32) * 277 * MEGABYTE
    assert got["added"] < got["held"] + 2 * LAYER_BYTES + BUFFERS


def test_writing_a_copy_holds_some_rows(folder, tmp_path):
    assert run(COPY, str(folder), "w4a16", str(tmp_path / "q"))["added"] < BUFFERS
