"""The proof of a server that is a black box: the findings of endpoint.py as a document like any other."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

from surefoot.backends.http import EndpointError, HttpBackend
from surefoot.verify import gate, texts
from surefoot.verify.judge import RULES
from surefoot.verify.prompts import digest
from surefoot.verify.proof import FORMAT, Proof, jsonable
from surefoot.verify.shapes import Finding, Progress, VerifySettings
from surefoot.weights.hub import resolve


def prove_endpoint(
    settings: VerifySettings,
    progress: Progress | None = None,
    partial: Path | None = None,
    target: HttpBackend | None = None,
) -> Proof:
    """Compare a server with the reference as far as it lets itself be looked at. target: one that is known already."""
    from surefoot.verify.endpoint import verify_endpoint
    from surefoot.verify.run import open_reference

    if target is None:
        assert settings.url is not None
        target = HttpBackend(settings.url, settings.url_model, settings.api_key)
    reference = open_reference(settings)
    try:
        found = verify_endpoint(reference, target, settings, progress)
    except EndpointError as error:
        if partial is not None and error.findings:
            document(list(error.findings), reference, target, settings, partial=True).save(partial)
        raise
    return document(found, reference, target, settings)


def document(
    found: list[Finding], reference: Any, target: Any, settings: VerifySettings, partial: bool = False
) -> Proof:
    evidence = {"endpoint": {"findings": jsonable([f.as_dict() for f in found])}}
    verdict, findings = gate.decide(evidence)
    sequences: list[list[int]] = next((f.details["sequences"] for f in found if "sequences" in f.details), [])
    given = {k: v for k, v in dataclasses.asdict(settings).items() if k != "api_key"}
    return Proof(
        {
            "format": FORMAT,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "partial": partial,
            "verdict": verdict,
            "model": {
                "name": settings.model,
                "architecture": reference.info().get("architecture"),
                "vocab_size": reference.vocab_size,
                "files_sha256": texts.hashes(resolve(settings.model)),
            },
            "reference": reference.info(),
            "target": target.info(),
            "settings": given,
            "prompts": {
                "source": str(settings.prompts or "built in"),
                "count": len(sequences),
                "tokens": sum(map(len, sequences)),
                "sha256": digest(sequences),
                "names": [],
                "sequences": sequences,
            },
            "rules": jsonable(RULES),
            "calibration": {},
            "findings": [f.as_dict() for f in findings],
            "localisation": None,
            "cause": None,
            "sensitivity": {},
            "notes": [],
            "evidence": evidence,
        }
    )
