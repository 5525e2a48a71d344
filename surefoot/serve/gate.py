"""API keys, checked before anything else of a request is looked at. Plain ASGI: nothing is added per streamed token."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from surefoot.serve.errors import ApiError, response_of

OPEN_PATHS = frozenset({"/health", "/version"})  # load balancers and probes have no key


class KeyGate:
    """Lets requests with a known `Authorization: Bearer` key through; without keys it lets everybody through."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]):
        self.app = app
        # digests make every comparison the same length, so that timing says nothing about the keys
        self._digests = [hashlib.sha256(key.encode()).digest() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._digests and scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._known(scope):
            error = ApiError("wrong or missing API key: send 'Authorization: Bearer KEY'", 401, code="invalid_api_key")
            await response_of(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # NOTE: a list, not a generator: all keys are compared whichever matches.
        return scheme.lower() == b"bearer" and any([hmac.compare_digest(digest, known) for known in self._digests])
