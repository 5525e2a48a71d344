"""proof: the model on this device against transformers in fp32; precision: the curves of that proof for plots.

The proof keeps its numbers packed, so that it can be judged again. `precision.json` holds what a reader wants to see of
them: KL by position (nats) and the error of each module in units of what the dtype itself costs.
"""

from __future__ import annotations

from typing import Any

from surefoot.bringup.folder import write_json
from surefoot.bringup.settings import ENGINE_FIELDS
from surefoot.bringup.stages.base import BAD, GOOD, WARN, Record, Work

BINS = (0, 8, 16, 32, 64, 96, 128, 192, 256, 320, 384, 512, 768, 1024, 1536, 2048)


def run_proof(work: Work) -> None:
    import torch

    from surefoot.verify import run
    from surefoot.verify.shapes import VerifySettings

    s = work.settings
    if s.num_threads is not None:
        torch.set_num_threads(s.num_threads)
    target = {name: getattr(s, name) for name in ENGINE_FIELDS}
    settings = VerifySettings(s.model, measure_sensitivity=s.sensitivity, **target)
    partial = work.path / "proof.partial.json"
    proof = run.prove(settings, work.progress, partial)
    write_json(work.path / "precision.json", precision(proof.data))
    proof.save(work.path / "proof.json")
    partial.unlink(missing_ok=True)


def proof_outcome(record: Record) -> tuple[str, str]:
    level = {"proven": GOOD, "undecided": WARN}.get(record["verdict"], BAD)
    failed = next((f for f in record["findings"] if f["status"] == "fail"), None)
    logits = next((f for f in record["findings"] if f["check"] == "logits" and f["status"] == "pass"), None)
    cause = (record.get("cause") or {}).get("sentence")
    said = failed or logits
    text = cause or (f"{said['check']}: {said['summary']}" if said else "")
    return level, f"{record['verdict']}; {text}" if text else str(record["verdict"])


def precision(proof: dict[str, Any]) -> Record:
    """The curves of a proof document."""
    evidence = proof["evidence"]
    return {
        "format": "surefoot-precision/1",
        "kl_by_position": _kl(evidence.get("logits") or {}),
        "error_by_module": _modules(evidence.get("layers") or {}),
    }


def _kl(logits: dict[str, Any]) -> list[Record]:
    """KL(reference || run) per token in nats, averaged over ranges of positions; `dtype`: of the right null runs."""
    import numpy as np

    from surefoot.verify.pack import unpack, unpack_index

    if "kl" not in (logits.get("run") or {}):
        return []
    position = unpack_index(logits["position"])
    run = unpack(logits["run"]["kl"])
    nulls = [unpack(n["rows"]["kl"]) for n in logits.get("nulls", []) if "kl" in n.get("rows", {})]
    rows = []
    for low, high in zip(BINS, (*BINS[1:], 1 << 30)):
        mask = (position >= low) & (position < high) & np.isfinite(run)
        if not mask.any():
            continue
        expected = float(np.mean([n[mask].mean() for n in nulls])) if nulls else None
        rows.append(
            {
                "position": low,
                "to": int(position[mask].max()),
                "tokens": int(mask.sum()),
                "mean": float(run[mask].mean()),
                "max": float(run[mask].max()),
                "dtype": expected,
            }
        )
    return rows


def _modules(layers: dict[str, Any]) -> list[Record]:
    """Root mean square over tokens of a module's error, in units of the dtype's noise at the same token."""
    import numpy as np

    from surefoot.verify.pack import unpack

    rows = []
    for module in layers.get("modules", []):
        err = unpack(module["run"]["err"])
        good = err[np.isfinite(err)]
        nulls = [unpack(n["err"]) for n in module.get("nulls", [])]
        if len(good):
            rows.append(
                {
                    "path": module["path"],
                    "noise": module["noise"],
                    "error": float(np.sqrt(np.mean(good**2))),
                    "relative_error": float(np.sqrt(np.mean(good**2))) * module["noise"],
                    "null_most": max((float(np.sqrt(np.mean(n[np.isfinite(n)] ** 2))) for n in nulls), default=None),
                }
            )
    return rows
