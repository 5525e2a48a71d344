"""One benchmark from its settings to its record on the disk."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surefoot.bench.engine import EngineBench, EngineSettings, Progress, check_sweep
from surefoot.bench.result import NO_PROOF, ProofState, Result, match_proof, new_data
from surefoot.bench.server import ServerBench, ServerSettings
from surefoot.bench.sizes import Peaks
from surefoot.bench.target import open_target
from surefoot.core import confighash
from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError, SurefootError


@dataclass(frozen=True)
class NamedProof:
    """A proof document that was named, and what its own check found wrong with it."""

    data: Mapping[str, Any]
    file: str
    complaints: list[str] = field(default_factory=list)


def bench_engine(
    model: str,
    backend_name: str,
    config: EngineConfig,
    settings: EngineSettings,
    output: Path,
    proof: NamedProof | None = None,
    progress: Progress | None = None,
    calibrated: Peaks | None = None,
) -> dict[str, Any]:
    """Load, measure, write `output` and the raw samples beside it; returns the document.

    calibrated: the measured peaks of this device by dtype or scheme, instead of published ones.
    """
    from surefoot.backends import open_backend
    from surefoot.bench.steps import open_stepper
    from surefoot.weights.hub import resolve

    check_output(output)
    check_sweep(settings, {"max_model_len": config.max_model_len, "max_num_seqs": config.max_num_seqs})
    folder = resolve(model, progress=progress)
    if progress:
        progress("loading the model", None)
    begin = time.monotonic()
    backend = open_backend(backend_name, model, config)
    load_s = time.monotonic() - begin
    facts = confighash.identity(
        backend.info(),
        model,
        ops=config.ops,
        random_weights=config.random_weights,
        config_sha256=hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
    )
    # A digest of every byte needs no clock; one of samples would not see that a single number was changed since.
    changed = weights_time(folder) if str(facts["weights_digest"]).startswith("sampled") else None
    data = new_data("engine", backend.info(), facts, _state(proof, facts, changed))
    engine = getattr(backend, "engine", None)
    bench = EngineBench(
        open_stepper(backend),
        engine.model if engine else getattr(backend, "model", None),
        backend.info(),
        settings,
        progress,
        calibrated,
    )
    data |= {"model": model, "settings": vars(settings), "requested": vars(config), "load": {"seconds": load_s}}
    data["memory"] = bench.facts()
    with recording(output, data) as result:
        bench.run(result)
        data["config"] = backend.info()  # with the op implementations that ran
    return data


def bench_server(
    url: str,
    settings: ServerSettings,
    output: Path,
    *,
    model: str | None = None,
    api_key: str | None = None,
    endpoint: str = "completions",
    proof: NamedProof | None = None,
    progress: Progress | None = None,
    managed: Mapping[str, Any] | None = None,
    start_s: float | None = None,
) -> dict[str, Any]:
    """Measure an OpenAI-compatible server; returns the document.

    managed: what is known of a server that was started for this.  start_s: how long that took until it answered.
    """
    check_output(output)
    target = open_target(url, model, api_key, endpoint, settings.timeout)
    info = target.info() if managed is None else target.info() | dict(managed)
    facts = confighash.identity(info, url)
    data = new_data("server", info, facts, _state(proof, facts))
    if start_s is not None:
        data["load"] = {"seconds": start_s}
    bench = ServerBench(target, settings, api_key, progress)
    data |= {"model": target.backend.model, "settings": vars(settings)}
    data["request"] = {
        "endpoint": target.path,
        "temperature": target.temperature,
        "extra_fields": target.extras,
        "prompt_form": "messages, the server's template" if endpoint == "chat" else _form(target.takes_ids, settings),
        "notes": target.notes,
    }
    with contextlib.closing(target.backend), recording(output, data) as result:
        bench.run(result)
    return data


def _form(takes_ids: bool, settings: ServerSettings) -> str:
    if settings.prompts is not None:
        return "prompts of the file, no template"
    return "random token ids, no template" if takes_ids else "random words measured by /tokenize, no template"


def check_output(output: Path) -> None:
    """Refuse a place that cannot take the record, before a model is loaded or a server asked."""
    if output.is_dir() or not output.parent.is_dir() or output.suffix != ".json":
        raise InputError(f"cannot write {output}: give a .json file in a folder that exists")


@contextlib.contextmanager
def recording(output: Path, data: dict[str, Any]) -> Iterator[Result]:
    """The result as a context; an error names the file that holds what was measured until then."""
    try:
        with Result(output, data) as result:
            yield result
    except SurefootError as error:
        raise type(error)(f"{error}; what was measured until then is in {output}, marked partial") from error


def _state(proof: NamedProof | None, facts: Mapping[str, Any], weights: float | None = None) -> ProofState:
    if proof is None:
        return NO_PROOF
    return match_proof(proof.data, proof.file, facts, proof.complaints, weights)


def weights_time(folder: Path) -> float | None:
    """When the newest weight file was changed (seconds since the epoch)."""
    return max((p.stat().st_mtime for p in folder.glob("*.safetensors")), default=None)
