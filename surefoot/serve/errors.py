"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}} with the status that clients act on."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from surefoot.core.errors import SurefootError

log = logging.getLogger("surefoot.serve")


class ApiError(SurefootError):
    """An error with everything that OpenAI's error body holds."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.http_status = status
        self.param = param
        self.code = code


class OverloadedError(ApiError):
    """Too many sequences wait already, or the server is about to stop."""

    def __init__(self, message: str, code: str = "server_overloaded"):
        super().__init__(message, 503, code=code)


class EngineDeadError(ApiError):
    """The inference thread ended with an error; only a restart helps."""

    def __init__(self, message: str):
        super().__init__(message, 500, code="engine_dead")


class StepFailedError(ApiError):
    """The step that computed this request failed; others go on."""

    def __init__(self, cause: BaseException | None):
        super().__init__(
            f"computing this request failed ({type(cause).__name__}): try again, the server's log says more",
            500,
            code="step_failed",
        )


class ClientGoneError(ApiError):
    """The client closed the connection; nobody reads the answer (499 is what access logs know this by)."""

    def __init__(self) -> None:
        super().__init__("the client closed the connection", 499, code="client_closed_request")


_TYPES = {401: "authentication_error", 404: "not_found_error", 503: "overloaded_error"}


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: Exception) -> dict[str, Any]:
    """The error body for any exception; an unexpected one is a bug here and shows its type, not its details."""
    if isinstance(error, SurefootError):
        return error_body(error.http_status, str(error), getattr(error, "param", None), error.code)
    return error_body(500, f"internal error: {type(error).__name__} (see the server's log)", code="internal_error")


def log_if_bug(error: Exception) -> None:
    if not isinstance(error, SurefootError):
        log.error("a request failed", exc_info=error)


def response_of(error: Exception) -> JSONResponse:
    status = error.http_status if isinstance(error, SurefootError) else 500
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(status)
    return JSONResponse(body_of(error), status, headers=headers)


def install_handlers(app: FastAPI) -> None:
    """Answer every exception of a route in OpenAI's shape; unexpected ones are also logged with their traceback."""

    async def on_surefoot_error(request: Request, error: Exception) -> JSONResponse:
        return response_of(error)

    async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = {
            404: f"no such address: {request.method} {request.url.path}",
            405: f"{request.method} is not allowed on {request.url.path}",
        }.get(error.status_code, str(error.detail))
        return JSONResponse(error_body(error.status_code, message), error.status_code, headers=error.headers)

    app.add_exception_handler(SurefootError, on_surefoot_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(Exception, on_surefoot_error)
