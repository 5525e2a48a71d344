"""The command line: one line per error, exit codes, one-shot runs, prompt files, chat. The engine is a fake."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
from cli_fakes import FakeEngine, one_line

from surefoot.cli import main
from surefoot.cli.main import run_cli
from surefoot.core.errors import InputError
from surefoot.core.sampling import SamplingParams
from surefoot.run import ask, chat


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["run"], "Missing argument 'MODEL'"),
        (["rnu", "x"], "No such command 'rnu'"),
        (["run", "m", "hi", "--top-k", "x"], "--top-k"),
        (["run", "m", "hi", "--wrong"], "--wrong"),
        (["run", "m", "hi", "--top-p", "3"], "top_p must lie in (0, 1], got 3.0"),
        (["run", "m", "hi", "--temperature", "nan"], "temperature must lie in"),
        (["run", "m", "hi", "--max-tokens", "0"], "max_tokens must be at least 1"),
        (["run", "m", "hi", "--dtype", "int3"], "unknown dtype 'int3'"),
        (["run", "m", "hi", "--ops", "fast"], "ops must be"),
        (["run", "m", "hi", "--block-size", "0"], "block_size must be at least 1"),
        (["run", "m", ""], "the prompt is empty"),
        (["run", "m", "bad \udcff byte"], "not valid UTF-8"),
        (["run", "m", "hi", "-o", "x"], "-o belongs to --prompts"),
        (["run", "m", "hi", "--raw", "--system", "s"], "--raw leaves out"),
        (["run", "m", "hi", "--chat-template-kwargs", "[1]"], "must be a JSON object"),
        (["run", "m", "hi", "--chat-template-kwargs", "{"], "not valid JSON"),
        (["run", "m", "hi", "--prompts", "f"], "either a PROMPT or --prompts"),
        (["run", "m", "--prompts", "/nonexistent.jsonl"], "cannot read /nonexistent.jsonl"),
        (["selftest", "--device", "gpu"], "unknown device 'gpu'"),
        (["selftest", "--device", "npu:63"], "no device 'npu:63' here"),
        (["serve", "m", "--port", "99999"], "port must lie in"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(argv, says, engine, capsys):
    assert run_cli(argv) == 2
    assert says in one_line(capsys)
    assert engine.loads == []


def test_unexpected_errors_hide_the_traceback_until_debug(engine, capsys):
    engine.on_step = lambda: {}["two\nlines"]
    assert run_cli(["run", "m", "hi"]) == 1
    assert "unexpected KeyError" in capsys.readouterr().err
    with pytest.raises(KeyError):
        run_cli(["run", "m", "hi", "--debug"])


def test_interrupt_is_130(engine, capsys):
    def interrupt():
        raise KeyboardInterrupt

    engine.on_step = interrupt
    assert run_cli(["run", "m", "hi"]) == 130
    assert "surefoot: interrupted" in capsys.readouterr().err


def test_version_and_help(capsys):
    assert run_cli(["--version"]) == 0
    assert capsys.readouterr().out.startswith("surefoot 0.")
    for argv in ([], ["--help"], ["run", "-h"], ["serve", "-h"], ["selftest", "-h"], ["info", "-h"]):
        assert run_cli(argv) == 0
        text = capsys.readouterr().out
        assert "Usage: surefoot" in text and "Example" in text and "surefoot " in text.split("Example")[1]


def test_one_shot_streams_the_answer_and_says_the_figures(engine, capsys):
    assert run_cli(["run", "m", "hi", "--max-tokens", "4", "--device", "cpu", "--threads", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ">a<i\n"
    last = captured.err.splitlines()[-1]
    assert "11 prompt + 4 output tokens (length)" in last and "cpu | float32 | template chat" in last
    assert "note: a note" in captured.err
    assert engine.prompts == ["<user>hi<a>"]
    ((model, config),) = engine.loads
    assert (model, config.num_threads, config.enable_prefix_caching) == ("m", 2, True)


def test_system_raw_and_template_variables(engine, capsys):
    run_cli(["run", "m", "hi", "--system", "S", "--chat-template-kwargs", '{"think": 0}'])
    run_cli(["run", "m", "hi", "--raw", "--no-prefix-caching"])
    assert engine.prompts == ["{think=0}<system>S<user>hi<a>", "hi"]
    assert engine.loads[1][1].enable_prefix_caching is False
    assert "template none" in capsys.readouterr().err


def test_model_without_template_continues_the_prompt(engine, capsys):
    engine.tokenizer.has_chat_template = False
    assert run_cli(["run", "m", "hi"]) == 0
    assert engine.prompts == ["hi"]
    assert run_cli(["run", "m", "hi", "--system", "S"]) == 2
    assert "no chat template" in capsys.readouterr().err
    engine.tokenizer = None
    assert run_cli(["run", "m", "hi"]) == 2
    assert "no tokenizer" in capsys.readouterr().err


def test_logprobs_and_sampling_flags_reach_the_engine(engine, capsys, monkeypatch):
    seen = []
    add = engine.add_request
    monkeypatch.setattr(engine, "add_request", lambda ids, params: (seen.append(params), add(ids, params))[1])
    argv = ["run", "m", "ab", "--raw", "--logprobs", "1", "--stop", "x", "--stop", "y", "--seed", "7", "--top-k", "3"]
    assert run_cli(argv) == 0
    assert seen == [SamplingParams(logprobs=1, stop=("x", "y"), seed=7, top_k=3)]
    assert "'b'  ('b' -0.500)" in capsys.readouterr().err


def test_prompt_from_a_pipe(engine, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("你好\n".encode())))
    assert run_cli(["run", "m", "--raw"]) == 0
    assert capsys.readouterr().out == "好你\n"
    for bad, says in ((b" \n", "no prompt"), (b"\xff\xfe", "not valid UTF-8")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bad)))
        assert run_cli(["run", "m"]) == 2
        assert says in one_line(capsys)


def test_info_shows_what_is_in_effect(engine, capsys):
    assert run_cli(["info", "m"]) == 0
    text = capsys.readouterr().out
    assert "1,234,567" in text and "rms_norm/cpu reference" in text
    assert run_cli(["info", "m", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_parameters"] == 1234567


def test_ttft_and_decode_speed():
    answer = ask.Answer(token_ids=[1, 2, 3], started=1.0, first=1.5, last=2.5)
    assert (answer.ttft_s, answer.decode_tokens_per_s) == (0.5, 2.0)
    assert ask.Answer(token_ids=[1], started=1.0, first=1.5, last=1.5).decode_tokens_per_s is None


class Script:
    """Stands in for `input`: returns lines, raises exceptions, ends with Ctrl-D."""

    def __init__(self, *lines):
        self.lines = list(lines)

    def __call__(self, sign):
        line = self.lines.pop(0) if self.lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line


def test_chat_keeps_history_resets_and_leaves(capsys):
    engine = FakeEngine()
    chat.run(
        engine,
        SamplingParams(max_tokens=2),
        ask.Style(system="S"),
        Script("a", "b", "", "/reset", "c", "/what", "/exit", "x"),
    )
    assert engine.prompts == [
        "<system>S<user>a<a>",
        "<system>S<user>a<assistant>>a<user>b<a>",
        "<system>S<user>c<a>",
    ]
    captured = capsys.readouterr()
    assert captured.out == ">a\n" * 3
    assert "commands: /reset" in captured.err


def test_chat_ctrl_c_stops_the_answer_and_ctrl_d_leaves(capsys):
    engine = FakeEngine()

    def press():
        if engine.steps == 2:
            import signal

            signal.raise_signal(signal.SIGINT)

    engine.on_step = press
    chat.run(engine, SamplingParams(), ask.Style(), Script("a", KeyboardInterrupt(), "b"))
    assert engine.cancelled == ["r0"]
    assert engine.prompts[1] == "<user>a<assistant>>a<user>b<a>"
    assert "stopped by you" in capsys.readouterr().err


def test_chat_takes_back_a_turn_that_does_not_fit(capsys):
    engine = FakeEngine(max_model_len=30)
    chat.run(engine, SamplingParams(max_tokens=2), ask.Style(), Script("a", "b" * 40, "c"))
    assert engine.prompts == ["<user>a<a>", "<user>a<assistant>>a<user>c<a>"]
    assert "the maximum is 30 (/reset starts anew)" in capsys.readouterr().err


def test_chat_without_template_has_no_history(capsys):
    engine = FakeEngine(template=False)
    chat.run(engine, SamplingParams(), ask.Style(), Script("a", "b"))
    assert engine.prompts == ["a", "b"]
    assert "without history" in capsys.readouterr().err


def test_surrogates_are_refused():
    with pytest.raises(InputError, match=r"not valid UTF-8 \(character 2\)"):
        ask.check_prompt("a\ud800")


def test_a_closed_pipe_ends_quietly():
    command = f"{sys.executable} -m surefoot.cli.main run --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr and done.stdout.startswith("Usage")


def test_warnings_are_notes_without_a_line_of_code(capsys):
    main._note(UserWarning("slow"), UserWarning, "file.py", 3)
    assert capsys.readouterr().err == "note: slow\n"
