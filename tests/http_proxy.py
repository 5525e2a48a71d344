"""A proxy in front of a server that changes what passes: servers with other abilities and other faults, for tests."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx


class Refuse(Exception):
    """Raised by `before`: answer 400."""


@dataclass
class Rules:
    """before(path, body) may change the request's body or raise Refuse; after(path, body, answer) the answer.

    routes: paths that exist, None for all.  lives: requests until the server drops dead, None for ever.
    """

    before: Callable[[str, dict], None] = lambda path, body: None
    after: Callable[[str, dict, dict], None] = lambda path, body, answer: None
    routes: tuple[str, ...] | None = None
    lives: int | None = None
    seen: list[tuple[str, dict]] = field(default_factory=list)


@contextlib.contextmanager
def proxied(upstream: str, rules: Rules) -> Iterator[str]:
    client = httpx.Client(base_url=upstream, timeout=60)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._answer(client.get(self.path) if self._exists() else None)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            rules.seen.append((self.path, body))
            if rules.lives is not None and len(rules.seen) > rules.lives:
                self.close_connection = True
                return
            try:
                rules.before(self.path, body)
            except Refuse as refusal:
                self._send(400, {"error": {"message": str(refusal)}})
                return
            self._answer(client.post(self.path, json=body) if self._exists() else None, body)

        def _exists(self) -> bool:
            return rules.routes is None or self.path in rules.routes

        def _answer(self, response: httpx.Response | None, body: dict | None = None) -> None:
            if response is None:
                self._send(404, {"error": {"message": "no such route"}})
                return
            answer = response.json()
            if response.status_code == 200:
                rules.after(self.path, body or {}, answer)
            self._send(response.status_code, answer)

        def _send(self, status: int, answer: dict) -> None:
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
        client.close()
