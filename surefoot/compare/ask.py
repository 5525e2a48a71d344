"""Loads one side and asks it everything: a question through the model's own chat template, a completion as raw text.

Greedy, one request at a time. seconds: from handing the request over to its last token (over HTTP: to the answer's end,
on the client's clock). The first passes are a warm-up and not counted.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from surefoot.compare.prompts import Prompt
from surefoot.compare.sides import Side
from surefoot.core import confighash
from surefoot.core.errors import InputError
from surefoot.core.sampling import SamplingParams

Say = Callable[[dict[str, Any]], None]
WARMUP_TOKENS = 8
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


class Asker(Protocol):
    template: dict[str, Any]

    def ask(self, prompt: Prompt, max_tokens: int) -> dict[str, Any]: ...


def measure(side: Side, prompts: Sequence[Prompt], settings: dict[str, Any], api_key: str | None, say: Say) -> None:
    """Everything about one side, said message by message."""
    with opened(side, api_key, say) as (asker, facts, memory):
        say({"facts": facts | {"template": asker.template, "memory": memory()}})
        say({"progress": "warming up", "fraction": 0.0})
        for kind in dict.fromkeys(p.kind for p in prompts):
            asker.ask(next(p for p in prompts if p.kind == kind), WARMUP_TOKENS)
        total, done = len(prompts) * settings["repeats"], 0
        for repeat in range(settings["repeats"]):
            for prompt in prompts:
                say({"progress": f"pass {repeat + 1}/{settings['repeats']}", "fraction": done / total})
                answer = asker.ask(prompt, prompt.max_tokens or settings["max_tokens"])
                say({"answer": {"prompt": prompt.id, "repeat": repeat} | answer})
                done += 1
        say({"end": {"memory": memory()}})


@contextlib.contextmanager
def opened(side: Side, api_key: str | None, say: Say) -> Iterator[tuple[Asker, dict[str, Any], Callable[[], dict]]]:
    """(asker, facts, what its memory is now)."""

    def progress(what: str, fraction: float | None = None) -> None:
        say({"progress": what, "fraction": fraction})

    if side.url is not None:
        from surefoot.backends.http import HttpBackend

        backend = HttpBackend(side.url, side.model, api_key)
        facts: dict[str, Any] = {"load_s": None, "info": _server_info(backend), "model": backend.model}
        yield ServerAsker(backend), facts | {"identity": confighash.identity(facts["info"], side.url)}, dict
        backend.close()
        return
    assert side.model is not None
    if side.backend == "vllm":
        from surefoot.backends.vllm import open_vllm

        with open_vllm(side.model, side.config, side.vllm, progress=progress) as served:
            http = served.backend()
            facts = {"load_s": served.process.start_s, "info": served.info(), "model": side.model}
            yield ServerAsker(http), facts | {"identity": confighash.identity(facts["info"], side.model)}, dict
            http.close()
        return
    yield _local(side, progress)


def _server_info(backend: Any) -> dict[str, Any]:
    card = backend.card
    known = {k: card[k] for k in ("root", "owned_by", "dtype", "device", "max_model_len") if k in card}
    return {"backend": "http", "url": backend.url, "model": backend.model} | known


def _local(side: Side, progress: Callable[..., None]) -> tuple[Asker, dict[str, Any], Callable[[], dict[str, Any]]]:
    import torch  # noqa: F401  (its import is no part of loading a model)

    from surefoot.backends import open_backend
    from surefoot.device import get_device
    from surefoot.weights.hub import resolve
    from surefoot.weights.tokenizer import Tokenizer

    assert side.model is not None
    folder = resolve(side.model, progress=progress)
    tokenizer = Tokenizer.try_load(folder)
    if tokenizer is None:
        raise InputError(f"{side.model} has no tokenizer: its answers could not be read")
    progress(f"loading {side.name}")
    device = get_device(side.config.device)
    device.reset_peak_memory()
    begin = time.monotonic()
    backend = open_backend(side.backend, side.model, side.config)
    load_s = time.monotonic() - begin
    info = backend.info()
    identity = confighash.identity(
        info,
        side.model,
        ops=side.config.ops,
        random_weights=side.config.random_weights,
        config_sha256=hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
    )
    weights_time = max((p.stat().st_mtime for p in folder.glob("*.safetensors")), default=None)
    facts = {"load_s": load_s, "info": info, "identity": identity, "model": side.model, "weights_time": weights_time}
    facts["vocab_size"] = backend.vocab_size

    def memory() -> dict[str, Any]:
        held = {k: info.get(k) for k in ("weight_bytes", "kv_cache_bytes", "state_bytes")}
        return held | {"peak_bytes": device.peak_memory(), "peak_of": "process" if device.type == "cpu" else "device"}

    return EngineAsker(backend, tokenizer, folder), facts, memory


class EngineAsker:
    """A backend in this process."""

    def __init__(self, backend: Any, tokenizer: Any, folder: Path):
        self.backend, self.tokenizer = backend, tokenizer
        self.template = _template(tokenizer, folder)

    def ask(self, prompt: Prompt, max_tokens: int) -> dict[str, Any]:
        templated = prompt.kind == "question" and self.tokenizer.has_chat_template
        messages = [{"role": "user", "content": prompt.text}]
        sent = self.tokenizer.render_chat(messages) if templated else prompt.text
        ids = self.tokenizer.encode_chat(messages) if templated else self.tokenizer.encode(prompt.text)
        begin = time.monotonic()
        (done,) = self.backend.generate([ids], SamplingParams(max_tokens=max_tokens))
        seconds = time.monotonic() - begin
        return {
            "text": done.text,
            "sent": sent,
            "template": "chat" if templated else "none",
            "prompt_tokens": len(ids),
            "tokens": len(done.token_ids),
            "seconds": seconds,
            "ttft_s": done.ttft_s,
            "finish_reason": done.finish_reason,
        }


class ServerAsker:
    """A server: its template and its tokens are its own; what it counts is in `usage`."""

    template = {"name": "the server's own (/v1/chat/completions)", "sha256": None}

    def __init__(self, backend: Any):
        self.backend = backend

    def ask(self, prompt: Prompt, max_tokens: int) -> dict[str, Any]:
        begin = time.monotonic()
        if prompt.kind == "question":
            answer = self.backend.chat([{"role": "user", "content": prompt.text}], max_tokens)
        else:
            answer = self.backend.ask(prompt.text, max_tokens)
        seconds = time.monotonic() - begin
        usage = answer.raw.get("usage") or {}
        return {
            "text": answer.text,
            "sent": prompt.text,
            "template": "chat" if prompt.kind == "question" else "none",
            "prompt_tokens": answer.prompt_tokens,
            "tokens": usage.get("completion_tokens"),
            "seconds": seconds,
            "ttft_s": None,
            "finish_reason": answer.finish_reason,
        }


def _template(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Where the chat template comes from, and its digest."""
    text = tokenizer.chat_template
    if not text:
        return {"name": "none: questions go in as raw text", "sha256": None}
    digest = hashlib.sha256(str(text).encode()).hexdigest()[:12]
    source = next((n for n in TEMPLATE_FILES if (folder / n).is_file() and _holds(folder / n)), "tokenizer")
    return {"name": f"{folder.name}/{source}", "sha256": digest}


def _holds(file: Path) -> bool:
    return file.suffix == ".jinja" or '"chat_template"' in file.read_text(encoding="utf-8", errors="replace")
