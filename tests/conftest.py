"""Fixtures that several test files share."""

from __future__ import annotations

import signal
import sys
import types

import pytest
import torch
from cli_fakes import FakeEngine


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """A fake engine behind `Engine.load`; `engine.loads` collects what it was asked for."""
    fake = FakeEngine()
    fake.loads = []

    def load(model, config, progress=None, lazy=False):
        fake.loads.append((model, config))
        return fake

    module = types.ModuleType("surefoot.engine.engine")
    module.Engine = types.SimpleNamespace(load=load)
    monkeypatch.setitem(sys.modules, "surefoot.engine.engine", module)
    return fake


# Tiny models gain nothing from a second thread, and threads that wait for each other on busy cores cost a lot.
torch.set_num_threads(1)

# Started in the background (`make test &` in a script, nohup), processes inherit that Ctrl-C is ignored; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
