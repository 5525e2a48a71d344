"""One side in a process of its own: `python -m surefoot.compare.child < {"side": ..., "prompts": [...], ...}`.

Its memory is then its own, and a side that crashes takes nothing with it. On stdout goes a JSON object per line:
progress, the facts after loading, each answer, the end. Stdin stays open as the parent's sign of life.
"""

from __future__ import annotations

import json
import sys

from surefoot.compare.ask import measure
from surefoot.compare.prompts import Prompt
from surefoot.compare.sides import Side
from surefoot.core.child import end_with_parent, open_channel
from surefoot.core.errors import SurefootError


def main() -> int:
    say = open_channel()
    job = json.loads(sys.stdin.buffer.readline())
    end_with_parent()
    prompts = [Prompt(**(row | {"checks": tuple(row["checks"])})) for row in job["prompts"]]
    try:
        measure(Side.from_dict(job["side"]), prompts, job["settings"], job["api_key"], say)
    except SurefootError as error:
        say({"error": str(error)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
