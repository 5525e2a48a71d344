"""A conversation at the terminal: history, streaming, /reset and /exit; Ctrl-C stops an answer, Ctrl-D leaves.

A model without a chat template cannot hold a conversation: each line is then continued by itself, and the user is told.
"""

from __future__ import annotations

import contextlib
import importlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from surefoot.core.errors import SurefootError
from surefoot.core.sampling import SamplingParams
from surefoot.run import ask

if TYPE_CHECKING:
    from surefoot.engine.engine import Engine


def run(engine: Engine, params: SamplingParams, style: ask.Style, read: Callable[[str], str] = input) -> None:
    """Read, answer, repeat. `read` gets the prompt sign and returns a line or raises EOFError, as `input` does."""
    with contextlib.suppress(ImportError):  # line editing and history where the platform has them
        importlib.import_module("readline")
    templated = ask.uses_template(engine, style)
    _greet(engine, templated)
    turns: list[dict[str, Any]] = []
    while True:
        try:
            with engine.postponed.meanwhile():
                line = read("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            _note("\n/exit or Ctrl-D leaves")
            continue
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            turns.clear()
            _note("the conversation starts anew")
        elif line.startswith("/"):
            _note("commands: /reset, /exit; Ctrl-C stops an answer")
        elif line:
            _turn(engine, params, style, turns if templated else [], line)


def _greet(engine: Engine, templated: bool) -> None:
    info = engine.info
    _note(
        f"{info.model} on {info.device} ({info.precision}). /reset starts anew, /exit leaves, Ctrl-C stops an answer."
    )
    if not templated:
        _note("No chat template in use: each line is continued by itself, without history.")


def _turn(engine: Engine, params: SamplingParams, style: ask.Style, turns: list[dict[str, Any]], line: str) -> None:
    """Ask and answer once. A turn that cannot be answered (too long, ...) is taken back; the history stays whole."""
    before = len(turns)
    turns.append({"role": "user", "content": line})
    try:
        ask.check_prompt(line)
        if ask.uses_template(engine, style):
            token_ids = ask.encode_messages(engine, style.messages(*turns), style)
        else:
            token_ids = ask.encode_prompt(engine, line, style)
        with interruptible() as stopped:
            answer = ask.stream(engine, token_ids, params, _write, stopped)
    except SurefootError as error:
        del turns[before:]
        _note(f"surefoot: {error}" + (" (/reset starts anew)" if before else ""))
        return
    turns.append({"role": "assistant", "content": answer.text})
    _write("\n")
    _note(ask.summary(engine, answer, "chat" if ask.uses_template(engine, style) else "none"))


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within the block, a first Ctrl-C makes the yielded function true and a second one interrupts.

    An exception in the middle of an engine step would leave the engine half-way; a flag is looked at between steps.
    """
    pressed = False

    def on_interrupt(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
