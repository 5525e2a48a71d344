"""One side in a process of its own: `python -m surefoot.compare.child < {"side": ..., "prompts": [...], ...}`.

Its memory is then its own, and a side that crashes takes nothing with it. On stdout goes a JSON object per line:
progress, the facts after loading, each answer, the end. Stdin stays open as the parent's sign of life.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from typing import Any

from surefoot.compare.ask import measure
from surefoot.compare.prompts import Prompt
from surefoot.compare.sides import Side
from surefoot.core.errors import SurefootError


def main() -> int:
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print belongs to the log

    def say(message: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):
            messages.write(json.dumps(message, ensure_ascii=False, default=str) + "\n")

    job = json.loads(sys.stdin.buffer.readline())
    _end_with_parent()
    prompts = [Prompt(**(row | {"checks": tuple(row["checks"])})) for row in job["prompts"]]
    try:
        measure(Side.from_dict(job["side"]), prompts, job["settings"], job["api_key"], say)
    except SurefootError as error:
        say({"error": str(error)})
    return 0


def _end_with_parent() -> None:
    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
