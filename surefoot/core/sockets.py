"""Sockets to listen on, bound before a model takes minutes to load, so that a busy port is known at once."""

from __future__ import annotations

import socket

from surefoot.core.errors import InputError


def bind(host: str, port: int) -> socket.socket:
    """A bound socket; port 0: any free one. A host or port that cannot be had is an InputError."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise InputError(f"cannot listen on host {host!r}: {error.strerror or error}") from None
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise InputError(
            f"cannot listen on {host}:{port}: {(error.strerror or str(error)).lower()}; choose another --port or --host"
        ) from None
    return listener
