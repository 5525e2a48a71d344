"""An OpenAI-compatible server that answers nonsense with known delays, and remembers when it sent what.

    with running() as mock:  mock.url;  mock.sends()  # {request id: {"received": t, "sends": [[t, kind, tokens], ...]}}

Times are of the machine's monotonic clock, the same as a client's on this machine. The delays are in the name of the
model, as key=value pairs: "ttft=200,itl=10" (milliseconds), and

    n=2 tokens per chunk    role=1 role-only chunk first   reason=3 reasoning chunks first   usage=0 no usage chunk
    ids=1 names token ids   stall=500,at=3 a pause before chunk 3   split=1 chunks cut in the middle of an event
    fail=500 status         hang=1 never answers           die=3 connection cut after 3 chunks    close=1 no keep-alive
    refuse=1 400 to fields beyond OpenAI's                 notok=1 no /tokenize, no token-id prompts
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SENDS: dict[str, dict[str, Any]] = {}
BEYOND = {"ignore_eos", "return_token_ids"}


def behaviour(model: str) -> dict[str, float]:
    pairs = (part.split("=") for part in model.split(",") if "=" in part)
    return {key: float(value) for key, value in pairs}


class Mock(asyncio.Protocol):
    """One connection: requests one after another."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.buffer = transport, bytearray()

    def data_received(self, data: bytes) -> None:
        received = time.monotonic()
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        first, *lines = bytes(self.buffer[:end]).decode().split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", 0))
        if len(self.buffer) < end + 4 + length:
            return
        body = bytes(self.buffer[end + 4 : end + 4 + length])
        del self.buffer[: end + 4 + length]
        method, path, _ = first.split()
        self.answer(method, path, headers, json.loads(body) if body else {}, received)

    def answer(self, method: str, path: str, headers: dict[str, str], body: dict[str, Any], received: float) -> None:
        if path == "/v1/models":
            return self.json({"data": [{"id": "mock", "owned_by": "mock", "max_model_len": 8192}]})
        if path == "/sends":
            return self.json(SENDS)
        how = behaviour(body.get("model", ""))
        if path == "/tokenize":
            text = body["prompt"] if "prompt" in body else "t t t " + body["messages"][0]["content"]
            if how.get("notok"):
                return self.json({"error": {"message": "no such route"}}, 404)
            return self.json({"tokens": [len(w) + 10 for w in text.split()]})
        if how.get("notok") and isinstance(body.get("prompt"), list):
            return self.json({"error": {"message": "prompt must be text"}}, 400)
        if how.get("refuse") and BEYOND & set(body):
            return self.json({"error": {"message": "unknown field"}}, 400)
        chat = path.endswith("chat/completions")
        if not body.get("stream"):
            return self.json(whole(body, chat))
        if how.get("hang"):
            return None
        if how.get("fail"):
            return self.json({"error": {"message": "the mock fails as asked"}}, int(how["fail"]))
        return self.stream(body, how, chat, headers.get("x-request-id", "?"), received)

    def json(self, data: Any, status: int = 200) -> None:
        text = json.dumps(data).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
        self.transport.write(head.encode() + text)

    def stream(self, body: dict[str, Any], how: dict[str, float], chat: bool, name: str, received: float) -> None:
        """Plan every chunk at a time of its own, counted from the arrival of the request."""
        plan = chunks(body, how, chat)
        log = SENDS[name] = {"received": received, "sends": []}
        loop, at = asyncio.get_running_loop(), received + how.get("ttft", 10) / 1000
        offset = loop.time() - time.monotonic()
        connection = "Connection: close\r\n" if how.get("close") else ""
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{connection}Transfer-Encoding: chunked\r\n\r\n"
        tokens_seen = 0
        for kind, tokens, data in plan:
            if kind in ("text", "reasoning"):
                if tokens_seen and tokens_seen == how.get("at", 0):
                    at += how.get("stall", 0) / 1000
                elif tokens_seen:
                    at += how.get("itl", 5) / 1000
                tokens_seen += 1
                if how.get("die") and tokens_seen > how["die"]:
                    loop.call_at(at + offset, self.transport.abort)
                    return
            at += 1e-6  # events of one moment keep their order
            loop.call_at(at + offset, self.send, head.encode(), kind, tokens, data, log, bool(how.get("split")))
            head = ""
        loop.call_at(at + 1e-6 + offset, self.finish, log, bool(how.get("close")))

    def send(self, head: bytes, kind: str, tokens: int, data: bytes, log: dict[str, Any], split: bool) -> None:
        event = b"data: " + data + b"\n\n"
        pieces = [event[: len(event) // 2], event[len(event) // 2 :]] if split else [event]
        log["sends"].append([time.monotonic(), kind, tokens])
        self.transport.write(head + b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces))

    def finish(self, log: dict[str, Any], close: bool) -> None:
        log["end"] = time.monotonic()
        self.transport.write(b"0\r\n\r\n")
        if close:
            self.transport.close()


def whole(body: dict[str, Any], chat: bool) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
    choice |= {"message": {"role": "assistant", "content": "x"}} if chat else {"text": "x"}
    return {"choices": [choice], "usage": {"prompt_tokens": prompt_tokens(body), "completion_tokens": 1}}


def prompt_tokens(body: dict[str, Any]) -> int:
    prompt = body.get("prompt")
    if isinstance(prompt, list):
        return len(prompt)
    return len(str(prompt or "t t t " + body["messages"][0]["content"]).split())


def chunks(body: dict[str, Any], how: dict[str, float], chat: bool) -> list[tuple[str, int, bytes]]:
    """(kind, tokens, JSON) of every event of an answer of max_tokens tokens."""
    count, size = body.get("max_tokens", 8), int(how.get("n", 1))
    plan: list[tuple[str, int, bytes]] = []

    def choice(kind: str, tokens: int, delta: dict[str, Any], **more: Any) -> None:
        entry: dict[str, Any] = {"index": 0, "finish_reason": None} | more
        entry |= {"delta": delta} if chat else {"text": delta.get("content", "")}
        plan.append((kind, tokens, json.dumps({"choices": [entry]}).encode()))

    if how.get("role"):
        choice("role", 0, {"role": "assistant", "content": ""})
    for i, first in enumerate(range(0, count, size)):
        tokens = min(size, count - first)
        more = {"token_ids": [7] * tokens} if how.get("ids") else {}
        kind = "reasoning" if i < how.get("reason", 0) else "text"
        choice(kind, tokens, {"reasoning_content" if kind == "reasoning" else "content": f"w{i} " * tokens}, **more)
    choice("finish", 0, {}, finish_reason="length")
    if how.get("usage", 1):
        usage = {"prompt_tokens": prompt_tokens(body), "completion_tokens": count}
        plan.append(("usage", 0, json.dumps({"choices": [], "usage": usage}).encode()))
    plan.append(("done", 0, b"[DONE]"))
    return plan


@dataclass
class Running:
    url: str

    def sends(self) -> dict[str, dict[str, Any]]:
        with urllib.request.urlopen(f"{self.url}/sends") as answer:
            return json.load(answer)


@contextlib.contextmanager
def running() -> Iterator[Running]:
    """The server in a process of its own."""
    process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Running(f"http://127.0.0.1:{int(process.stdout.readline())}")
    finally:
        process.terminate()
        process.wait(10)


async def serve() -> None:
    import gc

    gc.disable()
    server = await asyncio.get_running_loop().create_server(Mock, "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve())
