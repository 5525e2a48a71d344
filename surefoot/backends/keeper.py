"""Runs one command and sees to it that nothing of it stays behind. A script by itself, standard library only.

    python keeper.py GRACE COMMAND...

The command gets a process group of its own, and standard input of this script is a pipe that the starter holds:

- "t" on it, or its end because the starter died in whatever way: SIGTERM to the group, SIGKILL after GRACE seconds;
- "k": SIGKILL at once.

When the command has ended, what is left of its group is killed, so that engine processes do not outlive their server.
Exit code: the command's, or 128 + the number of the signal that ended it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

POLL = 0.05


def keep(command: list[str], grace: float) -> int:
    told: list[bytes] = []  # what signals said
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, lambda *_: told.append(b"t"))
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", flush=True)
        return 127
    try:
        while child.poll() is None:
            word = _word(POLL) or (told and told.pop())
            if word == b"k":
                break
            if word:
                _terminate(child, grace, listening=word != b"end")
                break
    finally:
        _signal_group(child.pid, signal.SIGKILL)
    code = child.wait()
    return code if code >= 0 else 128 - code


def _word(seconds: float) -> bytes:
    """What the starter says within the time: b"t", b"k", b"end" when it is gone, or nothing."""
    if not select.select([0], [], [], seconds)[0]:
        return b""
    return os.read(0, 1) or b"end"


def _terminate(child: subprocess.Popen, grace: float, listening: bool) -> None:
    _signal_group(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while child.poll() is None and time.monotonic() < deadline:
        if not listening:
            time.sleep(POLL)
        elif word := _word(POLL):
            if word == b"k":
                return
            listening = word != b"end"


def _signal_group(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signum)


if __name__ == "__main__":
    sys.exit(keep(sys.argv[2:], float(sys.argv[1])))
