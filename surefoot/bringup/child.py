"""One stage (or the server of the load stage) in a process of its own: `python -m surefoot.bringup.child DIR STAGE`.

A kernel that crashes takes its stage with it and not the run, memory is given back between stages, and a peak of
memory is the stage's own. On stdout goes one JSON object per line, progress and at last the end; whatever libraries
print goes to stderr, which the parent keeps as logs/STAGE.log. Stdin is the parent's sign of life.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surefoot.bringup.folder import DiskError, RunFolder, cannot_write
from surefoot.bringup.settings import BringupSettings
from surefoot.bringup.stages.base import Work
from surefoot.core.child import end_with_parent, open_channel
from surefoot.core.errors import SurefootError

if TYPE_CHECKING:
    from surefoot.bringup.stages.base import Stage

SERVER = "server"
NO_SPACE = {errno.EFBIG, errno.ENOSPC, errno.EROFS, errno.EDQUOT}


def main(folder: str, what: str, stages: dict[str, Stage] | None = None) -> int:
    say = open_channel()
    end_with_parent()
    run = RunFolder.open(Path(folder))
    settings = BringupSettings.from_dict(run.manifest["settings"])
    work = Work(settings, run, lambda text, done: say({"what": text, "fraction": done}))
    try:
        perform(work, what, say, stages)
    except DiskError as error:
        say({"error": str(error), "kind": "disk"})
    except SurefootError as error:
        say({"error": str(error), "kind": "disk" if no_space(error) else "input"})
    except OSError as error:
        traceback.print_exc()
        if no_space(error):
            say({"error": str(cannot_write(run.path / what, error)), "kind": "disk"})
        else:
            say({"error": brief(error), "kind": "bug"})
    except Exception as error:
        traceback.print_exc()
        say({"error": brief(error), "kind": "bug"})
    else:
        return 0
    return 1


def perform(work: Work, what: str, say: Any, stages: dict[str, Stage] | None) -> None:
    if what == SERVER:
        from surefoot.bringup.server import serve

        return serve(work, say)
    from surefoot.bringup.stages.order import BY_NAME

    stage = (stages or BY_NAME)[what]
    sys.argv = stage.command(work.settings)  # records keep the command that repeats them
    record = stage.run(work)
    if record is not None:
        work.folder.write(what, record)
    say({"done": True})
    return None


def no_space(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is a disk that takes nothing more."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return True
        error = error.__cause__
    return False


def brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def leave(code: int) -> None:
    """Threads of a device library must not keep a finished stage alive."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main(sys.argv[1], sys.argv[2]))
