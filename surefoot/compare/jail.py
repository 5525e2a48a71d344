"""Runs a model's code in a process of its own with limits, and judges it there. A script, standard library only.

    python -I jail.py WORD < {"code": ..., "judge": ...}     # prints WORD and the judgement as JSON, if it gets there

Limits: CPU seconds, memory, size and number of files, no core dump; on Linux a network namespace without any interface
where the kernel allows it; and an audit hook that refuses sockets, processes, signals, ctypes and writing files.

NOTE: limits against accidents. A determined attacker gets out of an audit hook: run code of strangers elsewhere.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import types

CPU_SECONDS = 5
MEMORY = 1 << 30
FILE_BYTES = 1 << 20
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
REFUSED = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.kill", "ctypes.", "pty.",
           "shutil.", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink",
           "signal.", "webbrowser.", "urllib.", "ftplib.", "smtplib.", "resource.")  # fmt: skip


def limit() -> bool:
    """Set the limits; returns whether the network is out of reach by a namespace."""
    alone = _without_network()
    with contextlib.suppress(ImportError):
        import resource

        for name, value in (
            ("RLIMIT_CPU", CPU_SECONDS), ("RLIMIT_AS", MEMORY), ("RLIMIT_FSIZE", FILE_BYTES), ("RLIMIT_CORE", 0),
            ("RLIMIT_NOFILE", 32),
        ):  # fmt: skip
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(getattr(resource, name), (value, value))
    return alone


def _without_network() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        unshare = ctypes.CDLL(None).unshare
        return unshare(CLONE_NEWNET) == 0 or unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0
    return False


def refuse(event: str, args: tuple) -> None:
    """The audit hook."""
    if event.startswith(REFUSED):
        raise PermissionError(f"{event} is not allowed here")
    if event == "open" and len(args) == 3 and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
        raise PermissionError("writing files is not allowed here")


def run(code: str, judge: str) -> str:
    """What the judge says of the code's globals; whatever is wrong is an exception."""
    module = types.ModuleType("answer")
    sys.modules["answer"] = module
    judging: dict = {"__name__": "judge"}
    exec(compile(judge, "judge", "exec"), judging)
    sys.stdin, sys.stdout = io.StringIO(), io.StringIO()
    sys.addaudithook(refuse)
    exec(compile(code, "answer", "exec"), module.__dict__)
    return judging["judge"](dict(module.__dict__))


def main(word: str) -> None:
    given = json.loads(sys.stdin.buffer.read())
    out = os.dup(1)
    alone = limit()
    try:
        result = {"passed": True, "why": run(given["code"], given["judge"])}
    except BaseException as error:
        result = {"passed": False, "why": f"{type(error).__name__}: {error}"[:300]}
    os.write(out, (word + json.dumps(result | {"network": "none" if alone else "refused by a hook"})).encode())
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
