"""One raw log, everybody's words for it: each tool's formula by hand, on a log whose times are known."""

from __future__ import annotations

import json

import pytest

from surefoot.bench.definitions import DEFINITIONS, table
from surefoot.bench.metrics import goodput, parse_targets, point_metrics, text_checks
from surefoot.bench.rawlog import Chunk, RequestLog, read
from surefoot.bench.sse import Reader, events
from surefoot.core.errors import InputError


def chunk(time, kind, tokens=None):
    return Chunk(time, 10, tokens, kind, 5 if kind == "text" else 0)


@pytest.fixture
def log() -> RequestLog:
    """Sent at 10; role at 10.1; 2 tokens at 10.3, 10.4, 10.6; finish at 10.7, usage at 10.8, done at 10.9."""
    chunks = [
        chunk(10.1, "role"),
        chunk(10.3, "reasoning", 2),
        chunk(10.4, "text", 2),
        chunk(10.6, "text", 2),
        chunk(10.7, "finish", 0),
        chunk(10.8, "usage"),
        chunk(10.9, "done"),
    ]
    return RequestLog(0, sent=10.0, ended=10.95, scheduled=9.99, output_tokens=6, prompt_tokens=4, chunks=chunks)


EXPECTED = {
    "ttft@surefoot": [0.3],
    "ttfr@surefoot": [0.4],
    "tpot@surefoot": [0.3 / 4],
    "itl@surefoot": [0.1, 0.2],
    "e2e@surefoot": [0.95],
    "ttft@vllm": [0.1],
    "tpot@vllm": [0.6 / 5],
    "itl@vllm": [0.2, 0.1, 0.2, 0.1],
    "e2e@vllm": [0.7],
    "ttft@guidellm": [0.3],
    "tpot@guidellm": [0.6 / 6],
    "itl@guidellm": [0.3 / 5],
    "e2e@guidellm": [0.95],
    "ttft@evalscope": [0.1],
    "tpot@evalscope": [0.7 / 5],
    "itl@evalscope": [0.2, 0.1, 0.2, 0.1],
    "e2e@evalscope": [0.8],
    "tg@llama-bench": [4 / 0.3],
}


@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda d: d.key)
def test_each_definition_by_hand(definition, log):
    assert definition.values(log) == pytest.approx(EXPECTED[definition.key])


def test_every_definition_is_named_with_formula_and_owner():
    rows = table()
    assert {r["tool"] for r in rows} == {"surefoot", "vllm", "guidellm", "evalscope", "llama-bench"}
    assert all(r["formula"] for r in rows)


def test_the_raw_record_gives_the_same_numbers_again(log, tmp_path):
    path = tmp_path / "a.raw.jsonl"
    path.write_text('{"record": "header"}\n' + json.dumps({"record": "request"} | log.as_dict()) + "\n")
    (again,) = read(path)
    assert again == log
    path.write_text('{"record": "request", "chunks": [[1]]}\n')
    with pytest.raises(InputError, match=r"a\.raw\.jsonl:1: "):
        list(read(path))


def test_point_numbers(log):
    found = point_metrics([log, RequestLog(1, sent=10.0, ended=12.0, error="HTTP 500")], {"ttft": 0.35})
    assert (found["completed"], found["failed"], found["errors"]) == (1, 1, {"HTTP 500": 1})
    assert found["output_tokens_per_s"] == pytest.approx(6 / 0.95)
    assert found["total_tokens_per_s"] == pytest.approx(10 / 0.95)
    assert found["goodput"]["met"] == 1
    assert goodput([log], {"itl": 0.15}, 1.0)["met"] == 0  # its largest gap counts
    assert point_metrics([RequestLog(0, error="x")])["completed"] == 0


def test_targets():
    assert parse_targets("ttft:200, tpot:50") == {"ttft": 0.2, "tpot": 0.05}
    for wrong in ("ttft", "ttft:0", "speed:3", "ttft:nan", "ttft:x"):
        with pytest.raises(InputError, match="--goodput"):
            parse_targets(wrong)


def sse(*bodies: object) -> bytes:
    return b"".join(b"data: %s\n\n" % (b"[DONE]" if b == "done" else json.dumps(b).encode()) for b in bodies)


def test_events_cut_anywhere_keep_the_time_of_the_read_that_completed_them():
    data = b": ping\n\n" + sse({"a": 1}, {"b": 2}).replace(b"\n\n", b"\r\n\r\n") + sse("done")
    for size in (1, 3, 7, len(data)):
        pieces = [(float(i), data[i : i + size]) for i in range(0, len(data), size)]
        found = list(events(pieces))
        assert [d for _, d in found] == [b'{"a": 1}', b'{"b": 2}', b"[DONE]"]
        ends = [i for i in range(len(data)) if data[: i + 1].endswith((b"}\r\n\r\n", b"]\n\n"))]
        assert [t for t, _ in found] == [end // size * size for end in ends]


def test_kinds_of_chunks():
    log = RequestLog(0)
    delta = lambda **d: {"choices": [{"delta": d, "finish_reason": None}]}  # noqa: E731
    body = sse(
        delta(role="assistant", content=""),
        delta(reasoning_content="hm"),
        delta(reasoning="so"),
        delta(content="yes") | {"usage": {"prompt_tokens": 3, "completion_tokens": 3}},
        delta(content="!!") | {"usage": {"prompt_tokens": 3, "completion_tokens": 5}},
        {"choices": [{"delta": {}, "finish_reason": "stop"}]},
        {"choices": [{"text": "", "token_ids": [5, 6]}]},
        {"choices": [], "usage": {"completion_tokens": 7}},
        "done",
    )
    Reader(log).read([(1.0, body)])
    kinds = [c.kind for c in log.chunks]
    assert kinds == ["role", "reasoning", "reasoning", "text", "text", "finish", "text", "usage", "done"]
    assert [c.tokens for c in log.chunks] == [None, None, None, 3, 2, None, 2, None, None]
    assert (log.text, log.finish_reason, log.prompt_tokens, log.output_tokens) == ("hmsoyes!!", "stop", 3, 7)


@pytest.mark.parametrize("data", [b"data: {broken\n\n", b"data: []\n\n", b'data: {"choices": [3]}\n\n'])
def test_events_that_are_no_chunks_fail_the_request(data):
    log = RequestLog(0)
    Reader(log).read([(1.0, data)])
    assert "no completion chunk" in log.error
    assert not log.ok


def test_an_error_within_the_stream_fails_the_request():
    log = RequestLog(0)
    Reader(log).read([(1.0, sse({"choices": [{"text": "a"}]}, {"error": {"message": "out of\nmemory"}}))])
    assert log.error == "the server reports within the stream: out of memory"


def test_signs_of_bad_text():
    def answer(text, **more):
        return RequestLog(0, text=text, chunks=[chunk(1.0, "text", 1)], output_tokens=1, **more)

    assert text_checks([answer("fine"), answer("also fine")]) == []
    said = " ".join(text_checks([answer("x" * 50), answer("\ufffd"), answer(""), answer("ok", asked_output_tokens=5)]))
    for sign in ("repeat one short piece", "replacement character", "empty text", "another length than asked"):
        assert sign in said
    assert "same text" in " ".join(text_checks([answer("same")] * 4))
    assert "+3.0 prompt tokens" in " ".join(text_checks([answer("a", prompt_tokens=8, asked_prompt_tokens=5)]))


@pytest.mark.parametrize(
    ("tokens", "gap", "each", "warned"),
    [(64, 0.0, 1, True), (64, 1e-5, 1, True), (64, 0.0, 64, True), (64, 2e-3, 1, False), (8, 0.0, 8, False)],
)
def test_a_server_that_does_not_stream_is_named(tokens, gap, each, warned):
    """All tokens after 2 s, in one chunk or in a row of chunks; decode steps of 2 ms and a speculative one are none."""
    chunks = [chunk(12.0 + i * gap, "text", each) for i in range(tokens // each)]
    log = RequestLog(0, sent=10.0, ended=chunks[-1].time, text="a b", output_tokens=tokens, chunks=chunks)
    found = point_metrics([log])["warnings"]
    assert any("does not stream" in w for w in found) == warned, found
