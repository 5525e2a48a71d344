"""The routes. Each one reads its body, asks the front end, and answers; nothing else happens here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from surefoot import __version__
from surefoot.serve.chat import chat_completion
from surefoot.serve.completions import completion
from surefoot.serve.errors import error_body, install_handlers
from surefoot.serve.frontend import Frontend
from surefoot.serve.gate import KeyGate
from surefoot.serve.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
    read_json,
    validate,
)
from surefoot.serve.sampling import check_ids
from surefoot.serve.settings import ServeSettings
from surefoot.serve.worker import EngineWorker


def create_app(worker: EngineWorker, settings: ServeSettings | None = None) -> FastAPI:
    """The ASGI application over a started worker. The caller stops the worker."""
    settings = settings or ServeSettings()
    front = Frontend(worker, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.attach(asyncio.get_running_loop())
        yield
        front.close()

    app = FastAPI(title="surefoot", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(KeyGate, api_keys=settings.api_keys)
    install_handlers(app)
    _add_generation_routes(app, front)
    _add_token_routes(app, front)
    _add_status_routes(app, front)
    return app


def _add_generation_routes(app: FastAPI, front: Frontend) -> None:
    limit = front.settings.max_body_bytes

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = validate(ChatCompletionRequest, await read_json(request, limit))
        return await chat_completion(front, body, request)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = validate(CompletionRequest, await read_json(request, limit))
        return await completion(front, body, request)


def _add_token_routes(app: FastAPI, front: Frontend) -> None:
    limit = front.settings.max_body_bytes

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        data = await read_json(request, limit)
        body: TokenizeChatRequest | TokenizeTextRequest
        if isinstance(data, dict) and "messages" in data:
            body = chat = validate(TokenizeChatRequest, data)
            front.check_model(body.model)
            ids = await front.in_pool(front.encode_chat, chat, body.add_special_tokens)
        else:
            body = text = validate(TokenizeTextRequest, data)
            front.check_model(body.model)
            add_special_tokens = body.add_special_tokens is not False
            ids = await front.in_pool(
                lambda: front.tokenizer().encode(text.prompt, add_special_tokens=add_special_tokens)
            )
        strings = [front.pieces.text(t) for t in ids] if body.return_token_strs else None
        answer = {"count": len(ids), "max_model_len": front.engine.max_model_len, "tokens": ids, "token_strs": strings}
        return JSONResponse(answer)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = validate(DetokenizeRequest, await read_json(request, limit))
        front.check_model(body.model)
        check_ids(body.tokens, front.engine.vocab_size, "tokens")
        tokenizer = front.tokenizer()
        text = await front.in_pool(lambda: tokenizer.decode(body.tokens, skip_special_tokens=False))
        return JSONResponse({"prompt": text})


def _add_status_routes(app: FastAPI, front: Frontend) -> None:
    worker = front.worker

    @app.get("/health")
    async def health() -> Response:
        if worker.alive and not worker.stopping:
            return JSONResponse({"status": "ok"})
        reason = "the server is stopping" if worker.stopping else "the inference engine stopped: restart the server"
        return JSONResponse(error_body(503, reason, code="unhealthy"), 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card(front, name) for name in front.names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return model_card(front, front.check_model(name))

    @app.get("/metrics")
    async def metrics() -> Response:
        # NOTE: read beside the inference thread; the numbers may be a step apart from each other.
        numbers = {"sequences_in_flight": worker.num_inflight, "healthy": worker.alive} | front.engine.stats()
        lines = [f"surefoot_{name} {float(n):g}" for name, n in numbers.items() if isinstance(n, (int, float))]
        return PlainTextResponse("\n".join(lines) + "\n")


def model_card(front: Frontend, name: str) -> dict[str, Any]:
    """OpenAI's model object, and what is in effect here."""
    info = front.engine.info
    return {
        "id": name,
        "object": "model",
        "created": front.created,
        "owned_by": "surefoot",
        "root": info.model,
        "max_model_len": front.engine.max_model_len,
        "dtype": info.dtype,
        "device": info.device,
        "architecture": info.architecture,
        "generation_defaults": front.defaults,
    }
