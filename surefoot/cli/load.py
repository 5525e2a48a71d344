"""Load an engine at the terminal: progress while it is slow, then the engine's notes, all on stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from surefoot.core import collector
from surefoot.core.config import EngineConfig

if TYPE_CHECKING:
    from surefoot.engine.engine import Engine


def load_engine(model: str, config: EngineConfig, lazy: bool = False) -> Engine:
    from surefoot.cli.progress import Progress

    with collector.paused():
        from surefoot.engine.engine import Engine
    with Progress() as progress:
        engine = Engine.load(model, config, progress, lazy)
    for note in engine.info.notes:
        print(f"note: {note}", file=sys.stderr)
    return engine
