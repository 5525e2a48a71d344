"""What the files of this room hand to each other: settings, findings, places, causes, the verdict. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from surefoot.core.config import EngineConfig

Verdict = Literal["proven", "refuted", "undecided"]
Status = Literal["pass", "fail", "undecided", "not_possible", "not_reached"]
Progress = Callable[[str, "float | None"], None]  # (what is being done, fraction of it done or None)

# The checks in their order; after the first that fails the others are "not_reached".
CHECKS = ("template", "tokens", "weights", "config", "layers", "head", "logits", "sampler", "parity")


@dataclass(frozen=True)
class VerifySettings:
    """What to prove, and how hard.

    backend, device, dtype, ops, random_weights, num_threads, quant, ...: the target, as in `EngineConfig`.
    base: the model that a quantised folder was made from, for the cost of its scheme.
    url, url_model, api_key: an OpenAI-compatible server as the target instead.
    prompts: a file of prompts instead of the built-in set.  continuation_tokens: greedy tokens of the reference behind
    each prompt.  long_tokens: length of the mixed text that covers late positions.
    streamed_reference: fp32 layer by layer, for models whose fp32 weights exceed the memory.
    thorough: paths at all boundary lengths up to 2049 tokens, not only up to 129.
    measure_sensitivity: plant scaled faults after a proof, to say which it would have caught.
    noise_factor: how many times the expected error of its dtype a single module may be off.
    """

    model: str
    backend: str = "native"
    device: str = "cpu"
    dtype: str = "auto"
    ops: str = "auto"
    random_weights: int | None = None
    num_threads: int | None = None
    quant: str | None = None
    quant_group_size: int | None = None
    quant_lm_head: bool = False
    graph: str = "auto"
    base: str | None = None
    url: str | None = None
    url_model: str | None = None
    api_key: str | None = None
    prompts: Path | None = None
    streamed_reference: bool = False
    skip_parity: bool = False
    thorough: bool = False
    measure_sensitivity: bool = False
    continuation_tokens: int = 32
    long_tokens: int = 384
    seed: int = 0
    noise_factor: float = 4.0

    def target_config(self, **changes: Any) -> EngineConfig:
        """Engine settings of the target."""
        given: dict[str, Any] = {
            "device": self.device,
            "dtype": self.dtype,
            "ops": self.ops,
            "random_weights": self.random_weights,
            "num_threads": self.num_threads,
            "graph": self.graph,
            **self._quant(),
        }
        return EngineConfig(**(given | changes))

    def reference_config(self, **changes: Any) -> EngineConfig:
        """Engine settings of the reference: fp32 on the CPU."""
        given: dict[str, Any] = {"dtype": "float32", "random_weights": self.random_weights, **self._quant()}
        return EngineConfig(**(given | changes))

    def _quant(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("quant", "quant_group_size", "quant_lm_head")}


@dataclass
class Finding:
    """Outcome of one check. `details` can be written as JSON."""

    check: str
    status: Status
    summary: str
    details: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Localisation:
    """The first module whose own error (fed with the same input) exceeds its budget.

    module: HF path, e.g. "model.layers.3.self_attn".  op: the faulty op inside it, where a replay names one.
    table: per module, in order: path, own error, accumulated error, budget.
    """

    module: str
    op: str | None
    own_error: float
    budget: float
    table: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Cause:
    """The mistake that, made in the reference, gives the target's output.

    name: id in the catalogue.  distance: what remains between the two, in units of the noise.
    """

    name: str
    sentence: str
    distance: float
    runner_up: str | None = None
    runner_up_distance: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
