"""`surefoot run --prompts`: checked before it runs, results in order, never half a file under the final name."""

from __future__ import annotations

import json

import pytest
from cli_fakes import FakeEngine, one_line

from surefoot.cli.main import run_cli
from surefoot.core.errors import InputError
from surefoot.core.sampling import SamplingParams
from surefoot.run import ask, batch, records


def write(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n", encoding="utf-8")
    return path


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_results_keep_the_order_of_the_input(tmp_path, engine, capsys):
    source = write(
        tmp_path / "in.jsonl",
        {"id": "long", "prompt": "abcdef"},
        "",
        {"prompt": "xyz", "max_tokens": 1, "logprobs": 0},
        {"messages": [{"role": "user", "content": "中"}], "stop": "q"},
        {"prompt_token_ids": [65, 66]},
    )
    out = tmp_path / "out.jsonl"
    assert run_cli(["run", "m", "--prompts", str(source), "-o", str(out), "--raw", "--max-tokens", "50"]) == 0
    got = rows(out)
    assert [r["id"] for r in got] == ["long", 3, 4, 5]
    assert [r["text"] for r in got] == ["fedcba", "z", ">a<中>resu<", "BA"]
    assert [r["finish_reason"] for r in got] == ["stop", "length", "stop", "stop"]
    assert got[1]["logprobs"] == [{"token_id": 122, "logprob": -0.5, "rank": 1, "top": [[122, -0.5]]}]
    assert "logprobs" not in got[0] and got[0]["num_prompt_tokens"] == 6
    assert not (tmp_path / "out.jsonl.partial").exists()
    assert "4 prompts: 21 prompt + 19 output tokens" in capsys.readouterr().err


def test_without_o_the_results_go_to_stdout(tmp_path, engine, capsys):
    source = write(tmp_path / "in.jsonl", {"prompt": "ab"})
    assert run_cli(["run", "m", "--prompts", str(source), "--system", "S"]) == 0
    assert engine.prompts == ["<system>S<user>ab<a>"]
    assert json.loads(capsys.readouterr().out)["text"] == ">a<ba>resu<S>metsys<"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must be a JSON object"),
        ({}, "needs exactly one of prompt, messages, prompt_token_ids; has none"),
        ({"prompt": "a", "messages": []}, "has prompt, messages"),
        ({"prompt": ""}, "prompt must be a text that is not empty"),
        ({"prompt": 3}, "prompt must be a text"),
        ('{"prompt": "\\ud800"}', "half a surrogate pair"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": ["hi"]}, 'each message must be an object with "role" and "content"'),
        ({"prompt_token_ids": [1, -2]}, "prompt_token_ids must be a list of token ids"),
        ({"prompt_token_ids": [True]}, "prompt_token_ids must be a list of token ids"),
        ({"prompt": "a", "temprature": 1}, "unknown field 'temprature'"),
        ({"prompt": "a", "temperature": "hot"}, 'temperature must be a number, got "hot"'),
        ({"prompt": "a", "temperature": -1}, "temperature must lie in"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens must be an integer"),
        ({"prompt": "a", "max_tokens": None}, "max_tokens must be an integer"),
        ({"prompt": "a", "stop": [1]}, "stop must be a text or a list of texts"),
        ({"prompt": "a", "stop": ""}, "a stop string must not be empty"),
        ({"prompt": "a", "ignore_eos": 1}, "ignore_eos must be true or false"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias must be an object"),
        ({"prompt": "a", "id": 1.5}, "id must be a string or an integer"),
    ],
)
def test_a_bad_line_is_named_before_anything_runs(line, says, tmp_path, engine, capsys):
    source = write(tmp_path / "in.jsonl", {"prompt": "fine"}, line)
    out = tmp_path / "out.jsonl"
    assert run_cli(["run", "m", "--prompts", str(source), "-o", str(out)]) == 2
    message = one_line(capsys)
    assert f"{source}:2: " in message and says in message
    assert engine.loads == [] and list(tmp_path.iterdir()) == [source]


def test_a_prompt_that_the_engine_refuses_runs_nothing(tmp_path, engine, capsys):
    source = write(tmp_path / "in.jsonl", {"prompt": "fine"}, {"prompt": "x" * 300})
    out = tmp_path / "out.jsonl"
    assert run_cli(["run", "m", "--prompts", str(source), "-o", str(out)]) == 2
    assert f"{source}:2: the prompt has" in capsys.readouterr().err
    assert engine.steps == 0 and not out.exists()


def test_empty_undecodable_and_unwritable(tmp_path, engine, capsys):
    good = write(tmp_path / "good.jsonl", {"prompt": "a"})
    empty = write(tmp_path / "empty.jsonl", "", "")
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b'{"prompt": "a"}\n\xff\xfe\n')
    for argv, says in (
        ([empty], "holds no prompts"),
        ([binary], f"{binary}:2: not valid UTF-8"),
        ([tmp_path], "cannot read"),
        ([good, "-o", tmp_path / "no/out"], "there is no folder"),
        ([good, "-o", tmp_path], "it is a folder"),
        ([good, "-o", good], "must not be the --prompts file"),
    ):
        assert run_cli(["run", "m", "--prompts", *map(str, argv)]) == 2
        assert says in one_line(capsys)
    assert engine.loads == []


def test_interrupt_keeps_the_finished_lines_aside(tmp_path, engine, capsys):
    source = write(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "bcd"})
    out = tmp_path / "out.jsonl"
    out.write_text("older\n")

    def interrupt():
        if engine.steps == 2:
            raise KeyboardInterrupt

    engine.on_step = interrupt
    assert run_cli(["run", "m", "--raw", "--prompts", str(source), "-o", str(out)]) == 130
    assert out.read_text() == "older\n"
    assert [r["text"] for r in rows(tmp_path / "out.jsonl.partial")] == ["a"]
    assert "1 of 2 results are in" in capsys.readouterr().err


def test_bom_crlf_and_own_system_message(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(
        b'\xef\xbb\xbf{"prompt": "a"}\r\n'
        b'{"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "u"}]}'
    )
    job = batch.read(source, SamplingParams(max_tokens=1), None)
    fake = FakeEngine()
    batch.run(fake, job, ask.Style(system="S"))
    assert fake.prompts == ["<system>S<user>a<a>", "<system>own<user>u<a>"]


def test_line_fields_override_the_flags():
    defaults = SamplingParams(max_tokens=5, temperature=0.5, seed=3)
    line = '{"prompt": "a", "temperature": 1, "logit_bias": {"7": -1}, "stop_token_ids": [2], "seed": null}'
    params = records.parse(line, "f:1", 1, defaults).params
    assert params == SamplingParams(max_tokens=5, temperature=1.0, logit_bias={7: -1.0}, stop_token_ids=(2,))
    with pytest.raises(InputError, match="f:9: "):
        records.parse("", "f:9", 9, defaults)
