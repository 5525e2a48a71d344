"""The real shapes with random weights: they load, score and generate, within the memory that was promised."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from surefoot.models.registry import build

MODELS = Path(__file__).parents[2] / "shared" / "data" / "models"
MEGABYTE = 1_000_000

SCRIPT = """
import json, resource, sys
from surefoot.core.config import EngineConfig
from surefoot.core.sampling import SamplingParams
from surefoot.engine.engine import Engine

config = EngineConfig(random_weights=0, dtype="bfloat16", max_model_len=512, kv_cache_tokens=2048, max_num_seqs=8)
engine = Engine.load(sys.argv[1], config)
texts = ("The capital of France is", "\\u4e2d\\u56fd\\u7684\\u9996\\u90fd\\u662f")
prompts = [engine.tokenizer.encode(text) for text in texts]
done = engine.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True))
(logits,) = engine.score([list(range(1000, 1064))])
info = engine.info
print(json.dumps({
    "tokens": [len(c.token_ids) for c in done],
    "finite": bool(logits.isfinite().all()), "shape": list(logits.shape),
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "weights": info.weight_bytes, "cache": info.kv_cache_bytes + info.state_bytes,
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name,vocab", [("llama-3.2-1b-instruct", 128256), ("qwen3.5-0.8b-base", 248320)])
def test_load_score_generate_within_memory(name, vocab):
    folder = MODELS / name
    if not folder.exists():
        pytest.skip(f"no test data at {folder}")
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    got = json.loads(run.stdout.splitlines()[-1])
    assert got["tokens"] == [4, 4]
    assert got["finite"]
    assert got["shape"] == [64, vocab]
    assert got["peak"] <= 1.15 * got["weights"] + got["cache"] + 700 * MEGABYTE


def test_qwen_parameters_equal_the_official_list():
    """Names and shapes, with `mtp` and `visual` the named exceptions."""
    folder = MODELS / "qwen3.5-0.8b-base"
    if not folder.exists():
        pytest.skip(f"no test data at {folder}")
    official = json.loads((folder / "tensor_shapes.json").read_text())
    model = build(json.loads((folder / "config.json").read_text()))
    ours = {name: list(p.shape) for name, p in model.named_parameters()}
    text = {name: shape for name, shape in official["transformers_state_dict"].items() if "visual" not in name}
    assert ours == text
    import re

    others = [n for n in [*official["transformers_state_dict"], *official["mtp"]] if n not in text]
    assert others
    assert all(any(re.match(pattern, name) for pattern in model.ignored) for name in others)
