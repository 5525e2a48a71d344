"""A benchmark's record: JSON with the numbers, JSONL with every sample, and the name of the proof that goes with it.

Both are written while the benchmark runs. Whatever ends it, the JSON says `"partial": true` and why, and what was
measured until then stays.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from surefoot.core import confighash
from surefoot.core.errors import InputError

FORMAT = "surefoot-bench/1"
UNPROVEN = "UNPROVEN"
PROVEN = "PROVEN"


@dataclass(frozen=True)
class ProofState:
    """Whether a proof covers the configuration that was measured. status PROVEN or UNPROVEN; reason: one line."""

    status: str
    reason: str
    file: str | None = None
    seal: str | None = None
    config_hash: str | None = None

    @property
    def line(self) -> str:
        return f"{self.status}: {self.reason}"


NO_PROOF = ProofState(UNPROVEN, "no proof was named; make one with `surefoot verify` and give it with --proof FILE")


def match_proof(
    proof: Mapping[str, Any],
    file: str,
    mine: Mapping[str, Any],
    complaints: list[str],
    weights_time: float | None = None,
) -> ProofState:
    """Hold a proof document against the configuration that was measured.

    complaints: what the proof's own check found wrong with it.  weights_time: when the newest weight file was changed.
    """
    theirs = confighash.of_proof(proof)
    seal, digest = str(proof.get("seal", ""))[:16], confighash.digest(theirs)

    def state(status: str, reason: str) -> ProofState:
        return ProofState(status, reason, file, seal, digest)

    if complaints:
        return state(UNPROVEN, f"{file} is not sound: {complaints[0]}")
    if proof.get("partial"):
        return state(UNPROVEN, f"{file} is partial evidence")
    if proof.get("verdict") != "proven":
        return state(UNPROVEN, f"{file} says {proof.get('verdict')}")
    if different := confighash.differences(mine, theirs):
        return state(UNPROVEN, f"{file} is about another configuration: {'; '.join(different[:3])}")
    if weights_time is not None and (made := _created(proof)) is not None and weights_time > made:
        return state(UNPROVEN, f"the weights were changed after {file} was made")
    return state(PROVEN, f"{file}, sha256 {seal}, configuration {digest}")


def _created(proof: Mapping[str, Any]) -> float | None:
    try:
        return datetime.datetime.fromisoformat(str(proof.get("created"))).timestamp()
    except ValueError:
        return None


@dataclass
class Result:
    """The JSON document and the raw file beside it. A context manager: leaving it by an error marks it partial."""

    path: Path
    data: dict[str, Any]
    _raw: IO[str] | None = field(default=None, repr=False)

    @property
    def raw_path(self) -> Path:
        return self.path.with_suffix(".raw.jsonl")

    def __enter__(self) -> Result:
        with self._disk():
            self._raw = open(self.raw_path, "w", encoding="utf-8")
        head = {k: self.data[k] for k in ("format", "created", "mode", "config_hash", "proof", "clock")}
        self.write({"record": "header"} | head)
        self.save()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.data["partial"] = error is not None
        if error is not None:
            what = "interrupted" if isinstance(error, KeyboardInterrupt) else " ".join(str(error).split())
            self.data["ended_by"] = what or type(error).__name__
        if self._raw is not None:
            with contextlib.suppress(OSError) if error is not None else self._disk():
                self._raw.close()
        with contextlib.suppress(InputError) if error is not None else contextlib.nullcontext():
            self.save()

    def write(self, record: Mapping[str, Any]) -> None:
        """One raw record."""
        assert self._raw is not None
        with self._disk():
            self._raw.write(json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n")

    def add_point(self, point: Mapping[str, Any]) -> None:
        """One point is done: it is on the disk from here on."""
        self.data["points"].append(dict(point))
        with self._disk():
            if self._raw is not None:
                self._raw.flush()
        self.save()

    def save(self) -> None:
        """Replace the JSON in one step, so that a full disk leaves the last good one."""
        temporary = self.path.with_name(self.path.name + ".tmp")
        with self._disk():
            text = json.dumps(plain(self.data), ensure_ascii=False, indent=1, allow_nan=False)
            try:
                with open(temporary, "w", encoding="utf-8") as file:
                    file.write(text + "\n")
                os.replace(temporary, self.path)
            except OSError:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise

    @contextlib.contextmanager
    def _disk(self):
        try:
            yield
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {(error.strerror or str(error)).lower()}") from error


def new_data(mode: str, config: Mapping[str, Any], facts: Mapping[str, Any], proof: ProofState) -> dict[str, Any]:
    """The document before its first point."""
    from surefoot.bench.definitions import table

    return {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "partial": True,
        "mode": mode,
        "command": command_line(),
        "config_hash": confighash.digest(facts),
        "config_identity": dict(facts),
        "config": dict(config),
        "proof": vars(proof),
        "clock": "monotonic, seconds",
        "host": host(),
        "events": None,
        "points": [],
        "definitions": table(),
    }


def command_line() -> str:
    """How this was started, without the key."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    hidden = [re.sub(r"^(--(?:judge-)?api-key=).*", r"\1***", word) for word in words]
    return shlex.join(
        "***" if before in ("--api-key", "--judge-api-key") else word for before, word in zip(["", *words], hidden)
    )


def host() -> dict[str, Any]:
    """The machine on which the client or the engine ran."""
    from surefoot.device.cpu import CpuDevice

    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    busy = f"{load:.1f} processes wanted this machine's {cores} CPUs when the benchmark began: others disturb it"
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": CpuDevice().name(),
        "load_average_before": load,
        "warnings": [busy] if load > 0.75 * cores else [],
    }


def plain(value: Any) -> Any:
    """Plain JSON: NaN and infinities become null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
