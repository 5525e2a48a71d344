"""HTTP/1.1 for a load generator: one POST at a time per connection, every read stamped, nothing parsed on the way.

Why not httpx here: what it does per read is added to every token of every stream, and a request's clock would start
before its connection stands. This client stamps a request when its bytes go to a connected socket and a chunk in
the callback of the read that brought it; the events inside are parsed after the measurement (`sse.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from surefoot.core.errors import InputError

CONNECT_TIMEOUT = 10.0
STALE = 0.05  # seconds within which a kept connection shows that the server had closed it
clock = time.monotonic


@dataclass
class Exchange:
    """One request and what came back: (time, body bytes) for each read that held a part of the body."""

    sent: float = 0.0
    ended: float = 0.0
    status: int | None = None
    parts: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None

    @property
    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.parts)


class BodyDecoder:
    """Takes transfer encoding off. `feed` returns the body bytes in a read; `done` when the body is complete."""

    def __init__(self, chunked: bool, length: int | None):
        self.chunked, self.left = chunked, length
        self.done = not chunked and length == 0
        self._buffer = bytearray()
        self._trailer = False

    def feed(self, data: bytes) -> bytes:
        if not self.chunked:
            if self.left is not None:
                data = data[: self.left]
                self.left -= len(data)
                self.done = self.left == 0
            return data
        self._buffer += data
        out = bytearray()
        while not self.done and self._advance(out):
            pass
        return bytes(out)

    def _advance(self, out: bytearray) -> bool:
        """Take one chunk, or one line of the trailer; False until more bytes come."""
        end = self._buffer.find(b"\r\n")
        if end < 0:
            return False
        if self._trailer:
            del self._buffer[: end + 2]
            self.done = end == 0
            return True
        size = int(bytes(self._buffer[:end]).split(b";")[0], 16)
        if size == 0:
            del self._buffer[: end + 2]
            self._trailer = True
            return True
        if len(self._buffer) < end + 4 + size:
            return False
        out += self._buffer[end + 2 : end + 2 + size]
        del self._buffer[: end + 4 + size]
        return True


class Connection(asyncio.Protocol):
    """One socket. `exchange` may be called again after it returned without error and `reusable` is True."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._current: Exchange | None = None
        self._done: asyncio.Future[None] | None = None
        self._decoder: BodyDecoder | None = None
        self._head = bytearray()
        self._watch: asyncio.TimerHandle | None = None
        self._last = 0.0
        self.reusable = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    @property
    def closed(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def exchange(self, request: bytes, idle_timeout: float) -> Exchange:
        """Send; wait for the whole answer. Ends with an error if no byte comes for `idle_timeout` seconds."""
        assert self._transport is not None
        self._current, self._decoder = Exchange(), None
        self._head.clear()
        self._done = self._loop.create_future()
        self._watch = self._loop.call_later(idle_timeout, self._check_idle, idle_timeout)
        self._current.sent = self._last = clock()
        self._transport.write(request)
        try:
            await self._done
        finally:
            self._watch.cancel()
            if not self._done.done() or self._done.cancelled():
                self.close()
        return self._current

    def _check_idle(self, idle_timeout: float) -> None:
        quiet = clock() - self._last
        if quiet >= idle_timeout:
            self._finish(f"no byte from the server for {idle_timeout:g} s")
            self.close()
        else:
            self._watch = self._loop.call_later(idle_timeout - quiet, self._check_idle, idle_timeout)

    def data_received(self, data: bytes) -> None:
        now = self._last = clock()
        if self._current is None or self._done is None or self._done.done():
            self.reusable = False  # bytes that nobody asked for
            return
        try:
            if self._decoder is None:
                data = self._take_head(data)
            if self._decoder is not None:
                if data and (piece := self._decoder.feed(data)):
                    self._current.parts.append((now, piece))
                if self._decoder.done:
                    self._finish(None, now)
        except (ValueError, IndexError):
            self.reusable = False
            self._finish("the answer is no valid HTTP/1.1")
            self.close()

    def _take_head(self, data: bytes) -> bytes:
        """Collect the status line and the headers; returns what follows them."""
        assert self._current is not None
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            return b""
        status, *lines = bytes(self._head[:end]).split(b"\r\n")
        rest = bytes(self._head[end + 4 :])
        headers = {k.strip().lower(): v.strip().lower() for k, _, v in (line.partition(b":") for line in lines)}
        self._current.status = int(status.split()[1])
        chunked = b"chunked" in headers.get(b"transfer-encoding", b"")
        length = headers.get(b"content-length")
        self._decoder = BodyDecoder(chunked, None if length is None else int(length))
        if headers.get(b"connection") == b"close" or (not chunked and length is None):
            self.reusable = False
        return rest

    def connection_lost(self, exc: Exception | None) -> None:
        complete = self._decoder is not None and not self._decoder.chunked and self._decoder.left is None
        self._finish(None if complete else "the server closed the connection in the middle of the answer")

    def _finish(self, error: str | None, now: float | None = None) -> None:
        if self._current is None or self._done is None or self._done.done():
            return
        self._current.ended = now or clock()
        self._current.error = error
        self._done.set_result(None)


class Client:
    """POSTs to one server. Idle connections are kept; `prepare` opens some ahead of the measurement."""

    def __init__(self, url: str, api_key: str | None = None, idle_timeout: float = 120.0):
        parts = urlsplit(url.rstrip("/").removesuffix("/v1"))
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"--url {url!r} is no URL: give something like http://localhost:8000")
        self.host, self.port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        self.ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self.base, self.netloc, self.idle_timeout = parts.path, parts.netloc.rpartition("@")[2], idle_timeout
        self._key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._idle: list[Connection] = []

    def request(self, path: str, body: bytes, request_id: str) -> bytes:
        """The bytes of a POST, made before the measurement. The id lets a server's log be matched with ours."""
        head = (
            f"POST {self.base}{path} HTTP/1.1\r\nHost: {self.netloc}\r\n{self._key}Content-Type: application/json\r\n"
            f"Accept: text/event-stream\r\nX-Request-Id: {request_id}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    async def prepare(self, count: int) -> None:
        """Have at least `count` idle connections."""
        while (missing := count - len(self._idle)) > 0:
            self._idle += await asyncio.gather(*(self._connect() for _ in range(min(missing, 64))))

    async def post(self, request: bytes) -> Exchange:
        """One exchange. A kept connection that the server had closed meanwhile is replaced, once."""
        try:
            kept = self._take()
            connection = kept or await self._connect()
            result = await connection.exchange(request, self.idle_timeout)
            if kept and result.error and result.status is None and result.ended - result.sent < STALE:
                connection = await self._connect()
                result = await connection.exchange(request, self.idle_timeout)
        except (OSError, asyncio.TimeoutError) as error:
            now = clock()
            return Exchange(now, now, error=f"cannot reach {self.netloc}: {_reason(error)}")
        if result.error is None and connection.reusable and not connection.closed:
            self._idle.append(connection)
        else:
            connection.close()
        return result

    def _take(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                return connection
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        made = loop.create_connection(Connection, self.host, self.port, ssl=self.ssl)
        _, connection = await asyncio.wait_for(made, CONNECT_TIMEOUT)
        return connection

    def close(self) -> None:
        for connection in self._idle:
            with contextlib.suppress(OSError):
                connection.close()
        self._idle.clear()


def _reason(error: BaseException) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return f"no connection within {CONNECT_TIMEOUT:g} s"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()
