"""The front door: `surefoot VERB ...`. Each verb is a thin function in its own file; heavy imports happen inside it.

Errors end in one line on stderr, never in a traceback unless --debug asks for it. Exit codes: 0 done, 1 a check failed
or a bug showed, 2 the input or the environment is at fault, 3 a proof could not be decided, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from typing import Annotated, Any

import typer

from surefoot import __version__
from surefoot.cli import (
    audit,
    bench,
    bringup,
    calibrate,
    compare,
    doctor,
    estimate,
    info,
    ops,
    proof,
    quantize,
    run,
    selftest,
    serve,
    shapes,
    verify,
)
from surefoot.core.errors import SurefootError

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run, serve and prove open LLMs on CPUs, GPUs and NPUs.\n\n"
    "\b\nExamples:\n"
    '  surefoot run canary-llama "What is the capital of France?"\n'
    "  surefoot serve canary-qwen3.5 --port 8000\n"
    "  surefoot selftest --device cpu\n"
    "  surefoot verify canary-llama --dtype bfloat16",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"surefoot {__version__}")
        raise typer.Exit


INTERRUPTED = 130


@app.callback()
def _globals(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="On an error show the traceback; may stand anywhere.")] = False,
) -> None:
    """Options before the verb. `--debug` is taken out of the arguments in `run_cli`; it stands here for the help."""


app.command("bringup", short_help="Check, prove, measure, and write the report.")(bringup.bringup)
app.command("run", short_help="Answer one prompt, a file of prompts, or chat.")(run.run)
app.command("serve", short_help="Serve a model in OpenAI's protocol.")(serve.serve)
app.command("selftest", short_help="Check that a device computes right.")(selftest.selftest)
app.command("verify", short_help="Prove that a model computes the right thing.")(verify.verify)
app.add_typer(proof.app, name="proof", short_help="Check, show or compare proofs.")
app.command("quantize", short_help="Write a quantised copy of a model.")(quantize.quantize)
app.command("bench", short_help="Measure how fast a model or a server is.")(bench.bench)
app.command("shapes", short_help="Choose sizes to pad to for a workload.")(shapes.shapes)
app.command("estimate", short_help="Say how fast a model could be on a chip.")(estimate.estimate)
app.command("calibrate", short_help="Measure this device for estimates.")(calibrate.calibrate)
app.command("audit", short_help="Check published numbers against each other.")(audit.audit)
app.command("ops", short_help="List the operators a model needs on an NPU.")(ops.ops)
app.command("doctor", short_help="Find what is wrong with an installation.")(doctor.doctor)
app.command("compare", short_help="Compare models or configurations.")(compare.compare)
app.command("info", short_help="Show what is in effect for a model.")(info.info)


def run_cli(argv: list[str]) -> int:
    """Run one command line and return its exit code."""
    argv, debug = _take_debug(argv)
    try:
        code = int(app(argv or ["--help"], prog_name="surefoot", standalone_mode=False) or 0)
        return _say("interrupted", code) if code == INTERRUPTED else code
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader (head, less) has left. Nothing more can be said on stdout; keep Python from trying at exit.
        sys.stdout = io.StringIO()
        return 1
    except Exception as error:
        if debug:
            raise
        return _explain(error)


def _take_debug(argv: list[str]) -> tuple[list[str], bool]:
    """Split --debug off, wherever it stands before a `--`."""
    end = argv.index("--") if "--" in argv else len(argv)
    head = [a for a in argv[:end] if a != "--debug"]
    return head + argv[end:], len(head) < end


def _explain(error: Exception) -> int:
    """One line for any error, and its exit code."""
    if isinstance(error, SurefootError):
        return _say(str(error), error.exit_code)
    if hasattr(error, "format_message"):  # a usage error of Typer's parser
        context: Any = getattr(error, "ctx", None)
        where = context.command_path if context else "surefoot"
        return _say(f"{error.format_message().rstrip('.')} (see {where} --help)", 2)
    text = " ".join(str(error).split())
    return _say(f"unexpected {type(error).__name__}: {text[:300]} (rerun with --debug for the traceback)", 1)


def _say(message: str, code: int) -> int:
    print(f"surefoot: {message}", file=sys.stderr)
    return code


def _note(message: Warning | str, *_: Any, **__: Any) -> None:
    """In place of `warnings.showwarning`, which names a line of code."""
    print(f"note: {message}", file=sys.stderr)


def main() -> None:
    if "--debug" not in sys.argv:
        warnings.showwarning = _note
    for stream in (sys.stdout, sys.stderr):
        # Half a surrogate from a model or a terminal that is not UTF-8 must not end in a traceback.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    sys.exit(run_cli(sys.argv[1:]))


if __name__ == "__main__":
    main()
