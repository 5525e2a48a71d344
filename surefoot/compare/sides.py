"""What is compared, as written on the command line.

    canary-llama                                        a model, as for `surefoot run`
    canary-llama:quant=w8a8,dtype=bfloat16              with settings of its own
    DIR:backend=transformers,name=reference             another backend; `name` is what tables and charts call it
    DIR:backend=vllm,device=npu,tensor_parallel_size=8  a `vllm serve` of its own
    http://host:8000:model=NAME                         a server that runs already

KEY is a field of EngineConfig (or, with backend=vllm, of VllmSettings), written as there or with dashes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError, SurefootError
from surefoot.core.vllm import VllmSettings

WRITTEN = re.compile(r"(?P<model>.+?)(?::(?P<options>[A-Za-z_-]+=[^,=]*(?:,[A-Za-z_-]+=[^,=]*)*))?")
BACKENDS = ("native", "transformers", "vllm")
SHORT = {"prefix_caching": "enable_prefix_caching", "threads": "num_threads"}


@dataclass(frozen=True)
class Side:
    """One side. url and model: a server and which of its models; else `model` is a reference for `backend`."""

    name: str
    model: str | None
    url: str | None = None
    backend: str = "native"
    config: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    vllm: VllmSettings = dataclasses.field(default_factory=VllmSettings)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Side:
        config: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data["config"].items()}
        return cls(**(data | {"config": EngineConfig(**config), "vllm": VllmSettings(**data["vllm"])}))


def parse(texts: Sequence[str]) -> list[Side]:
    """At least two sides, each with a name of its own."""
    if len(texts) < 2:
        raise InputError("a comparison needs two sides: surefoot compare A B")
    sides = [_side(text) for text in texts]
    names = [side.name for side in sides]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two sides are called {twice!r}: give one another name with :name=...")
    return sides


def _side(text: str) -> Side:
    match = WRITTEN.fullmatch(text)
    if match is None:
        raise InputError("a side is empty: give a model, MODEL:KEY=VALUE,... or a URL")
    model, written = match["model"], match["options"] or ""
    options = {}
    for pair in written.split(",") if written else []:
        key, _, value = pair.partition("=")
        options[SHORT.get(key.replace("-", "_"), key.replace("-", "_"))] = value
    try:
        return _build(text, model, options)
    except SurefootError as error:
        raise type(error)(f"{text}: {error}") from None


def _build(text: str, model: str, options: dict[str, str]) -> Side:
    name = options.pop("name", text)
    if model.startswith(("http://", "https://")):
        served = options.pop("model", None)
        if options:
            raise InputError(f"a server takes model= and name=, not {', '.join(options)}=: it has settings already")
        return Side(name, served, model, "http")
    backend = options.pop("backend", "native")
    if backend not in BACKENDS:
        raise InputError(f"backend={backend}: choose {', '.join(BACKENDS)}")
    vllm = _typed(VllmSettings, {k: options.pop(k) for k in list(options) if _has(VllmSettings, k)})
    if backend != "vllm":
        vllm.check_unused(backend)
    unknown = [k for k in options if not _has(EngineConfig, k)]
    if unknown:
        known = ", ".join(sorted(f.name for f in dataclasses.fields(EngineConfig)))
        raise InputError(f"unknown setting {unknown[0]!r}: choose name, backend, {known}")
    # Repeats of a prompt are to compute it again.
    config = _typed(EngineConfig, ({} if backend == "vllm" else {"enable_prefix_caching": "false"}) | options)
    return Side(name, model, None, backend, config, vllm)


def _has(settings: type, name: str) -> bool:
    return any(f.name == name for f in dataclasses.fields(settings))


def _typed(settings: Any, given: dict[str, str]) -> Any:
    """The dataclass from text; its annotations say what each value is."""
    kinds = {f.name: str(f.type) for f in dataclasses.fields(settings)}
    return settings(**{name: _value(name, kinds[name], text) for name, text in given.items()})


def _value(name: str, kind: str, text: str) -> Any:
    base = kind.removesuffix(" | None")
    if base != kind and text in ("", "none"):
        return None
    if base == "bool":
        if text not in ("true", "false", "1", "0"):
            raise InputError(f"{name}={text}: write true or false")
        return text in ("true", "1")
    try:
        if base.startswith("tuple"):
            return tuple(int(v) for v in text.split("/"))
        return {"int": int, "float": float, "str": str}[base](text)
    except ValueError:
        what = "numbers like 1/2/4" if base.startswith("tuple") else "a number"
        raise InputError(f"{name}={text}: write {what}") from None
