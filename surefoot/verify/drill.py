"""The drill: planted faults that the proof must find, place and name, and sound runs that it must let pass.

    python -m surefoot.verify.drill -o docs/drill.md            all of it: a quarter of an hour
    surefoot verify --drill                                     the same

Each case goes through `run.verify`, as a user's model does; nothing knows that a fault was planted. What it must reach:
every fault refuted, the right module in 95 %, the right cause in 90 %, and not one sound run refused.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from surefoot.backends.native import NativeBackend
from surefoot.backends.transformers import TransformersBackend
from surefoot.core.config import EngineConfig
from surefoot.verify import specimens
from surefoot.verify.drill_record import Record
from surefoot.verify.faults import Fault, catalogue
from surefoot.verify.run import verify
from surefoot.verify.shapes import VerifySettings
from surefoot.verify.sides import QuantisedReference
from surefoot.verify.specimens import Specimen

Progress = Callable[[str, "float | None"], None]
DETECTED, RIGHT_MODULE, RIGHT_CAUSE, CLEAN_RUNS = 1.0, 0.95, 0.90, 60
# Ways to cut the work of a sound run. Seeds differ by model.
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"prefill_chunk_size": 7},
    {"prefill_chunk_size": 64, "max_num_seqs": 2},
    {"ops": "reference"},
)
SCHEMES: tuple[dict[str, Any], ...] = ({"quant": "w8a16"}, {"quant": "w8a8"}, {"quant": "w4a16"}, {"quant": "w4a8"})
QUANTISED = 4  # the first so many models are run sound in every scheme, in fp32 and bf16
FAULTED = 5  # the first so many models take faults; all of them are run sound


@dataclass(frozen=True)
class Case:
    """One run: a model, settings of the target's engine, and a fault (None: sound)."""

    specimen: Specimen
    dtype: str
    fault: Fault | None = None
    seed: int = 0
    engine: dict[str, Any] = field(default_factory=dict)

    @property
    def quant(self) -> str | None:
        return self.fault.quant if self.fault else self.engine.get("quant")

    @property
    def key(self) -> str:
        return f"{self.fault.id if self.fault else 'sound'}: {self.name}"

    @property
    def name(self) -> str:
        extras = [f"{k}={v}" for k, v in self.engine.items()]
        return " ".join([self.specimen.name, self.dtype, *extras, f"seed={self.seed}"])


@dataclass
class Outcome:
    """What the proof said. check: the first that failed."""

    case: Case
    verdict: str
    check: str | None
    line: str
    module: str | None
    op: str | None
    cause: str | None
    sentence: str
    distance: float | None
    seconds: float

    def facts(self) -> dict[str, Any]:
        """All but the case, to be written down."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "case"}

    @property
    def detected(self) -> bool:
        return self.verdict == "refuted"

    @property
    def right_module(self) -> bool:
        fault = self.case.fault
        found = self.module or (self.check if self.check != "template" else "tokens") or ""
        return fault is not None and self.detected and bool(re.fullmatch(fault.where, found))

    @property
    def right_cause(self) -> bool:
        fault = self.case.fault
        return fault is not None and self.detected and self.cause in fault.names


@dataclass
class DrillResult:
    """Outcomes of the planted faults and of the sound runs. smallest: by "model, dtype", see `sensitivity`."""

    outcomes: list[Outcome]
    seconds: float = 0.0
    smallest: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def planted(self) -> list[Outcome]:
        return [o for o in self.outcomes if o.case.fault is not None]

    @property
    def sound(self) -> list[Outcome]:
        return [o for o in self.outcomes if o.case.fault is None]

    @property
    def false_alarms(self) -> list[Outcome]:
        return [o for o in self.sound if o.verdict == "refuted"]

    def share(self, good: Callable[[Outcome], bool]) -> float:
        return sum(map(good, self.planted)) / max(1, len(self.planted))

    @property
    def passed(self) -> bool:
        return (
            self.share(lambda o: o.detected) >= DETECTED
            and self.share(lambda o: o.right_module) >= RIGHT_MODULE
            and self.share(lambda o: o.right_cause) >= RIGHT_CAUSE
            and not self.false_alarms
        )

    def confusion(self) -> dict[str, dict[str, int]]:
        """planted fault -> named cause -> how often."""
        table: dict[str, dict[str, int]] = {}
        for outcome in self.planted:
            assert outcome.case.fault is not None
            row = table.setdefault(outcome.case.fault.id, {})
            named = (outcome.cause or "(no cause)") if outcome.detected else "(not detected)"
            row[named] = row.get(named, 0) + 1
        return table


# ---- which cases


def fault_cases(models: Sequence[Specimen], configs: dict[str, Any]) -> Iterator[Case]:
    """Every fault in every model that can have it, in fp32; in the canaries in bf16 as well, if it shows there."""
    for fault in catalogue().values():
        for specimen in models[:FAULTED]:
            possible = set(fault.models) & set(specimen.answers_to) and fault.needs(configs[specimen.name])
            asks_text = fault.where == "tokens"
            if possible and (specimen.kind == "canary" or not asks_text):
                yield Case(specimen, fault.dtype, fault)
                if specimen.kind == "canary" and not fault.subtle and fault.dtype == "float32":
                    yield Case(specimen, "bfloat16", fault)


def a_sample(cases: Iterable[Case], per_class: int = 2) -> list[Case]:
    """A few faults of every class, each in one model."""
    chosen: dict[str, Case] = {}
    count: dict[int, int] = {}
    for case in cases:
        assert case.fault is not None
        if case.fault.id not in chosen and count.get(case.fault.cause, 0) < per_class:
            count[case.fault.cause] = count.get(case.fault.cause, 0) + 1
            chosen[case.fault.id] = case
    return list(chosen.values())


def sound_cases(
    models: Sequence[Specimen], ways: Sequence[dict[str, Any]] = WAYS, schemes: Sequence[dict[str, Any]] = SCHEMES
) -> Iterator[Case]:
    """Every model in every dtype, other ways to cut the same work, and the schemes of quantisation."""
    for seed, specimen in enumerate(models):
        if specimen.kind == "overflow":
            continue
        for dtype in ("float32", "bfloat16", "float16"):
            quantised = schemes if seed < QUANTISED and dtype != "float16" else ()
            for way in (*ways, *quantised):
                yield Case(specimen, dtype, None, seed, way)


def models_in(folder: Path, sample: bool) -> list[Specimen]:
    made = [specimens.random(folder, "llama", 1), specimens.random(folder, "qwen3.5", 2)]
    made.append(specimens.random(folder, "llama", 3, "overflow"))
    if sample:
        return [specimens.canary("canary-llama"), *made]
    made.append(specimens.random(folder, "llama", 4, num_key_value_heads=1, tie_word_embeddings=False))
    made.append(specimens.random(folder, "qwen3.5", 5, linear_num_key_heads=4, linear_conv_kernel_dim=2))
    made.append(specimens.random(folder, "llama", 6, "massive"))
    made.append(specimens.random(folder, "qwen3.5", 7, "massive"))
    return [*specimens.canaries(), *made]


# ---- running them


@dataclass
class Range:
    """References are loaded once; each target is loaded afresh, so that no case sees another's cache."""

    references: dict[tuple[str, str | None], TransformersBackend] = field(default_factory=dict)

    def reference(self, specimen: Specimen, quant: str | None = None) -> TransformersBackend:
        key = specimen.name, quant
        if key not in self.references:
            config = EngineConfig(dtype="float32", quant=quant)
            with specimens.quiet():
                kind = QuantisedReference if quant else TransformersBackend
                self.references[key] = kind(specimen.model_ref, config)
        return self.references[key]

    def shoot(self, case: Case) -> Outcome:
        """One case, from loading the target to the verdict."""
        began = time.monotonic()
        settings = VerifySettings(
            case.specimen.model_ref,
            dtype=case.dtype,
            quant=case.quant,
            seed=case.seed,
            continuation_tokens=8,
            long_tokens=96,
            measure_sensitivity=False,
        )
        limits = {"max_model_len": 512, "kv_cache_tokens": 8192, "max_num_seqs": 16}
        config = settings.target_config(**(limits | case.engine))
        target = NativeBackend(case.specimen.model_ref, config)
        planted = case.fault.apply(target, 1.0) if case.fault else contextlib.nullcontext()
        with planted, specimens.quiet():
            data = verify(self.reference(case.specimen, case.quant), target, settings).data
        failed = next((f for f in data["findings"] if f["status"] == "fail"), None)
        place, cause = data["localisation"] or {}, data["cause"] or {}
        return Outcome(
            case,
            data["verdict"],
            failed["check"] if failed else None,
            failed["summary"] if failed else "",
            place.get("module"),
            place.get("op"),
            cause.get("name"),
            cause.get("sentence", "") or "; ".join(data.get("notes", [])),
            cause.get("distance"),
            time.monotonic() - began,
        )

    def smallest_faults(self, specimen: Specimen, dtype: str) -> list[dict[str, Any]]:
        """What a proof of this model in this dtype would just have caught."""
        settings = VerifySettings(specimen.model_ref, dtype=dtype, skip_parity=True, measure_sensitivity=True)
        target = NativeBackend(specimen.model_ref, settings.target_config(max_model_len=512, kv_cache_tokens=8192))
        with specimens.quiet():
            return verify(self.reference(specimen), target, settings).data["sensitivity"]["faults"]


def run(progress: Progress | None = None, sample: bool = False, keep: Path | None = None) -> DrillResult:
    """All cases, or a sample: two faults of every class, and every dtype without a fault. What `keep` holds is done."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, specimens.quiet():
        models, gallery, record = models_in(Path(folder), sample), Range(), Record(keep)
        configs = {m.name: gallery.reference(m).model.config for m in models}
        planted = list(fault_cases(models, configs))
        if sample:
            planted = a_sample(planted)
        cases = [*planted, *(sound_cases(models, WAYS[:1], ()) if sample else sound_cases(models))]
        outcomes = []
        for i, case in enumerate(cases):
            if progress is not None:
                progress(case.key, i / len(cases))
            facts = record.get(case.key) or record.put(case.key, gallery.shoot(case).facts())
            outcomes.append(Outcome(case, **facts))
        smallest = {}
        for model in models if not sample else ():
            for dtype in ("float32", "bfloat16") if model.kind == "canary" else ():
                where = f"{model.name}, {dtype}"
                smallest[where] = record.get(where) or record.put(where, gallery.smallest_faults(model, dtype))
    return DrillResult(outcomes, time.monotonic() - began, smallest)


def main() -> int:
    """Command line: run, print the page, write it if asked to; 0 if the drill passed."""
    import argparse

    from surefoot.verify.drill_page import page

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, help="write the page here")
    parser.add_argument("--sample", action="store_true", help="a sample: two random models")
    parser.add_argument("--keep", type=Path, help="outcomes as they come; the same command goes on from them")
    args = parser.parse_args()
    torch.set_num_threads(2)
    result = run(lambda what, share: print(f"{share or 0:5.0%}  {what}", flush=True), args.sample, args.keep)
    text = page(result)
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    if args.keep:
        args.keep.unlink()
    return 0 if result.passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
