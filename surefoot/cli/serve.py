"""`surefoot serve`: an OpenAI-compatible HTTP server."""

from __future__ import annotations

from typing import Annotated

import typer

from surefoot.cli.flags import ENGINE, SERVE, VLLM, Model, flags
from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError
from surefoot.core.vllm import VllmSettings
from surefoot.serve.settings import ServeSettings

Backend = Annotated[str, typer.Option(metavar="NAME", help="native, or vllm: start and watch a `vllm serve`.")]


@flags(VllmSettings, "vllm", VLLM)
@flags(ServeSettings, "settings", SERVE)
@flags(EngineConfig, "config", ENGINE)
def serve(
    model: Model, backend: Backend = "native", *, config: EngineConfig, settings: ServeSettings, vllm: VllmSettings
) -> None:
    """Serve a model over HTTP in OpenAI's protocol.

    \b
    Examples:
      surefoot serve canary-qwen3.5
      surefoot serve DIR --device cuda --host 0.0.0.0 --port 8000 --api-key SECRET
      surefoot serve DIR --backend vllm --device npu --tensor-parallel-size 8
      curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "canary-qwen3.5", "messages": [{"role": "user", "content": "What is the capital of France?"}]}'
    """
    if backend == "vllm":
        from surefoot.cli.vllm import serve_vllm

        return serve_vllm(model, config, vllm, settings)
    if backend != "native":
        raise InputError(f"--backend {backend!r}: choose native or vllm")
    vllm.check_unused(backend)
    from surefoot.cli.load import load_engine
    from surefoot.serve.main import run_server

    run_server(lambda: load_engine(model, config, lazy=True), settings)
    return None
