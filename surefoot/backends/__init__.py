"""Ways to run a model behind one protocol, so that proofs and benchmarks know backends and never models."""

from __future__ import annotations

from surefoot.backends.base import Backend, Capture
from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError

__all__ = ["BACKENDS", "Backend", "Capture", "open_backend"]

BACKENDS = ("native", "transformers")


def open_backend(name: str, model_ref: str, config: EngineConfig) -> Backend:
    """Load a model behind the named backend."""
    if name == "native":
        from surefoot.backends.native import NativeBackend

        return NativeBackend(model_ref, config)
    if name == "transformers":
        from surefoot.backends.transformers import TransformersBackend

        return TransformersBackend(model_ref, config)
    raise InputError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
