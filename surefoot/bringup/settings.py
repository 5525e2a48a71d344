"""What a bring-up was asked for, and the sizes that it measures. They stand in the manifest for a resumed run.

The quick sizes suit tiny models and a first look (a canary takes about two minutes on two cores); the others suit
models whose steps take tens of milliseconds.
"""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError

LANGUAGES = ("en", "zh", "both")
ENGINE_FIELDS = (
    "device", "dtype", "ops", "quant", "quant_group_size", "quant_lm_head", "graph", "random_weights", "num_threads"
)  # fmt: skip
LISTS = ("batch", "prompt_lens", "output_lens", "concurrency")


@dataclass(frozen=True)
class BringupSettings:
    """batch x prompt_lens x output_lens is measured in process; concurrency through a server of the same engine.

    requests: measured per concurrency; None takes four times the concurrency, at least 32.  sample_tokens: of each
    sample answer.  sensitivity: plant scaled faults after the proof, to say which it would have caught.
    """

    model: str
    device: str = "cpu"
    dtype: str = "auto"
    ops: str = "auto"
    quant: str | None = None
    quant_group_size: int | None = None
    quant_lm_head: bool = False
    graph: str = "auto"
    random_weights: int | None = None
    num_threads: int | None = None
    lang: str = "both"
    quick: bool = False
    batch: tuple[int, ...] = (1, 2, 4, 8)
    prompt_lens: tuple[int, ...] = (16, 64, 256, 1024)
    output_lens: tuple[int, ...] = (10, 20, 50, 100)
    repeats: int = 6
    concurrency: tuple[int, ...] = (1, 4, 16)
    requests: int | None = None
    calibration_repeats: int = 5
    sample_tokens: int = 64
    sensitivity: bool = True

    def __post_init__(self) -> None:
        if self.lang not in LANGUAGES:
            raise InputError(f"unknown --lang {self.lang!r}: choose one of {', '.join(LANGUAGES)}")
        for name in LISTS:
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise InputError(f"impossible sweep: {name.replace('_', ' ')} must be positive numbers")
        self.engine()  # refuses what the engine would refuse

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BringupSettings:
        known = {f.name for f in fields(cls)}
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in known}
        return cls(**given)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def engine(self, **changes: Any) -> EngineConfig:
        return EngineConfig(**({name: getattr(self, name) for name in ENGINE_FIELDS} | changes))

    def flags(self) -> list[str]:
        """The engine's part of a command line that repeats one stage."""
        words: list[str] = []
        for name in ENGINE_FIELDS:
            value, flag = getattr(self, name), "--" + name.replace("num_", "").replace("_", "-")
            if value is True:
                words.append(flag)
            elif value is not False and value not in ("auto", None):
                words += [flag, str(value)]
        return words

    @property
    def languages(self) -> tuple[str, ...]:
        return ("en", "zh") if self.lang == "both" else (self.lang,)


QUICK: dict[str, Any] = {
    "quick": True,
    "prompt_lens": (16, 128),
    "output_lens": (10, 50),
    "concurrency": (1, 4, 16),
    "requests": 40,
    "calibration_repeats": 2,
}


def fitted(settings: BringupSettings, longest: int | None) -> BringupSettings:
    """Without the prompt and output lengths that the model cannot take together."""
    if longest is None:
        return settings
    outputs = tuple(n for n in settings.output_lens if n < longest) or (1,)
    prompts = tuple(n for n in settings.prompt_lens if n + max(outputs) <= longest)
    return replace(settings, prompt_lens=prompts or (max(1, longest - max(outputs)),), output_lens=outputs)


def folder_name(settings: BringupSettings, dtype: str) -> str:
    """MODEL-DEVICE-DTYPE-TIME, without characters that a file system or a shell minds."""
    path = Path(settings.model)
    model = path.resolve().name if path.is_dir() else re.split(r"[/:]", settings.model)[-1]
    parts = (model, settings.device.replace(":", ""), dtype, time.strftime("%Y%m%d-%H%M%S"))
    return "-".join(re.sub(r"[^A-Za-z0-9._-]+", "_", part) for part in parts)
