"""Settings of the HTTP server: what the flags of `surefoot serve` set. Engine settings stay in `EngineConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from surefoot.core.errors import InputError

GENERATION_DEFAULTS = ("model", "openai")


@dataclass(frozen=True)
class ServeSettings:
    """How the server listens and what it promises.

    port: 0 takes a free one and prints it.
    served_model_names: names that clients may ask for, the first is the one in answers; empty: the model reference.
    api_keys: accepted bearer tokens; empty: everybody is let in.
    generation_defaults: where sampling values come from that a request leaves out: "model" takes them from the model's
        generation_config and falls back to OpenAI's, "openai" takes OpenAI's (temperature 1, top_p 1) only.
    max_inflight: most sequences (prompts x n) that wait or run; above it the server answers 503.
    drain_timeout: seconds that running requests get to finish after SIGTERM.
    max_body_bytes: longest request body.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    generation_defaults: str = "model"
    max_inflight: int = 512
    drain_timeout: float = 30.0
    max_body_bytes: int = 16 * 1024 * 1024
    access_log: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InputError(f"port must lie in 0..65535, got {self.port}")
        if self.generation_defaults not in GENERATION_DEFAULTS:
            choices = " or ".join(GENERATION_DEFAULTS)
            raise InputError(f"generation_defaults must be {choices}, got {self.generation_defaults!r}")
        if any(not key for key in self.api_keys):
            raise InputError("an API key must not be empty")
        if any(not name for name in self.served_model_names):
            raise InputError("a served model name must not be empty")
        for name in ("max_inflight", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.drain_timeout >= 0:
            raise InputError(f"drain_timeout must be 0 or more seconds, got {self.drain_timeout}")
