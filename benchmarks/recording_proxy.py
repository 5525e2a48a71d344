"""A proxy that writes down when the bytes of each request and answer passed, for the benchmark of somebody else's tool.

    with recorded("127.0.0.1", 8000) as proxy: ...run the tool against proxy.url...
    proxy.logs()                     # a RequestLog per POST, as our own client would have written it

What passes is not changed. A request's `sent` is the moment when its first byte came from the tool, a chunk's time
that of the read which brought it from the server; it is forwarded in the same callback.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from surefoot.bench.client import BodyDecoder, Exchange, clock
from surefoot.bench.load import Job
from surefoot.bench.rawlog import RequestLog

Reads = list[tuple[float, bytes]]


@dataclass
class Conversation:
    """One connection: what came from the tool, what came from the server."""

    asked: Reads = field(default_factory=list)
    answered: Reads = field(default_factory=list)


class _Side(asyncio.Protocol):
    """Stamps and forwards what one side says."""

    def __init__(self, record: Reads):
        self.record, self.other = record, asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.record.append((clock(), data))
        self.other.result().write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other.done():
            self.other.result().close()


class _Tool(_Side):
    """The tool's side, which is read once the server's side stands."""

    def __init__(self, conversation: Conversation, proxy: Proxy):
        super().__init__(conversation.asked)
        self.conversation, self.proxy = conversation, proxy

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.pause_reading()
        self.connecting = asyncio.get_running_loop().create_task(self.proxy.connect(self, self.conversation))


class Proxy:
    def __init__(self, host: str, port: int):
        self.upstream, self.url = (host, port), ""
        self.conversations: list[Conversation] = []
        self._loop = asyncio.new_event_loop()

    def run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(self._loop.create_server(self._accept, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        self._loop.run_forever()
        server.close()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _accept(self) -> asyncio.Protocol:
        """The tool's side of a new connection."""
        conversation = Conversation()
        self.conversations.append(conversation)
        return _Tool(conversation, self)

    async def connect(self, tool: _Side, conversation: Conversation) -> None:
        """The server's side of it."""
        made = self._loop.create_connection(lambda: _Side(conversation.answered), *self.upstream)
        transport, server = await made
        server.other.set_result(tool.transport)
        tool.other.set_result(transport)
        tool.transport.resume_reading()

    def logs(self) -> list[RequestLog]:
        """Every POST that was answered, in the order in which they were sent."""
        found = [log for conversation in self.conversations for log in exchanges(conversation)]
        return sorted(found, key=lambda log: log.sent)


def exchanges(conversation: Conversation) -> Iterator[RequestLog]:
    """Requests and answers of one connection take turns, so they are paired by their order."""
    asked, answered = Messages(conversation.asked), Messages(conversation.answered)
    for number, request in enumerate(iter(asked.take, None)):
        answer = answered.take()
        if answer is None:
            return
        if request.head.startswith(b"POST"):
            status = int(answer.head.split()[1])
            exchange = Exchange(request.began, answer.ended, status, answer.parts)
            yield Job(b"", RequestLog(number), exchange).finish()


@dataclass
class Message:
    """One HTTP message: its head, when its first and its last byte passed, its body with the time of each read."""

    head: bytes
    began: float
    ended: float
    parts: Reads


class Messages:
    """The HTTP/1.1 messages of one direction, one after another."""

    def __init__(self, reads: Reads):
        self.reads = list(reads)

    def take(self) -> Message | None:
        head, began = bytearray(), 0.0
        decoder, parts = None, []
        while self.reads:
            time, data = self.reads.pop(0)
            began = began or time
            if decoder is None:
                head += data
                end = head.find(b"\r\n\r\n")
                if end < 0:
                    continue
                decoder, data = _decoder(bytes(head[:end])), bytes(head[end + 4 :])
                del head[end:]
            if data and (piece := decoder.feed(data)):
                parts.append((time, piece))
            if decoder.done:
                return Message(bytes(head), began, time, parts)
        return None


def _decoder(head: bytes) -> BodyDecoder:
    lines = head.lower().split(b"\r\n")[1:]
    headers = {k.strip(): v.strip() for k, _, v in (line.partition(b":") for line in lines)}
    length = headers.get(b"content-length")
    chunked = b"chunked" in headers.get(b"transfer-encoding", b"")
    return BodyDecoder(chunked, int(length) if length is not None else None if chunked else 0)


@contextlib.contextmanager
def recorded(host: str, port: int) -> Iterator[Proxy]:
    proxy, ready = Proxy(host, port), threading.Event()
    thread = threading.Thread(target=proxy.run, args=(ready,), daemon=True)
    thread.start()
    ready.wait()
    try:
        yield proxy
    finally:
        proxy.stop()
        thread.join()
