"""One peer in one process: reads a JSON command a line on stdin, answers one JSON line on stdout.

    {"do": "load", "peer": "native", ...}   {"do": "decode", "batch": 8}   {"do": "prefill", "tokens": 512}

A process each, because every peer brings its own thread pool, and two OpenMP runtimes in one process fight over cores.
"""

from __future__ import annotations

import json
import os
import sys
import time

PROMPT, STEPS = 32, 8


def prompt(length: int, seed: int, vocab: int) -> list[int]:
    """The same pseudo-random ids for every peer, without torch."""
    state, ids = 0x9E3779B97F4A7C15 * (seed + 1) % 2**64, []
    for _ in range(length):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        ids.append((state >> 33) % vocab)
    return ids


def make(options: dict):
    kind = options.pop("peer")
    if kind == "native":
        from native import Native

        return Native(**options)
    if kind == "transformers":
        from hf import Transformers

        return Transformers(**options)
    if kind == "llama.cpp":
        from llamacpp import LlamaCpp

        return LlamaCpp(**options)
    raise SystemExit(f"unknown peer {kind!r}")


def main() -> None:
    # NOTE: libraries print to stdout; the answers go to a copy of it, and stdout itself to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    peer = None
    for line in sys.stdin:
        command = json.loads(line)
        action = command.pop("do")
        if action == "load":
            started = time.perf_counter()
            peer = make(command)
            answer = {"seconds": time.perf_counter() - started, "about": peer.about()}
        elif action == "decode":
            answer = {"seconds": peer.decode(command["batch"])}
        elif action == "prefill":
            answer = {"seconds": peer.prefill(command["tokens"], command["seed"])}
        else:
            break
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(__file__))
    main()
