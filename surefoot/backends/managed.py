"""A server that we start ourselves: process, log, health, stop. What it is, and its flags, others know (vllm.py).

    with ManagedServer(command, "http://127.0.0.1:8100", log, name="vLLM") as server:
        server.wait_until_healthy(timeout=600, progress=progress)
        ...                                              # talk to server.url
    # here its whole process group is gone, also after Ctrl-C; and if this process is killed, keeper.py sees to it

Standard output and error of the server go to the log file; an error quotes its most telling line and names the file.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from surefoot.backends import keeper
from surefoot.core.errors import InputError, SurefootError
from surefoot.core.sockets import bind

Progress = Callable[[str, "float | None"], None]
POLL = 0.25
TAIL_LINES = 20
TAIL_BYTES = 256 * 1024
TELLING = re.compile(r"(?:\b\w*(?:Error|Exception)\b(?::|$)|\berror: )")  # `ValueError: ...`, argparse's `error: ...`
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class ServerError(SurefootError):
    """The managed server did not start, or ended. `tail`: the last lines of its log."""

    http_status = 502

    def __init__(self, message: str, tail: Sequence[str] = ()):
        super().__init__(message)
        self.tail = list(tail)


class ManagedServer:
    """One server process. phases: (text in the log, what it means to a user), the last one found is shown."""

    def __init__(
        self,
        command: Sequence[str],
        url: str,
        log: Path,
        *,
        name: str,
        env: Mapping[str, str] | None = None,
        grace: float = 30.0,
        phases: Sequence[tuple[str, str]] = (),
    ):
        self.command, self.url, self.log, self.name = list(command), url, log, name
        self.env, self.grace, self.phases = env, grace, phases
        self.start_s: float | None = None
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> ManagedServer:
        self._started = time.monotonic()
        try:
            with open(self.log, "wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, keeper.__file__, str(self.grace), *self.command],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=dict(self.env) if self.env is not None else None,
                    bufsize=0,
                    start_new_session=True,  # Ctrl-C at the terminal reaches us, and we stop it in order
                )
        except OSError as error:
            raise InputError(f"cannot start {self.name} with its log in {self.log}: {error.strerror}") from None
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def wait_until_healthy(self, timeout: float, progress: Progress | None = None) -> None:
        """Until GET /health answers 200. ServerError if it ends before that or the time is over."""
        import httpx

        with httpx.Client(timeout=2.0, trust_env=False) as client:
            while True:
                if self.returncode is not None:
                    raise self.death("before it was ready")
                try:
                    if client.get(f"{self.url}/health").status_code == 200 and self.returncode is None:
                        break
                except httpx.HTTPError:
                    pass
                if time.monotonic() - self._started > timeout:
                    self.stop()
                    raise ServerError(
                        f"{self.name} was not ready after {timeout:g} s; last: {self._said()}; its log is {self.log}; "
                        "a larger --start-timeout waits longer",
                        self.tail(),
                    )
                if progress is not None:
                    progress(f"starting {self.name}: {self.phase()} (log {self.log})", None)
                time.sleep(POLL)
        self.start_s = time.monotonic() - self._started

    def wait(self) -> int:
        """Until it ends by itself."""
        assert self._process is not None
        return self._process.wait()

    def death(self, when: str) -> ServerError:
        """The error that says how it ended. Waits a little, because a broken connection is seen before the end."""
        assert self._process is not None
        code = self._process.wait(timeout=10)
        how = f"was ended by signal {code - 128}" if code > 128 else f"ended with code {code}"
        return ServerError(f"{self.name} {how} {when}: {self._said()}; its log is {self.log}", self.tail())

    def has_died(self, within: float = 2.0) -> bool:
        """Whether it is gone, or goes within so many seconds."""
        deadline = time.monotonic() + within
        while self.returncode is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.returncode is not None

    def stop(self) -> None:
        """SIGTERM to the whole group, SIGKILL after the grace; an interrupt while waiting kills at once."""
        if self._process is None or self._process.stdin is None or self._process.stdin.closed:
            return
        try:
            self._tell(b"t")
            self._process.wait(self.grace + 10)
        except BaseException:
            self._tell(b"k")
            self._process.wait(10)
            raise
        finally:
            self._process.stdin.close()

    def _tell(self, word: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended
            self._process.stdin.write(word)

    # ---- the log

    def tail(self, lines: int = TAIL_LINES) -> list[str]:
        return self._lines()[-lines:]

    def phase(self) -> str:
        """The latest of the known phases that the log speaks of."""
        text = "\n".join(self._lines())
        found = [(at, what) for mark, what in self.phases if (at := text.rfind(mark)) >= 0]
        return max(found)[1] if found else "importing"

    def _said(self) -> str:
        """The line of the log that tells most: the last one that names an error, else the last one."""
        lines = self._lines()
        at = next((i for i in reversed(range(len(lines))) if TELLING.search(lines[i])), None)
        if at is None:
            line = next((line for line in reversed(lines) if line.strip()), "it wrote nothing")
        else:  # pydantic says on the next line what is wrong
            line = " ".join(lines[at : at + 2]) if "validation error" in lines[at] else lines[at]
        return " ".join(line.split())[:300]

    def _lines(self) -> list[str]:
        try:
            with open(self.log, "rb") as log:
                log.seek(0, 2)
                log.seek(max(0, log.tell() - TAIL_BYTES))
                text = log.read().decode("utf-8", "replace")
        except OSError:
            return []
        return [ANSI.sub("", line).rstrip() for line in text.splitlines()]


def free_port(host: str, port: int = 0) -> int:
    """The port if nobody listens there, or a free one for 0; asked before a model takes minutes to load."""
    with bind(host, port) as probe:
        return probe.getsockname()[1]
