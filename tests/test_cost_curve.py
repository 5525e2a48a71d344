"""Cost curves in parts: what is measured is kept, what is missing is measured, other settings are refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("numpy")
SETTINGS = {"model": "m", "threads": 2, "graph": "full", "layers": False}


@pytest.fixture
def curve(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import cost_curve

    return cost_curve


def engine(tokens: int) -> SimpleNamespace:
    pool = SimpleNamespace(num_usable=tokens // 16, block_size=16)
    return SimpleNamespace(scheduler=SimpleNamespace(block_pool=pool), info=SimpleNamespace(block_size=16))


def asked(**changes) -> argparse.Namespace:
    given = {"batches": [1, 8], "contexts": [128, 1024], "lengths": [16, 4096], "repeats": 2, "repeat_up_to": 1024}
    return argparse.Namespace(**given | changes)


def test_only_what_is_missing_is_measured(curve):
    raw = {"decode": {(1, 128): [0.1, 0.1], (1, 1024): [0.1]}, "prefill": {(4096,): [3.0]}, "layers": {}}
    found = list(curve.cases(engine(100_000), asked(), raw))
    assert found == [
        ("decode", (8, 128), 0),
        ("decode", (8, 1024), 0),
        ("prefill", (16,), 0),
        # Nothing was added in between, so round 2 wants the same again.
        ("decode", (1, 1024), 1),
        ("decode", (8, 128), 1),
        ("decode", (8, 1024), 1),
        ("prefill", (16,), 1),
    ]


def test_cases_beyond_the_cache_are_left_out(curve):
    raw = {"decode": {}, "prefill": {}, "layers": {}}
    found = {key for phase, key, _ in curve.cases(engine(4096), asked(), raw) if phase == "decode"}
    assert found == {(1, 128), (1, 1024), (8, 128)}


def test_a_file_gives_back_what_was_measured(curve, tmp_path):
    raw = {
        "decode": {(1, 128): [0.1, 0.3], (8, 128): [0.2]},
        "prefill": {(16,): [0.5]},
        "layers": {(1, 128): [{"mlp": 1.0}]},
    }
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"settings": SETTINGS, "parts": [{"at": "now"}], **curve.summarise(raw)}))
    assert curve.earlier(path, SETTINGS) == (raw, [{"at": "now"}])
    with pytest.raises(SystemExit, match="another -o"):
        curve.earlier(path, SETTINGS | {"threads": 1})
