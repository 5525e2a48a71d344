"""`surefoot serve`: an OpenAI-compatible HTTP server."""

from __future__ import annotations

from surefoot.cli.flags import ENGINE, SERVE, Model, flags
from surefoot.core.config import EngineConfig
from surefoot.serve.settings import ServeSettings


@flags(ServeSettings, "settings", SERVE)
@flags(EngineConfig, "config", ENGINE)
def serve(model: Model, *, config: EngineConfig, settings: ServeSettings) -> None:
    """Serve a model over HTTP in OpenAI's protocol.

    \b
    Examples:
      surefoot serve canary-qwen3.5
      surefoot serve DIR --device cuda --host 0.0.0.0 --port 8000 --api-key SECRET
      curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "canary-qwen3.5", "messages": [{"role": "user", "content": "What is the capital of France?"}]}'
    """
    from surefoot.cli.load import load_engine
    from surefoot.serve.main import run_server

    run_server(lambda: load_engine(model, config), settings)
