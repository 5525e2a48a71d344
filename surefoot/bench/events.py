"""Compilations and captures, which belong before the measured passes: counted, and named where they are inside.

graph capture      a decode step recorded as a graph of the device (the engine's own count)
torch.compile      a graph that torch.compile made, or made again because something changed (torch's own count)
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

Events = Counter[str]
NAMES = ("graph capture", "torch.compile")


class EventWatch:
    """Counts since it was made, by phase. `engine`: ours, or None for another backend."""

    def __init__(self, engine: Any = None):
        self.engine = engine
        self.phases: dict[str, Events] = {"load": counted(engine), "warmup": Counter(), "measured": Counter()}
        self._last = counted(engine)

    def take(self, phase: str) -> Events:
        """What came since the last call, which belongs to this phase."""
        now = counted(self.engine)
        new, self._last = now - self._last, now
        self.phases[phase] += new
        return new

    def result(self) -> dict[str, dict[str, int]]:
        return {phase: {name: events[name] for name in NAMES} for phase, events in self.phases.items()}


def counted(engine: Any) -> Events:
    """All that happened in this process until now."""
    graphs = getattr(getattr(engine, "runner", None), "graphs", None)
    dynamo = sys.modules.get("torch._dynamo.utils")  # NOTE: importing it takes seconds; who compiles has imported it
    compiled = dynamo.counters["stats"]["unique_graphs"] if dynamo is not None else 0
    return Counter(dict(zip(NAMES, (getattr(graphs, "captures", 0), compiled))))


def warning(events: Events) -> list[str]:
    """One line if anything was compiled or captured while measuring."""
    said = ", ".join(f"{count} x {name}" for name, count in sorted(events.items()) if count)
    return [f"{said} inside the measured passes: their time is in these numbers"] if said else []
