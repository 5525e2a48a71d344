"""Garbage collection is off while an engine is imported and loaded, and as it was before afterwards."""

from __future__ import annotations

import gc

import pytest

from surefoot.core import collector
from surefoot.core.config import EngineConfig
from surefoot.engine.engine import Engine


@pytest.mark.parametrize("before", [True, False])
def test_paused_and_then_as_before(before):
    was = gc.isenabled()
    try:
        (gc.enable if before else gc.disable)()
        with pytest.raises(KeyError), collector.paused():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == before
    finally:
        (gc.enable if was else gc.disable)()


def test_a_load_is_not_interrupted_by_it():
    seen = []
    Engine.load("canary-llama", EngineConfig(kv_cache_tokens=64), lambda what, done: seen.append(gc.isenabled()))
    assert seen and not any(seen)
