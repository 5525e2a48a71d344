"""Prompts and traces: exact lengths, shared blocks, and a line with file and number for each broken row."""

from __future__ import annotations

import json
import random
from pathlib import Path

import mock_server
import pytest

from surefoot.bench.target import open_target
from surefoot.bench.workload import read_prompts, read_trace, trace_ids
from surefoot.core.errors import InputError

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.fixture(scope="module")
def mock():
    with mock_server.running() as server:
        yield server


def write(folder: Path, text: str, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_azure_trace(tmp_path):
    rows = "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    first, second = read_trace(write(tmp_path, HEADER + rows))
    assert (first.at, first.prompt_tokens, first.output_tokens) == (0.0, 374, 44)
    assert second.at == pytest.approx(4.3145790)
    assert [r.at for r in read_trace(write(tmp_path, HEADER + "5,1,1\n7.5,1,1\n8,1,1\n"), limit=2)] == [0, 2.5]


def test_the_public_azure_trace():
    path = DATA / "traces" / "AzureLLMInferenceTrace_conv.csv"
    if not path.is_file():
        pytest.skip("the public trace is not here")
    rows = read_trace(path)
    assert len(rows) == 19_366
    assert 3000 < rows[-1].at < 4000


def test_mooncake_blocks_become_shared_tokens(tmp_path):
    lines = [
        {"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]},
        {"timestamp": 3000, "input_length": 1050, "output_length": 6, "hash_ids": [7, 8, 11]},
    ]
    rows = read_trace(write(tmp_path, "\n".join(map(json.dumps, lines)), "m.jsonl"))
    assert [r.at for r in rows] == [0.0, 2.0]
    a, b = (trace_ids(row, list(range(100, 200)), random.Random(i)) for i, row in enumerate(rows))
    assert (len(a), len(b)) == (1100, 1050)
    assert a[:1024] == b[:1024]
    assert a[1024:1050] != b[1024:]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        (HEADER, "holds no request"),
        ("TIME,ContextTokens\n1,2\n", r":1: the header lacks TIMESTAMP, GeneratedTokens"),
        (HEADER + "1,2,3\n2,x,3\n", r":3: 'x' is no number of tokens"),
        (HEADER + "1,2,3\n\n2,0,3\n", r":4: '0' is no number of tokens"),
        (HEADER + "1,2,3\n2,5\n", r":3: 2 cells"),
        (HEADER + "yesterday,2,3\n", r":2: 'yesterday' is no time"),
        (HEADER + "5,2,3\n4,2,3\n", r":3: the time goes backwards"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 5}\n{"timestamp": 2}\n', r":2: needs"),
        ('{"timestamp": 1, "input_length": 5, "output_length": -5}\n', r":1: -5 is no number of tokens"),
        ("{broken\n", r":1: needs"),
    ],
)
def test_a_broken_row_is_named(tmp_path, text, says):
    with pytest.raises(InputError, match=says) as raised:
        read_trace(write(tmp_path, text))
    assert "\n" not in str(raised.value)


def test_prompts_of_a_file(tmp_path):
    lines = ['{"prompt": "a"}', '{"turns": ["b", "c"], "max_tokens": 5}', '{"prompt_token_ids": [1, 2]}']
    asks = read_prompts(write(tmp_path, "\n".join(lines), "p.jsonl"), chat=False)
    assert [(a.text, a.token_ids, a.max_tokens) for a in asks] == [
        ("a", None, None),
        ("b", None, 5),
        (None, [1, 2], None),
    ]
    (plain,) = read_prompts(write(tmp_path, "hello\n\n", "p.txt"), chat=True)
    assert plain.messages == [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{x", ":1: not valid JSON"),
        ("[1]", ":1: must be a JSON object"),
        ('{"id": 1}', ":1: needs one of"),
        ('{"prompt": "a", "max_tokens": 0}', ":1: max_tokens"),
        ('{"messages": [{}]}', ":1: messages need --endpoint chat"),
        ("", "holds no prompt"),
    ],
)
def test_a_broken_prompt_is_named(tmp_path, line, says):
    with pytest.raises(InputError, match=says):
        read_prompts(write(tmp_path, line, "p.jsonl"), chat=False)


def test_missing_file():
    with pytest.raises(InputError, match="cannot read nowhere.csv"):
        read_trace(Path("nowhere.csv"))


def test_prompts_of_an_exact_length(mock):
    """Token ids where the server takes them, else text that its tokenizer counts, the template of a chat included."""
    draw = random.Random(0)
    target = open_target(mock.url, "x")
    first, second = (target.exact(50, draw).token_ids for _ in range(2))
    assert len(first) == len(second) == 50
    assert first[:3] != second[:3]
    chat = open_target(mock.url, "x", endpoint="chat").exact(50, draw)
    assert len(("t t t " + chat.messages[0]["content"]).split()) == 50
    with pytest.raises(InputError, match="no prompts of an exact length, use --prompts FILE"):
        open_target(mock.url, "notok=1").exact(50, draw)


def test_fields_that_the_server_refuses_are_left_out_and_said(mock):
    target = open_target(mock.url, "refuse=1")
    assert target.extras == {}
    assert "ignore_eos" in target.notes[0]
    assert set(open_target(mock.url, "x").extras) == {"ignore_eos", "return_token_ids"}
