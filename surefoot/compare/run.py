"""A comparison from its sides to its record: each side in a process of its own, one after another.

A side that fails is recorded with its reason, and the others go on.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surefoot.bench.result import NO_PROOF, PROVEN, ProofState, match_proof
from surefoot.bench.run import NamedProof
from surefoot.compare import checks, rubric, summary
from surefoot.compare.prompts import Prompt
from surefoot.compare.record import Files, new_record
from surefoot.compare.sides import Side
from surefoot.core import confighash
from surefoot.core.errors import InputError, SurefootError

Progress = Callable[[str, "float | None"], None]


@dataclass(frozen=True)
class CompareSettings:
    """repeats: passes over all prompts.  max_tokens: per answer, where the prompt does not say.
    run_code: whether code in answers may be run (with limits).
    """

    repeats: int = 3
    max_tokens: int = 128
    run_code: bool = True

    def __post_init__(self) -> None:
        for name in ("repeats", "max_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")


class SideError(SurefootError):
    """One side could not be measured to its end."""


def compare(
    sides: Sequence[Side],
    prompts: Sequence[Prompt],
    settings: CompareSettings,
    files: Files,
    meaning: Mapping[str, str],
    *,
    proofs: Sequence[NamedProof] = (),
    api_key: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure every side; the record is on the disk after each. Raises if no side could be measured."""
    progress = progress or (lambda what, fraction: None)
    record = new_record(asdict(settings), list(prompts), meaning)
    with files.disk(files.answers):
        files.answers.write_text("", encoding="utf-8")
    by_id = {p.id: p for p in prompts}
    for index, side in enumerate(sides):
        part: dict[str, Any] = {"written": side.as_dict(), "answers": [], "error": None}
        record["sides"][side.name] = part
        try:
            _measure(side, index, prompts, settings, files, part, by_id, api_key, _within(progress, index, len(sides)))
        except SideError as error:
            part["error"] = str(error)
        finally:  # also when it is interrupted: what was measured stays
            if part.get("facts"):
                part["proof"] = vars(proof_of(part["facts"], proofs))
            part["summary"] = summary.summarise(part.pop("answers"))
            files.save(record)
    record["cautions"] = summary.cautions(record["sides"])
    if not any(side["summary"]["prompts"] for side in record["sides"].values()):
        why = next(side["error"] for side in record["sides"].values())
        raise SurefootError(f"no side could be measured: {why}")
    names, asked = [s.name for s in sides], [p.id for p in prompts]
    files.write(files.scores, rubric.sheet(names, asked, meaning))
    record["partial"] = False
    files.save(record)
    return record


def _within(progress: Progress, index: int, count: int) -> Progress:
    return lambda what, done: progress(what, None if done is None else (index + done) / count)


def _measure(
    side: Side,
    index: int,
    prompts: Sequence[Prompt],
    settings: CompareSettings,
    files: Files,
    part: dict[str, Any],
    by_id: Mapping[str, Prompt],
    api_key: str | None,
    progress: Progress,
) -> None:
    job = {"side": side.as_dict(), "prompts": [vars(p) for p in prompts], "settings": asdict(settings)}
    for message in _messages(job | {"api_key": api_key}, files.log(index), side.name):
        if "progress" in message:
            progress(f"{side.name}: {message['progress']}", message["fraction"])
        elif "facts" in message:
            part["facts"] = message["facts"]
        elif "answer" in message:
            answer = message["answer"]
            # What is known about an answer is checked once: the passes are greedy.
            again = next((a for a in part["answers"] if _same(a, answer)), None)
            prompt = by_id[answer["prompt"]]
            answer["kind"] = prompt.kind
            answer["checks"] = again["checks"] if again else checks.check(prompt, answer["text"], settings.run_code)
            part["answers"].append(answer)
            files.append({"side": side.name} | answer)
        elif "end" in message:
            part["facts"]["memory"] |= message["end"]["memory"]
        else:
            raise SideError(f"{side.name}: {message['error']}")


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return (a["prompt"], a["text"]) == (b["prompt"], b["text"])


def _messages(job: Mapping[str, Any], log: Path, name: str) -> Iterator[dict[str, Any]]:
    """What the side's process says, until its end; SideError if it ended without saying so."""
    with open(log, "w", encoding="utf-8") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "surefoot.compare.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    finished = False
    try:
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            message = json.loads(line)
            finished = finished or "end" in message or "error" in message
            yield message
    except BrokenPipeError:
        pass
    finally:
        process.stdin.close()  # the sign to end, if it has not
        try:
            process.wait(60 if finished else 10)
        except BaseException:
            process.kill()
            raise
    if not finished:
        raise SideError(f"{name}: its process {_ending(process.returncode)}; its log is {log}")
    log.unlink(missing_ok=True)


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    name = signal.Signals(-code).name
    return f"was ended by {name}" + (", as the system does when memory is full" if name == "SIGKILL" else "")


def proof_of(facts: Mapping[str, Any], proofs: Sequence[NamedProof]) -> ProofState:
    """The named proof that covers this configuration; else why the first one does not."""
    states = [match_proof(p.data, p.file, facts["identity"], p.complaints, _weights_time(facts)) for p in proofs]
    return next((s for s in states if s.status == PROVEN), states[0] if len(states) == 1 else _none(len(states)))


def _weights_time(facts: Mapping[str, Any]) -> float | None:
    """A digest of every byte needs no clock; one of samples does."""
    full = str(facts["identity"].get("weights_digest")).startswith("sha256")
    return None if full else facts.get("weights_time")


def _none(count: int) -> ProofState:
    return NO_PROOF if count == 0 else ProofState("UNPROVEN", f"none of the {count} proofs is about this configuration")


def config_hash(facts: Mapping[str, Any]) -> str:
    return confighash.digest(facts["identity"])
