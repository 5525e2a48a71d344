"""Works off the checks in order and makes the proof.

    settings = VerifySettings("canary-llama", dtype="bfloat16")
    proof = verify(open_reference(settings), open_target(settings), settings)

The first check that fails ends the comparison; then the guilty module is sought and its cause named. After every check
the evidence so far is written to `partial`, marked as such, so that an interrupted run leaves what it had found.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from surefoot.backends import Backend
from surefoot.core.errors import InputError
from surefoot.verify import checks, gate, prompts, texts
from surefoot.verify.calibrate import model_of
from surefoot.verify.continuation import greedy
from surefoot.verify.judge import RULES
from surefoot.verify.localise import dtype_of
from surefoot.verify.measure import Measurer
from surefoot.verify.pathcapture import plain
from surefoot.verify.proof import FORMAT, Proof, jsonable
from surefoot.verify.quantised import weights_of
from surefoot.verify.shapes import CHECKS, Cause, Finding, Localisation, Progress, VerifySettings
from surefoot.verify.sides import base_of, expected_backend, is_quantised, open_reference, open_target
from surefoot.weights.checkpoint import Checkpoint
from surefoot.weights.hub import resolve

LAYER_TOKENS = 256
SAMPLER_PROMPTS, SAMPLER_TOKENS = 3, 48
# Share of the whole that each stage takes on a CPU; only for the progress bar.
STAGES = {"prompts": 0.1, "exact": 0.05, "layers": 0.3, "head": 0.05, "logits": 0.3, "sampler": 0.05, "parity": 0.15}


@dataclass
class Session:
    """One verification in progress."""

    reference: Backend
    target: Backend
    settings: VerifySettings
    progress: Progress | None = None
    partial: Path | None = None
    evidence: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    smallest: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        settings, target = self.settings, self.target
        self.folder = resolve(settings.model)
        self.checkpoint = Checkpoint(self.folder)
        same_model(self.reference, target)
        self.text = texts.ReferenceText(self.folder) if texts.tokenizer_of(self.reference) is not None else None
        if self.text is not None:
            texts.same_tokenizer(self.text, texts.tokenizer_of(target))
        self.dtype = dtype_of(target)
        self.asked = prompts.PromptSet("", [])
        self._measurer: Measurer | None = None
        self._done = 0.0

    # ---- progress and partial evidence

    def tick(self, what: str) -> None:
        if self.progress is not None:
            self.progress(what, min(self._done, 0.99))

    def stage(self, name: str, work: Callable[[], Any]) -> Any:
        began = time.monotonic()
        result = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
        self._done += STAGES.get(name, STAGES["exact"] / 4)
        return result

    # ---- prompts

    def ask(self) -> None:
        """Token ids of every prompt with the reference's greedy continuation, and of the long text."""
        settings, limit = self.settings, self._limit()
        self.tick("prompts")
        if self.text is None:
            if settings.prompts is not None:
                raise InputError("--prompts needs a tokenizer, and the model folder has none")
            vocab = self.reference.vocab_size
            self.asked = prompts.random_ids(vocab, min(settings.long_tokens, limit), settings.seed)
            return
        template = self.text.has_template
        asked = prompts.read_file(settings.prompts, template) if settings.prompts else prompts.built_in(template)
        for prompt in asked.prompts:
            prompt.ids = self.text.ids(prompt)
            if not 0 < len(prompt.ids) < limit:
                raise InputError(f"prompt {prompt.name!r} has {len(prompt.ids)} tokens, the model takes {limit}")
        given = [p.ids for p in asked.prompts]
        self.tick("the reference's answers")
        asked.sequences = greedy(self.reference, self.target, given, settings.continuation_tokens, limit)
        asked.sequences.append(self.text.long_ids(min(settings.long_tokens, limit)))
        self.asked = asked

    def _limit(self) -> int:
        sides = (getattr(getattr(b, "engine", b), "max_model_len", None) for b in (self.reference, self.target))
        return min((n for n in sides if n), default=1 << 30) - 1

    # ---- checks

    def measurer(self) -> Measurer:
        """The three sides, with the device's noise; made when the first measured check needs it."""
        if self._measurer is None:
            expected = self.reference
            if self.dtype != torch.float32:
                self.tick("loading the reference in the target's dtype")
                expected = expected_backend(self.settings, self.dtype)
            self._measurer = Measurer(self.reference, expected, self.target, self.dtype, self.tick)
            self.calibration = self._measurer.calibrate(self.asked.sequences[-1])
        return self._measurer

    def collectors(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """How the evidence of each check is gathered."""
        tokenizer = texts.tokenizer_of(self.target)
        long = self.asked.sequences[-1]
        model, reference = model_of(self.target), model_of(self.reference)
        weighed = self.checkpoint if self.settings.random_weights is None else None
        quantised = weights_of(self.reference)
        hidden = {"not_possible": "the target's modules cannot be seen"}
        return {
            "template": lambda: texts.template_evidence(self.text, tokenizer, self.asked),
            "tokens": lambda: texts.tokens_evidence(self.text, tokenizer, self.asked),
            "weights": lambda: checks.weights_evidence(model, weighed, reference, quantised) if model else hidden,
            "config": lambda: checks.config_evidence(reference, model),
            "layers": lambda: self.measurer().layers(long[:LAYER_TOKENS]),
            "head": lambda: self.measurer().head(long),
            "logits": lambda: self.measurer().logits(self.asked.sequences),
            "sampler": lambda: checks.sampler_evidence(
                self.target, self.sampler_prompts(), self.reference.eos_token_ids
            ),
            "parity": self.parity,
        }

    def sampler_prompts(self) -> list[list[int]]:
        """Some prompts, and text that the model does not know: there its margins are small, and a penalty tells."""
        return [*(p.ids for p in self.asked.prompts[:SAMPLER_PROMPTS]), self.asked.sequences[-1][:SAMPLER_TOKENS]]

    def parity(self) -> dict[str, Any]:
        from surefoot.backends.native import NativeBackend

        if self.settings.skip_parity:
            return {"not_possible": "left out on request"}
        if not isinstance(self.target, NativeBackend):
            return {"not_possible": f"the {self.target.name} backend has one path only"}
        from surefoot.verify.parity import path_parity

        found = path_parity(
            self.target,
            self.settings,
            lambda what, _: self.tick(what),
            thorough=self.settings.thorough,
            text=self.asked.sequences[-1],
        )
        return {"findings": [f.as_dict() for f in found]}

    def work(self) -> Proof:
        self.stage("prompts", self.ask)
        collect = self.collectors()
        for check in CHECKS:
            self.tick(check)
            self.evidence[check] = jsonable(self.stage(check, collect[check]))
            found = gate.examine(check, self.evidence)
            self._keep()
            if failed := next((f for f in found if f.status == "fail"), None):
                return self.proof(*self.explain(failed))
            if check == "logits":
                self.count_cost()
        if self.settings.measure_sensitivity and model_of(self.target) is not None:
            self.stage("sensitivity", self.measure_sensitivity)
        return self.proof(None, None)

    def count_cost(self) -> None:
        """Of a quantised target: what the scheme costs."""
        if not is_quantised(self.settings):
            return
        base = base_of(self.settings)
        if base is None:
            self.notes.append("the scheme's cost was not counted: give the unquantised model with --base")
            return
        self.evidence["cost"] = jsonable(self.stage("cost", lambda: self._cost(base)))

    def _cost(self, settings: VerifySettings) -> dict[str, Any]:
        from surefoot.verify.cost import cost_evidence

        self.tick("loading the unquantised model")
        base = expected_backend(settings, torch.float32)
        same_model(base, self.target)
        sides = {"target": self.target, "scheme": self.reference}
        if self.dtype != torch.float32:
            sides["dtype"] = expected_backend(settings, self.dtype)
        return cost_evidence(base, sides, self.asked.sequences, self.tick)

    def measure_sensitivity(self) -> None:
        from surefoot.verify.sensitivity import smallest_faults

        self.smallest = smallest_faults(self.measurer(), self.asked.sequences[-1])

    def explain(self, failed: Finding) -> tuple[Localisation | None, Cause | None]:
        """Which module, and what is wrong with it. The verdict stands without; a failure here becomes a note."""
        try:
            return self.stage("cause", lambda: self._explain(failed))
        except Exception as error:
            line = " ".join(str(error).split())[:200]
            self.notes.append(f"the module at fault could not be sought: {type(error).__name__}: {line}")
            return None, None

    def _explain(self, failed: Finding) -> tuple[Localisation | None, Cause | None]:
        check = failed.check
        if check in ("template", "tokens", "sampler"):
            from surefoot.verify.prompt_causes import outside_cause

            asked = self.sampler_prompts() if check == "sampler" else self.asked.prompts
            return None, outside_cause(check, self.folder, self.target, asked)
        if model_of(self.target) is None:
            return None, None
        from surefoot.verify.causes import find

        self.tick("looking for the module and the cause")
        ids = self.asked.sequences[-1][:LAYER_TOKENS]
        return find(self.reference, self.target, ids, self.settings, failed)

    def _keep(self) -> None:
        if self.partial is not None:
            proof = self.proof(None, None)
            proof.data["partial"] = True
            proof.save(self.partial)

    # ---- the document

    def proof(self, place: Localisation | None, cause: Cause | None) -> Proof:
        verdict, findings = gate.decide(self.evidence)
        settings = self.settings
        return Proof(
            {
                "format": FORMAT,
                "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "partial": False,
                "verdict": verdict,
                "model": self.model_facts(),
                "reference": self.reference.info(),
                "target": self.target.info(),
                "settings": {k: v for k, v in vars(settings).items() if k != "api_key"},
                "prompts": {
                    "source": self.asked.source,
                    "count": len(self.asked.prompts),
                    "tokens": sum(map(len, self.asked.sequences)),
                    "sha256": self.asked.digest(),
                    "names": [p.name for p in self.asked.prompts],
                    "sequences": self.asked.sequences,
                },
                "rules": jsonable(RULES),
                "calibration": self.calibration,
                "findings": [f.as_dict() for f in findings],
                "localisation": place.as_dict() if place else None,
                "cause": cause.as_dict() if cause else None,
                "sensitivity": sensitivity(findings, self.smallest),
                "notes": self.notes,
                "evidence": self.evidence,
                "seconds": {k: round(v, 2) for k, v in self.seconds.items()},
            }
        )

    def model_facts(self) -> dict[str, Any]:
        weights = [item[1] for item in self.evidence.get("weights", {}).get("items", [])]
        return {
            "name": self.settings.model,
            "architecture": self.reference.info().get("architecture"),
            "vocab_size": self.reference.vocab_size,
            "files_sha256": texts.hashes(self.folder),
            "weights_sha256": prompts.digest(weights) if weights else None,
            "weights": "checkpoint" if self.settings.random_weights is None else "random",
        }


def sensitivity(findings: list[Finding], smallest: list[dict[str, Any]]) -> dict[str, Any]:
    """The smallest faults that these limits catch: of the logits by calculation, others measured by planting them."""
    found: dict[str, Any] = {"faults": smallest}
    logits = next((f.details for f in findings if f.check == "logits" and f.details), None)
    if logits is not None:
        noise = logits["noise"]
        found["logit_scale"] = logits["limits"]["gain"]
        found["one_token"] = logits["limits"]["err"] * noise
        found["one_logit"] = logits["limits"]["worst"] * noise
    return found


def same_model(reference: Backend, target: Backend) -> None:
    """Two different models cannot be compared: one clear line instead of a thousand findings."""
    if reference.vocab_size != target.vocab_size:
        raise InputError(
            f"two different models: the reference has {reference.vocab_size} vocabulary entries, the target "
            f"{target.vocab_size}"
        )
    ours, theirs = model_of(target), model_of(reference)
    if ours is None or theirs is None:
        return
    shapes = {plain(n): tuple(p.shape) for n, p in theirs.named_parameters(remove_duplicate=False)}
    for name, parameter in ours.named_parameters(remove_duplicate=False):
        wanted = shapes.get(plain(name))
        if wanted is not None and wanted != tuple(parameter.shape):
            raise InputError(
                f"two different models: {name} has shape {list(wanted)} in the reference and "
                f"{list(parameter.shape)} in the target"
            )


def verify(
    reference: Backend,
    target: Backend,
    settings: VerifySettings,
    progress: Progress | None = None,
    partial: Path | None = None,
) -> Proof:
    """Compare target with reference. `partial`: where evidence is kept while running."""
    with _quiet():
        return Session(reference, target, settings, progress, partial).work()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' advice about optional kernels."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def prove(settings: VerifySettings, progress: Progress | None = None, partial: Path | None = None) -> Proof:
    """Open both sides as the settings say and compare them."""
    if settings.base is not None and not is_quantised(settings):
        raise InputError("--base is for a quantised model: give --quant, or the folder of one")
    if settings.url is not None:
        from surefoot.verify.remote import prove_endpoint

        return prove_endpoint(settings, progress, partial)
    if progress is not None:
        progress("loading the model", None)
    target = open_target(settings)
    return verify(open_reference(settings, dtype_of(target)), target, settings, progress, partial)
