"""Which configuration a number or a proof belongs to: the facts that decide what is computed, and their hash.

    mine = identity(backend.info(), model="canary-llama")
    digest(mine)                                         # "9f2c51d07a3be846"
    differences(mine, of_proof(proof_json))              # [] when a proof covers this configuration

Sizes that follow from free memory (pages, slots, limits) and the number of threads are left out: the proof itself shows
that results do not depend on them. `ops` is the policy, because which kernels were chosen so far depends on what ran.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FACTS = (
    "backend", "architecture", "num_parameters", "weights_digest", "device", "device_name", "dtype", "quant",
    "attention", "graph",
)  # fmt: skip
# A server that we started ourselves.
MANAGED = ("backend", "model", "weights_digest", "config_sha256", "device", "flags", "effective", "versions")
SERVED = ("backend", "url", "model", "root", "owned_by", "dtype", "device")
VERSIONS = ("surefoot", "torch", "transformers")


def identity(
    info: Mapping[str, Any],
    model: str,
    *,
    ops: str = "auto",
    random_weights: int | None = None,
    config_sha256: str | None = None,
) -> dict[str, Any]:
    """The facts of one configuration. `info` is what a backend says of itself; `config_sha256` that of config.json."""
    if info.get("backend") == "http":
        return {key: info.get(key) for key in SERVED}
    if info.get("backend") == "vllm":
        return {key: info.get(key) for key in MANAGED}
    versions = info.get("versions") or {}
    return {
        **{key: info.get(key) or None for key in FACTS},
        "model": _place(model),
        "config_sha256": config_sha256,
        "random_weights": random_weights,
        "ops": ops,
        "versions": {name: versions.get(name) for name in VERSIONS},
    }


def of_proof(proof: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of the target that a proof document is about."""
    settings, model = proof.get("settings") or {}, proof.get("model") or {}
    return identity(
        proof.get("target") or {},
        str(settings.get("model") or model.get("name")),
        ops=settings.get("ops") or "auto",
        random_weights=settings.get("random_weights"),
        config_sha256=(model.get("files_sha256") or {}).get("config.json"),
    )


def digest(facts: Mapping[str, Any]) -> str:
    """16 hex digits of SHA-256 over the canonical JSON."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What keeps two configurations from being the same, one phrase each."""
    return [
        f"{key} {_say(mine.get(key))} here, {_say(theirs.get(key))} there"
        for key in sorted({*mine, *theirs})
        if mine.get(key) != theirs.get(key)
    ]


def _place(model: str) -> str:
    """A folder by its real path, anything else as it is."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _say(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items()) or "none"
    return "none" if value is None else str(value)
