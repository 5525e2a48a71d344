"""What a child process of ours begins with: a channel to its parent, and an end when the parent ends."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable
from typing import Any


def open_channel() -> Callable[[dict[str, Any]], None]:
    """`say(message)` writes a JSON line to the parent on stdout; what libraries print goes to stderr from now on."""
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):
            messages.write(json.dumps(message, ensure_ascii=False, default=str) + "\n")

    return say


def end_with_parent() -> None:
    """End this process as soon as the other end of stdin is gone, however the parent died."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
