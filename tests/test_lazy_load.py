"""An engine that answers from mapped files first and moves its weights afterwards computes what a ready one does."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_quant import quantise_folder

from surefoot import canaries
from surefoot.core.config import EngineConfig
from surefoot.core.errors import ModelError
from surefoot.core.sampling import SamplingParams
from surefoot.engine.engine import Engine
from surefoot.engine.postponed import Postponed
from surefoot.layers.quant_linear import quantised
from surefoot.ops.cpu import kernels
from surefoot.serve.worker import EngineWorker
from surefoot.weights import moving

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="weights are read at once on other systems")
PROMPTS = [[5, 6, 7], list(range(40, 90)), [9]]


@pytest.fixture(autouse=True)
def whatever_the_size(monkeypatch):
    monkeypatch.setattr(moving, "MIN_BYTES", 2048)
    monkeypatch.setattr(moving, "LEAST", 1)
    monkeypatch.setattr(moving, "PIECE_BYTES", 50_000)


def load(model: str | Path, lazy: bool = True, **settings) -> Engine:
    base = {"num_threads": 1, "kv_cache_tokens": 2048, "max_num_seqs": 6, "max_model_len": 256}
    return Engine.load(str(model), EngineConfig(**{**base, **settings}), lazy=lazy)


def mappings() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("model.safetensors")


def seen(engine: Engine) -> list:
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=3)
    return [(c.token_ids, c.logprobs) for c in engine.generate(PROMPTS, params)]


@pytest.mark.parametrize("canary", canaries.CANARIES)
@pytest.mark.parametrize("scheme", ["bfloat16", "w8a8", "w4a16", "w4a8"])
def test_the_same_bits_before_while_and_after_weights_are_moved(canary, scheme, tmp_path):
    folder = canaries.path(canary)
    if scheme != "bfloat16":
        folder = quantise_folder(folder, tmp_path / "q", scheme)
    before = mappings()
    ready = seen(load(folder, lazy=False, dtype="bfloat16", graph="full"))
    engine = load(folder, dtype="bfloat16", graph="full")
    assert len(engine.postponed._pieces) > 15 and mappings() > before
    layers = quantised(engine.model).values()
    assert not layers or {layer.layout for layer in layers} == {"rows"}
    assert seen(engine) == ready  # on its way
    assert engine.postponed
    engine.settle()
    assert not engine.postponed and mappings() == before and not engine.runner.check.__self__.files
    assert seen(engine) == ready and engine.runner.graphs.replays > 5
    if kernels and layers:
        assert "panels" in {layer.layout for layer in layers}


def test_the_first_step_moves_nothing_each_other_one_a_piece():
    engine = load("canary-llama", dtype="bfloat16")
    count = len(engine.postponed._pieces)
    engine.add_request([5, 6, 7], SamplingParams(max_tokens=3, ignore_eos=True))
    for step in range(3):
        engine.step()
        assert len(engine.postponed._pieces) == count - step


def test_a_file_that_changes_meanwhile_ends_the_step(tmp_path):
    engine = load(quantise_folder(canaries.path("canary-llama"), tmp_path / "q", "w8a8"), dtype="bfloat16")
    with (tmp_path / "q" / "model.safetensors").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(ModelError, match=r"model.safetensors was changed while .* load the model again"):
        engine.generate([[5, 6, 7]], SamplingParams(max_tokens=2))


def test_what_must_be_converted_is_read_at_once():
    engine = load("canary-llama", dtype="float32")  # stored in bf16
    assert not engine.postponed or "moving" not in engine.postponed._pieces[0][0]


def test_work_that_fails_is_given_up():
    """The weights stay where they are, and the engine goes on."""
    engine = load("canary-llama", dtype="bfloat16")
    ready = seen(load("canary-llama", lazy=False, dtype="bfloat16"))

    def fails() -> None:
        raise RuntimeError("not enough memory: you tried to allocate\n64 MB")

    engine.postponed.advance()
    engine.postponed._pieces.appendleft(("moving weights", fails))
    with pytest.warns(
        UserWarning, match="moving weights was given up .not enough memory: you tried to allocate.: steps"
    ):
        engine.settle()
    assert not engine.postponed and seen(engine) == ready


def test_an_idle_server_moves_the_rest():
    worker = EngineWorker(lambda: load("canary-llama", dtype="bfloat16"))
    engine = worker.start()
    try:
        worker._thread.join(0.01)
        for _ in range(200):
            if not engine.postponed:
                break
            worker._thread.join(0.02)
        assert not engine.postponed and worker.alive
    finally:
        worker.stop()


def test_capturing_does_not_import_torchs_compiler():
    """It takes a second."""
    script = (
        "import sys\nfrom surefoot.core.config import EngineConfig\nfrom surefoot.core.sampling import SamplingParams\n"
        "from surefoot.engine.engine import Engine\n"
        "engine = Engine.load('canary-llama', EngineConfig(graph='full', num_threads=1, kv_cache_tokens=256))\n"
        "engine.generate([[5, 6, 7]], SamplingParams(max_tokens=4, ignore_eos=True))\n"
        "assert engine.runner.graphs.captures == 1\n"
        "raise SystemExit('torch._dynamo' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_pieces_are_done_while_somebody_waits():
    done: list[int] = []
    postponed = Postponed([(str(i), lambda i=i: done.append(i)) for i in range(5)])
    with postponed.meanwhile():
        while postponed:
            time.sleep(0.001)
    assert done == [0, 1, 2, 3, 4] and postponed.seconds > 0
