"""The server over time: clients that leave, overload, a dying engine, and stopping."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from fake_engine import FakeEngine
from serve_helpers import Served, serving, until

from surefoot.core.errors import InputError, ModelError
from surefoot.core.sampling import SamplingParams
from surefoot.core.sockets import bind
from surefoot.serve.errors import EngineDeadError
from surefoot.serve.main import run_server
from surefoot.serve.settings import ServeSettings
from surefoot.serve.worker import MAX_FAILED_STEPS, Choice, EngineWorker

PLAIN = "/v1/completions"
LONG = {"prompt": "hi", "max_tokens": 400, "temperature": 0, "ignore_eos": True}


def check_idle(served: Served) -> None:
    """Nothing of earlier requests is left anywhere, and a new one is answered."""
    until(lambda: not served.engine.running and served.worker.num_inflight == 0, "all sequences gone")
    assert served.engine.free_blocks == served.engine.num_blocks
    assert not served.worker._routes and not served.worker._followers and not served.worker._streams
    body = {"prompt": "hi", "max_tokens": 3, "temperature": 0}
    assert httpx.post(served.base_url + PLAIN, json=body, timeout=20).json()["choices"][0]["text"] == "You"


@pytest.mark.parametrize("n", [1, 3])
def test_client_leaves_a_stream(n):
    with serving(FakeEngine(step_delay=0.005)) as served:
        with httpx.stream("POST", served.base_url + PLAIN, json=LONG | {"stream": True, "n": n}) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: {")
            until(lambda: len(served.engine.running) == n, "all choices running")
        until(lambda: len(served.engine.cancelled) == n, "cancellation")
        check_idle(served)


def test_client_leaves_before_the_answer():
    with serving(FakeEngine(step_delay=0.005)) as served:
        for stream in (False, True):
            with pytest.raises(httpx.ReadTimeout):
                served.engine.step_delay = 0.25
                httpx.post(served.base_url + PLAIN, json=LONG | {"stream": stream}, timeout=0.1)
            served.engine.step_delay = 0.005
            until(lambda want=1 + stream: len(served.engine.cancelled) == want, "cancellation")
        check_idle(served)


def test_async_client_closes_its_stream():
    async def leave(base_url: str) -> None:
        async with openai.AsyncOpenAI(base_url=base_url + "/v1", api_key="none") as client:
            stream = await client.completions.create(model="fake", prompt="hi", max_tokens=400, stream=True)
            async for _ in stream:
                break
            await stream.close()

    with serving(FakeEngine(step_delay=0.01)) as served:
        asyncio.run(leave(served.base_url))
        check_idle(served)
        assert len(served.engine.cancelled) == 1


def test_half_of_the_clients_leave():
    """Those that stay get every token; those that leave free what they held."""

    def one(served: Served, i: int) -> str:
        body = LONG | {"prompt": f"client {i}", "max_tokens": 40, "stream": True}
        with httpx.stream("POST", served.base_url + PLAIN, json=body, timeout=30) as answer:
            text = ""
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                    if i % 2 and len(text) > 3:
                        break
            return text

    with serving(FakeEngine(step_delay=0.002)) as served:
        with ThreadPoolExecutor(32) as pool:
            texts = list(pool.map(lambda i: one(served, i), range(32)))
        for i, text in enumerate(texts[::2]):
            assert text.startswith(f"You said: client {2 * i}. 你好🙂You")
        check_idle(served)


def test_overload_is_refused_at_once():
    with serving(FakeEngine(step_delay=0.02), ServeSettings(max_inflight=3)) as served:
        with httpx.stream("POST", served.base_url + PLAIN, json=LONG | {"stream": True, "n": 2}) as answer:
            lines = answer.iter_lines()  # closing the iterator would close the connection
            next(lines)
            refused = httpx.post(served.base_url + PLAIN, json=LONG | {"n": 2})
            assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["code"] == "server_overloaded"
            assert httpx.post(served.base_url + PLAIN, json=LONG | {"max_tokens": 1}, timeout=20).status_code == 200
        check_idle(served)


def test_engine_that_dies():
    """Running requests end in an error, later ones get 500, /health says 503, and the server still answers."""
    with serving(FakeEngine(step_delay=0.01, fail_at_step=10)) as served:
        with ThreadPoolExecutor(2) as pool:
            whole = pool.submit(httpx.post, served.base_url + PLAIN, json=LONG, timeout=20)
            openai_client = openai.OpenAI(base_url=served.base_url + "/v1", api_key="none", max_retries=0, timeout=30)
            with openai_client as client, pytest.raises(openai.APIError, match="inference engine stopped"):
                messages = [{"role": "user", "content": "hi"}]
                list(client.chat.completions.create(model="fake", messages=messages, stream=True))
            answer = whole.result()
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_dead"
        health = httpx.get(served.base_url + "/health")
        assert health.status_code == 503 and "restart" in health.json()["error"]["message"]
        for stream in (False, True):
            after = httpx.post(served.base_url + PLAIN, json=LONG | {"stream": stream})
            assert after.status_code == 500 and after.json()["error"]["type"] == "server_error"
        assert httpx.get(served.base_url + "/v1/models").status_code == 200
        assert "surefoot_healthy 0" in httpx.get(served.base_url + "/metrics").text


def test_stream_broken_off_ends_with_an_error_event():
    with serving(FakeEngine(step_delay=0.01, fail_at_step=5)) as served:
        answer = httpx.post(served.base_url + PLAIN, json=LONG | {"stream": True}, timeout=20)
        *_, error, done, empty = answer.text.split("\n\n")
        assert (done, empty) == ("data: [DONE]", "")
        assert json.loads(error[6:])["error"]["code"] == "engine_dead"


def test_failed_step_ends_only_its_requests():
    """Others in flight get their answers, later ones too, and the server stays healthy; three in a row end it."""
    with serving(FakeEngine(step_delay=0.005)) as served:
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(httpx.post, served.base_url + PLAIN, json=LONG, timeout=20)
            until(lambda: served.engine.running, "the first request runs")
            bad = httpx.post(served.base_url + PLAIN, json=LONG | {"prompt": "CRASH-STEP"}, timeout=20)
            assert bad.status_code == 500 and bad.json()["error"]["code"] == "step_failed"
            lines = httpx.post(served.base_url + PLAIN, json=LONG | {"prompt": "CRASH-STEP", "stream": True}).text
            assert '"step_failed"' in lines and "ZeroDivisionError" in lines
            assert other.result().status_code == 200
        assert httpx.get(served.base_url + "/health").status_code == 200
        check_idle(served)


def test_steps_that_keep_failing_end_the_worker():
    with serving(FakeEngine()) as served:
        for i in range(MAX_FAILED_STEPS):
            answer = httpx.post(served.base_url + PLAIN, json=LONG | {"prompt": "CRASH-STEP"}, timeout=20)
            code = "step_failed" if i < MAX_FAILED_STEPS - 1 else "engine_dead"
            assert answer.status_code == 500 and answer.json()["error"]["code"] == code
        assert httpx.get(served.base_url + "/health").status_code == 503


def test_graceful_stop_lets_a_stream_finish():
    with serving(FakeEngine(step_delay=0.005)) as served:
        body = LONG | {"max_tokens": 100, "stream": True}
        with httpx.stream("POST", served.base_url + PLAIN, json=body, timeout=20) as answer:
            lines = answer.iter_lines()
            next(lines)
            served.server.should_exit = True
            until(lambda: served.worker.stopping, "drain")
            with pytest.raises(httpx.ConnectError):
                httpx.get(served.base_url + "/health")
            rest = list(lines)
        assert [line for line in rest if line][-1] == "data: [DONE]"
        assert sum(line.startswith("data: {") for line in rest) > 50
        served.stop()
        assert not served.engine.cancelled


def test_graceful_stop_has_an_end():
    """What still runs after the drain time is told so, streamed or not, and its pages are free."""
    with serving(FakeEngine(step_delay=0.05), ServeSettings(drain_timeout=0.3)) as served:
        with ThreadPoolExecutor(2) as pool:
            answers = [
                pool.submit(httpx.post, served.base_url + PLAIN, json=LONG | {"stream": s}, timeout=20)
                for s in (False, True)
            ]
            until(lambda: len(served.engine.running) == 2, "both running")
            served.stop()
            whole, streamed = (a.result() for a in answers)
        assert whole.status_code == 503 and whole.json()["error"]["code"] == "server_stopping"
        assert '"code": "server_stopping"' in streamed.text and streamed.text.endswith("data: [DONE]\n\n")
        until(lambda: not served.engine.running, "cancellation")


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from fake_engine import FakeEngine
from surefoot.serve.main import run_server
from surefoot.serve.settings import ServeSettings
run_server(lambda: FakeEngine(step_delay=0.01), ServeSettings(port=0, api_keys=("k",)), print)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_process_with_0(signum):
    tests = str(Path(__file__).parent)
    command = [sys.executable, "-u", "-c", SCRIPT.format(tests=tests)]
    env = os.environ | {"PYTHONPATH": str(Path(tests).parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("serving fake at http://127.0.0.1:") and "temperature=1.0" in line
            assert "api_key=required" in line
            base_url = line.split()[3].removesuffix("/v1")
            headers = {"Authorization": "Bearer k"}
            body = LONG | {"max_tokens": 30, "stream": True}
            with httpx.stream("POST", base_url + PLAIN, json=body, headers=headers, timeout=20) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(signum)
                assert [x for x in lines if x][-1] == "data: [DONE]"
            assert process.wait(20) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()


def test_busy_port_is_one_line_before_anything_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1:{port}.*in use.*--port") as error:
            run_server(lambda: pytest.fail("loaded"), ServeSettings(port=port))
    assert "\n" not in str(error.value) and error.value.exit_code == 2
    with pytest.raises(InputError, match="no.such.host"):
        bind("no.such.host.invalid", 0)


def test_error_of_the_loading_is_raised_to_the_caller():
    def load():
        raise ModelError("no such folder")

    with pytest.raises(ModelError, match="no such folder"):
        run_server(load, ServeSettings(port=0))
    assert not any(t.name == "inference" for t in threading.enumerate())


def test_engine_lives_in_one_thread():
    """Loading and every call that changes the engine happen in the inference thread."""
    seen = set()

    class Watched(FakeEngine):
        def __init__(self):
            seen.add(threading.current_thread().name)
            super().__init__()

        def add_request(self, *args, **kwargs):
            seen.add(threading.current_thread().name)
            return super().add_request(*args, **kwargs)

        def step(self):
            seen.add(threading.current_thread().name)
            return super().step()

    async def run() -> None:
        worker = EngineWorker(Watched)
        worker.start()
        worker.attach(asyncio.get_running_loop())
        stream = worker.submit("r", [Choice([1, 2], SamplingParams(max_tokens=2), 0)])
        assert [o.token_ids async for batch in stream.batches() for _, o in batch]
        stream.close()
        worker.stop()
        with pytest.raises(Exception, match="stopping"):
            worker.submit("r2", [])

    asyncio.run(run())
    assert seen == {"inference"}


def test_idle_worker_blocks():
    """Without requests the inference thread neither steps nor asks the engine over and over."""
    asked = []

    class Watched(FakeEngine):
        def has_unfinished(self):
            asked.append(1)
            return super().has_unfinished()

    with serving(Watched()) as served:
        check_idle(served)
        time.sleep(0.05)
        steps, questions = served.engine.steps, len(asked)
        time.sleep(0.2)
        assert (served.engine.steps, len(asked)) == (steps, questions)


def test_dead_worker_refuses():
    async def run() -> None:
        worker = EngineWorker(lambda: FakeEngine(fail_at_step=1))
        worker.start()
        worker.attach(asyncio.get_running_loop())
        stream = worker.submit("r", [Choice([1], SamplingParams(max_tokens=2), 0)])
        with pytest.raises(EngineDeadError):
            async for _ in stream.batches():
                pass
        stream.close()
        with pytest.raises(EngineDeadError):
            worker.submit("r2", [Choice([1], SamplingParams(max_tokens=2), 0)])
        worker.stop()

    asyncio.run(run())
