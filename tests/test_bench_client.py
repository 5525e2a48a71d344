"""The load generator against a server whose delays are known: what it reads is what was sent, when it was sent.

The truth is the mock's own send times (the same clock), so a busy machine that delays the mock does not fail the tests.
"""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
import sys
from pathlib import Path

import mock_server
import pytest

from surefoot.bench.client import BodyDecoder, Client
from surefoot.bench.definitions import DEFINITIONS
from surefoot.bench.load import Job, Meter, arrivals, closed_loop, metered, open_loop
from surefoot.bench.rawlog import Chunk, RequestLog
from surefoot.bench.target import open_target
from surefoot.bench.workload import Ask
from surefoot.core.errors import InputError

ATTEMPTS = 4  # other processes may take the machine away for longer than the tolerance


@pytest.fixture(scope="module")
def mock():
    with mock_server.running() as server:
        yield server


def ask(client: Client, mock, model: str, count: int, tokens: int, prefix: str, chat: bool = True) -> list[Job]:
    target = open_target(mock.url, model, endpoint="chat" if chat else "completions")
    prompt = Ask(messages=[{"role": "user", "content": "hi"}]) if chat else Ask(token_ids=[1, 2, 3])
    body = target.body(prompt, tokens)
    return [Job(client.request(target.path, body, f"{prefix}-{i}"), RequestLog(i)) for i in range(count)]


def measure(mock, model: str, concurrency: int, count: int, tokens: int, prefix: str, chat: bool = True):
    """Logs as the client read them, and the same logs with the mock's send times in place of the client's."""
    client = Client(mock.url, idle_timeout=20)
    jobs = ask(client, mock, model, count, tokens, prefix, chat)

    async def go():
        async with metered(Meter()):
            await closed_loop(client, jobs, concurrency)
        client.close()

    asyncio.run(go())
    logs, sends = [job.finish() for job in jobs], mock.sends()
    assert all(log.sent <= sends[f"{prefix}-{log.id}"]["received"] for log in logs)
    return logs, [truth(log, sends[f"{prefix}-{log.id}"]) for log in logs]


def truth(log: RequestLog, sent: dict) -> RequestLog:
    assert [c.kind for c in log.chunks] == [kind for _, kind, _ in sent["sends"]]
    chunks = [Chunk(t, c.bytes, c.tokens, c.kind, c.chars) for c, (t, _, _) in zip(log.chunks, sent["sends"])]
    return dataclasses.replace(log, chunks=chunks, ended=sent["end"])


@pytest.mark.parametrize(
    ("concurrency", "count", "model"),
    [
        (1, 6, "ttft=50,itl=10,n=2,role=1"),
        (32, 32, "ttft=200,itl=50,reason=2,ids=1"),
        (256, 256, "ttft=200,itl=50,role=1,stall=200,at=3"),
    ],
)
def test_every_latency_metric_is_the_servers(mock, concurrency, count, model):
    """Median and mean of each metric within max(1 ms, 2 %)."""
    wrong: list[str] = []
    for attempt in range(ATTEMPTS):
        logs, true = measure(mock, model, concurrency, count, 8, f"{concurrency}-{attempt}")
        assert all(log.ok for log in logs), [log.error for log in logs if log.error]
        assert all(log.num_output_tokens == 8 for log in logs)
        wrong = []
        for definition in (d for d in DEFINITIONS if d.unit == "s"):
            for take in (statistics.median, statistics.fmean):
                got = take([v for log in logs for v in definition.values(log)])
                expected = take([v for log in true for v in definition.values(log)])
                if abs(got - expected) > max(0.001, 0.02 * expected):
                    wrong.append(f"{take.__name__} {definition.key}: {got:.4f} s, truth {expected:.4f} s")
        if not wrong:
            return
    pytest.fail("; ".join(wrong))


def test_the_recording_proxy_sees_what_the_client_sees(mock):
    """What `benchmarks/outside_tool.py` reads another tool's requests with: the same chunks, tokens and counts, and no
    request that came before it was sent, no chunk that left before it came."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
    from recording_proxy import recorded

    host, port = mock.url.removeprefix("http://").split(":")
    with recorded(host, int(port)) as proxy:
        behind = dataclasses.replace(mock, url=proxy.url)
        client = Client(proxy.url, idle_timeout=20)
        jobs = ask(client, behind, "ttft=20,itl=5,role=1,n=2,split=1", 6, 8, "proxy")

        async def go():
            await closed_loop(client, jobs, 1)
            client.close()

        asyncio.run(go())
    logs = sorted((job.finish() for job in jobs), key=lambda log: log.sent)
    seen = [log for log in proxy.logs() if log.ok and len(log.chunks) > 1]
    assert len(seen) == len(logs) == 6
    for mine, passed in zip(logs, seen):
        assert [(c.kind, c.bytes, c.tokens) for c in mine.chunks] == [
            (c.kind, c.bytes, c.tokens) for c in passed.chunks
        ]
        assert (mine.output_tokens, mine.text) == (passed.output_tokens, passed.text)
        assert mine.sent <= passed.sent
        assert all(there.time <= here.time for here, there in zip(mine.chunks, passed.chunks))


def test_a_request_is_stamped_when_it_leaves(mock):
    """Between our stamp and the server's lies a loopback, not a connect, an encoder or a queue of our own."""
    for attempt in range(ATTEMPTS):
        logs, _ = measure(mock, "ttft=1,itl=1", 1, 20, 2, f"stamp-{attempt}")
        sends = mock.sends()
        way = statistics.median(sends[f"stamp-{attempt}-{log.id}"]["received"] - log.sent for log in logs)
        if way < 0.001:
            return
    pytest.fail(f"a request takes {way * 1000:.2f} ms to reach a server on this machine")


def test_kinds_tokens_and_usage_come_through(mock):
    logs, _ = measure(mock, "ttft=1,itl=1,n=3,role=1,reason=1,ids=1,split=1", 1, 1, 7, "kinds")
    (log,) = logs
    assert [c.kind for c in log.chunks] == ["role", "reasoning", "text", "text", "finish", "usage", "done"]
    assert [c.tokens for c in log.token_chunks] == [3, 3, 1]
    assert (log.output_tokens, log.finish_reason, log.text) == (7, "length", "w0 w0 w0 w1 w1 w1 w2 ")
    (log,), _ = measure(mock, "ttft=1,itl=1,n=2,usage=0", 1, 1, 7, "nousage", chat=False)
    assert (log.output_tokens, log.num_output_tokens, log.counted_by) == (None, 4, "chunks")


def test_connections_are_reused_and_replaced(mock):
    logs, _ = measure(mock, "ttft=1,itl=1", 2, 10, 3, "keep")
    assert all(log.ok for log in logs)
    logs, _ = measure(mock, "ttft=1,itl=1,close=1", 2, 10, 3, "closing")
    assert all(log.ok for log in logs)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("fail=500", "HTTP 500: "),
        ("hang=1", "no byte from the server for 0.3 s"),
        ("die=2,ttft=1,itl=1", "closed the connection in the middle"),
    ],
)
def test_failures_end_in_a_line_and_keep_what_came(mock, model, says):
    client = Client(mock.url, idle_timeout=0.3)
    jobs = ask(client, mock, model, 3, 6, f"fails-{model}")
    asyncio.run(closed_loop(client, jobs, 3))
    for job in jobs:
        log = job.finish()
        assert says in log.error
        assert not log.ok
        assert len(log.token_chunks) == (2 if "die" in model else 0)


def test_an_unreachable_server_is_an_error_of_the_request():
    client = Client("http://127.0.0.1:9")
    job = Job(client.request("/v1/completions", b"{}", "x"), RequestLog(0))
    job.exchange = asyncio.run(client.post(job.request))
    assert "cannot reach 127.0.0.1:9" in job.finish().error


def test_open_loop_does_not_wait_for_answers(mock):
    """20 requests within 0.2 s to a server that needs 0.5 s: a closed loop would send none twice as fast."""
    client = Client(mock.url)
    jobs = ask(client, mock, "ttft=500,itl=1", 20, 2, "open")
    asyncio.run(open_loop(client, jobs, arrivals("constant", 20, 100.0)))
    logs = [job.finish() for job in jobs]
    assert all(log.ok for log in logs)
    assert max(log.sent for log in logs) < min(log.ended for log in logs)
    assert all(log.sent >= log.scheduled - 0.001 for log in logs)


@pytest.mark.parametrize("kind", ["poisson", "constant", "burst"])
def test_arrivals_have_the_rate_that_was_asked_for(kind):
    times = arrivals(kind, 20_000, 50.0, seed=3)
    assert times == sorted(times)
    assert len(times) / times[-1] == pytest.approx(50.0, rel=0.05)
    if kind == "burst":
        assert len(set(times)) == 20_000 / 8
    if kind == "poisson":
        gaps = [b - a for a, b in zip(times, times[1:])]
        assert statistics.stdev(gaps) == pytest.approx(statistics.fmean(gaps), rel=0.05)
    assert times == arrivals(kind, 20_000, 50.0, seed=3)
    with pytest.raises(InputError, match="rate"):
        arrivals(kind, 3, 0.0)


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_chunked_bodies_cut_anywhere(size):
    data = b"5\r\nhello\r\nA;x=y\r\n, world!!\n\r\n0\r\nTrailer: 1\r\n\r\n"
    decoder, out = BodyDecoder(True, None), b""
    for i in range(0, len(data), size):
        assert not decoder.done
        out += decoder.feed(data[i : i + size])
    assert decoder.done
    assert out == b"hello, world!!\n"


def test_500_streams_at_once(mock):
    logs, true = measure(mock, "ttft=1000,itl=200", 500, 500, 4, "many", chat=False)
    assert all(log.ok for log in logs)
    assert max(log.sent for log in logs) < min(log.token_chunks[-1].time for log in logs)  # all were open together
    late = [a.time - b.time for log, t in zip(logs, true) for a, b in zip(log.chunks, t.chunks)]
    assert min(late) >= 0
