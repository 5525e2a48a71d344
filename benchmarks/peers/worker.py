"""One peer in one process: reads a JSON command a line on stdin, answers one JSON line on stdout.

    {"do": "load", "peer": "native", ...}   {"do": "decode", "batch": 8}   {"do": "prefill", "tokens": 512, "seed": 0}
    {"do": "limits"}                        of the machine, by the native peer only

A process each, because every peer brings its own thread pool, and two OpenMP runtimes in one process fight over cores.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time

PROMPT, STEPS = 32, 8
CLASSES = {
    "native": ("native", "Native"),
    "transformers": ("hf", "Transformers"),
    "llama.cpp": ("llamacpp", "LlamaCpp"),
}


def prompt(length: int, seed: int, vocab: int) -> list[int]:
    """The same pseudo-random ids for every peer, without torch."""
    state, ids = 0x9E3779B97F4A7C15 * (seed + 1) % 2**64, []
    for _ in range(length):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        ids.append((state >> 33) % vocab)
    return ids


def load(options: dict) -> tuple[object, dict]:
    """The peer, and the seconds that its imports and its loading took."""
    module, name = CLASSES[options.pop("peer")]
    started = time.perf_counter()
    cls = getattr(importlib.import_module(f"peers.{module}"), name)
    imported = time.perf_counter()
    peer = cls(**options)
    return peer, {"import_s": imported - started, "seconds": time.perf_counter() - imported}


def main() -> None:
    # NOTE: libraries print to stdout; the answers go to a copy of it, and stdout itself to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    peer = None
    for line in sys.stdin:
        command = json.loads(line)
        action = command.pop("do")
        if action == "load":
            peer, answer = load(command)
        elif action == "about":
            answer = peer.about()
        elif action == "limits":
            answer = peer.limits()
        elif action in ("decode", "prefill"):
            answer = {"seconds": getattr(peer, action)(**command)}
        else:
            break
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    main()
