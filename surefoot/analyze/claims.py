"""Published or measured performance claims as data: one JSON file per page, see docs/estimate.md for the form.

Numbers may be given as a range [low, high]; both ends are claims. Nothing is required but `format`: what is not stated
is not checked. Units are in the names: seconds, bytes, tokens. `Facts` is what follows from a model's config.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from surefoot.core.errors import InputError
from surefoot.device.chips import Chip, lookup

FORMAT = "surefoot-claims-1"
EXAMPLES = Path(__file__).with_name("claims")


@dataclass(frozen=True)
class Range:
    """A stated number: low == high unless the page gives a range."""

    low: float
    high: float


@dataclass(frozen=True)
class Model:
    """name: what the page calls it.  config: HF config.json, or `parameters` where the shape is not known.
    template_family: a key of `audit.TEMPLATES`, where the name does not show it."""

    name: str
    dtype: str = "bfloat16"
    config: dict[str, Any] | None = None
    parameters: float | None = None
    template_family: str | None = None


@dataclass(frozen=True)
class Row:
    """One line of a table. request_s: seconds that one request takes; seconds: that the whole batch takes."""

    id: str
    model: str | None = None
    dtype: str | None = None
    batch: int | None = None
    devices: int = 1
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    output_characters: int | None = None
    seconds: Range | None = None
    request_s: Range | None = None
    tokens_per_s: Range | None = None
    requests_per_s: Range | None = None
    ttft_s: Range | None = None
    tpot_s: Range | None = None
    prefill_s: Range | None = None
    decode_step_s: Range | None = None


@dataclass(frozen=True)
class Memory:
    """What a page says about memory."""

    model: str | None = None
    dtype: str | None = None
    weight_bytes: float | None = None
    cache_bytes: float | None = None
    cache_tokens: int | None = None
    requests: int | None = None
    tokens_per_request: int | None = None
    total_bytes: float | None = None


@dataclass(frozen=True)
class Prompt:
    """Text around the user's words, as the page shows it."""

    model: str
    template: str


@dataclass(frozen=True)
class Comparison:
    """Rows that the page sets side by side, by `metric` (a field of `Row`)."""

    rows: tuple[str, ...]
    metric: str = "seconds"


@dataclass(frozen=True)
class Claims:
    title: str
    source: str = ""
    note: str = ""
    chip: Chip | None = None
    chip_name: str = ""
    models: dict[str, Model] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()
    memory: tuple[Memory, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    _facts: dict[tuple[str, str], Facts] = field(default_factory=dict, repr=False, compare=False)

    def facts(self, row: Row | Memory) -> Facts | None:
        """What the row's model needs, in the row's dtype; None if the page does not say which model it is."""
        name = row.model or (next(iter(self.models)) if len(self.models) == 1 else None)
        if name is None:
            return None
        model = self.models[name]
        if not model.config and not model.parameters:
            return None
        dtype = row.dtype or model.dtype
        return self._facts.setdefault((name, dtype), Facts(model, dtype))

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.id == name)


BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "w8a8": 1.0, "w8a16": 1.0, "w4a16": 0.5, "w4a8": 0.5}


@dataclass(frozen=True)
class Facts:
    """Least work of a model in a dtype, by the ops' own costs where there is a config, else by its parameters.

    NOTE: quantised models are taken with a quantised output layer, which favours the claim.
    """

    model: Model
    dtype: str

    @property
    def activations(self) -> str:
        return self.dtype if self.dtype.startswith(("float", "bfloat")) else "float16"

    @cached_property
    def _sketch(self):
        import torch

        from surefoot.analyze.estimate import sketch
        from surefoot.quant.schemes import SCHEMES, scheme

        quant = scheme(self.dtype) if self.dtype in SCHEMES else None
        return sketch(self.model.config or {}, getattr(torch, self.activations), quant, lm_head=quant is not None)

    def _step(self, batch: int, context: int):
        from surefoot.analyze.roofline import decode_step, step_cost

        return step_cost(self._sketch.model, decode_step(batch, max(1, context)), self._sketch.dtype)

    def step_bytes(self, batch: int, context: int) -> float:
        """Bytes that a decode step must move: weights once, and `context` tokens of cache for each request."""
        if self.model.config:
            return self._step(batch, context).total(lambda call: call.must_move)
        return (self.model.parameters or 0.0) * BYTES[self.dtype]

    @cached_property
    def token_flops(self) -> float:
        """FLOPs of one new token with an empty cache: less is not possible."""
        if self.model.config:
            return self._step(1, 1).total(lambda call: call.flops)
        return 2 * (self.model.parameters or 0.0)

    @cached_property
    def layer_flops(self) -> float:
        """The same without the output layer; at least half of all where the shape is not known."""
        if self.model.config:
            return self._step(1, 1).total(lambda call: call.flops) - 2.0 * self._head
        return self.model.parameters or 0.0

    @property
    def _head(self) -> int:
        return self._sketch.model.vocab_size * self._sketch.model.hidden_size

    @cached_property
    def weight_bytes(self) -> float:
        if self.model.config:
            return float(self._sketch.weight_bytes)
        return (self.model.parameters or 0.0) * BYTES[self.dtype]

    @cached_property
    def kv_bytes_per_token(self) -> float | None:
        if not self.model.config:
            return None
        from surefoot.cache.plan import kv_bytes_per_token

        return float(sum(kv_bytes_per_token(s, self._sketch.dtype.itemsize) for s in self._sketch.model.state_specs()))


def examples() -> dict[str, Path]:
    """The shipped pages by name."""
    return {path.stem: path for path in sorted(EXAMPLES.glob("*.json"))}


def read(path: Path) -> Claims:
    """The claims of a file, or of a shipped example by its name."""
    path = examples().get(str(path), path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no such file: {path} (shipped examples: {', '.join(examples())})") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    return parse(data, str(path))


def parse(data: Any, where: str) -> Claims:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InputError(f'{where}: must be a JSON object with "format": "{FORMAT}" (docs/estimate.md has the form)')
    try:
        models = {key: _build(Model, value, f"models.{key}") for key, value in data.get("models", {}).items()}
        chip, chip_name = _chip(data.get("chip"))
        claims = Claims(
            title=str(data.get("title", where)),
            source=str(data.get("source", "")),
            note=str(data.get("note", "")),
            chip=chip,
            chip_name=chip_name,
            models=models,
            rows=_list(Row, data, "rows"),
            memory=_list(Memory, data, "memory"),
            prompts=_list(Prompt, data, "prompts"),
            comparisons=_list(Comparison, data, "comparisons"),
        )
        _check_names(claims)
    except (InputError, AttributeError, TypeError) as error:
        raise InputError(f"{where}: {error}") from None
    return claims


def _list(cls: type, data: dict[str, Any], key: str) -> tuple:
    given = data.get(key, [])
    if not isinstance(given, list):
        raise InputError(f"{key} must be a list")
    return tuple(_build(cls, value, f"{key}[{i}]") for i, value in enumerate(given))


def _build(cls: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise InputError(f"{where} must be an object")
    known = {f.name: str(f.type) for f in fields(cls)}
    if unknown := sorted(data.keys() - known.keys()):
        raise InputError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(known)}")
    given = {key: _value(value, known[key], f"{where}.{key}") for key, value in data.items() if value is not None}
    if cls is Row:
        given.setdefault("id", where)
    return cls(**given)


def _value(value: Any, kind: str, where: str) -> Any:
    if kind.startswith("Range"):
        low, high = value if isinstance(value, list) and len(value) == 2 else (value, value)
        return Range(_positive(low, where), _positive(high, where))
    if kind.startswith("int"):
        return int(_positive(value, where))
    if kind.startswith("float"):
        return _positive(value, where)
    if kind.startswith("tuple"):
        return tuple(value)
    if where.endswith(".dtype") and value not in BYTES:
        raise InputError(f"{where}: unknown dtype {value!r}; known are {', '.join(BYTES)}")
    return value


def _positive(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise InputError(f"{where} must be a positive number or a range of two, got {value!r}")
    return float(value)


def _chip(said: Any) -> tuple[Chip | None, str]:
    """A name of the table, or an object with a name and what the page says; missing numbers come from the table."""
    if said is None:
        return None, ""
    if isinstance(said, str):
        return lookup(said), said
    known = lookup(str(said.get("like") or said.get("name")))
    peaks = dict(known.peak_flops if known else {}) | dict(said.get("peak_flops", {}))
    bandwidth = said.get("memory_bandwidth", known.memory_bandwidth if known else None)
    memory = said.get("memory", known.memory if known else None)
    name = str(said.get("name", "the chip"))
    return Chip(name, "claimed", peak_flops=peaks, memory_bandwidth=bandwidth, memory=memory, source="stated"), name


def _check_names(claims: Claims) -> None:
    ids = [row.id for row in claims.rows]
    if len(set(ids)) < len(ids):
        raise InputError(f"two rows have the id {next(i for i in ids if ids.count(i) > 1)!r}")
    things: tuple[Row | Memory | Prompt, ...] = (*claims.rows, *claims.memory, *claims.prompts)
    for thing in things:
        if thing.model is not None and thing.model not in claims.models:
            raise InputError(f"there is no model {thing.model!r} among {', '.join(claims.models) or 'no models'}")
    metrics = {f.name for f in fields(Row) if "Range" in str(f.type)}
    for comparison in claims.comparisons:
        if missing := [name for name in comparison.rows if name not in ids]:
            raise InputError(f"a comparison names the row {missing[0]!r}, which is not there")
        if comparison.metric not in metrics:
            raise InputError(f"comparisons go by one of {', '.join(sorted(metrics))}, not {comparison.metric!r}")
