"""The `quantization_config` of the `compressed-tensors` format: what of it Surefoot reads, and what it writes.

A folder says, group by group, which modules ("targets", less "ignore") hold which kind of weight. Read are symmetric
int8 per output channel and symmetric int4 in groups or per channel, with or without int8 activations per token; stored
as they are ("int-quantized") or packed into int32 ("pack-quantized"). All else is refused by one line that names it.

    parse(config)           # None, or a QuantisedFolder
    folder.layout("model.layers.0.mlp.up_proj")    # Layout(scheme, packed), None if the module is not quantised
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from surefoot.core.errors import ModelError
from surefoot.quant.schemes import SCHEMES, Scheme

METHOD = "compressed-tensors"
PLAIN, PACKED = "int-quantized", "pack-quantized"
STORED_AS = {PLAIN: PLAIN, "naive-quantized": PLAIN, PACKED: PACKED}  # the second is PLAIN's older name
# NOTE: older tools stored integers and left the status of the model in memory, "frozen"; the tensors' dtypes decide.
STATUSES = ("compressed", "frozen")
HINT = "use a symmetric W8A8, W8A16 or W4A16 version, or the unquantised model with --quant"


@dataclass(frozen=True)
class Layout:
    """How one module's weight is stored. scheme.group_size None with 4 bits: one scale per output channel."""

    scheme: Scheme
    packed: bool


@dataclass(frozen=True)
class QuantisedFolder:
    """The groups of a folder, (targets, layout) each, and the modules that no group touches."""

    groups: tuple[tuple[tuple[str, ...], Layout], ...]
    ignore: tuple[str, ...]

    def layout(self, name: str, kind: str = "Linear") -> Layout | None:
        """How the module at this path, of this class, is stored. A path goes before a regex, that before a class."""
        if any(_matches(pattern, name, kind) for pattern in self.ignore):
            return None
        ranked = [(_rank(target), i) for i, (targets, _) in enumerate(self.groups) for target in targets
                  if _matches(target, name, kind)]  # fmt: skip
        return self.groups[min(ranked)[1]][1] if ranked else None


def _matches(pattern: str, name: str, kind: str) -> bool:
    return re.match(pattern[3:], name) is not None if pattern.startswith("re:") else pattern in (name, kind)


def _rank(target: str) -> int:
    return 1 if target.startswith("re:") else 0 if "." in target else 2


def parse(config: dict[str, Any]) -> QuantisedFolder | None:
    """Read config.json's `quantization_config`; None if there is none."""
    found = _find(config)
    if not found:
        return None
    if not isinstance(found, dict) or found.get("quant_method") != METHOD:
        method = found.get("quant_method", "?") if isinstance(found, dict) else found
        raise ModelError(f"quantised by {method!r}, which is not supported: only {METHOD!r} is; {HINT}")
    _refuse_extras(found)
    groups = found.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ModelError("quantization_config: config_groups is missing or empty: get config.json again")
    ignore = _strings(found.get("ignore") or [], "ignore")
    return QuantisedFolder(tuple(_group(f"config_groups.{key}", g, found) for key, g in groups.items()), ignore)


def _find(config: dict[str, Any]) -> Any:
    for place in (config, config.get("text_config")):
        if isinstance(place, dict):
            for key in ("quantization_config", "compression_config"):
                if place.get(key):
                    return place[key]
    return None


def _refuse(field: str, value: Any, allowed: str) -> ModelError:
    shown = "{...}" if isinstance(value, dict) else _json(value)
    return ModelError(f"quantization_config: {field} {shown} is not supported, only {allowed}; {HINT}")


def _json(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _refuse_extras(found: dict[str, Any]) -> None:
    status = found.get("quantization_status", "compressed")
    if status not in STATUSES:
        raise _refuse("quantization_status", status, " and ".join(map(repr, STATUSES)))
    if found.get("kv_cache_scheme"):
        raise _refuse("kv_cache_scheme", found["kv_cache_scheme"], "null")
    sparsity = (found.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise _refuse("sparsity_config.format", sparsity, "'dense'")
    if (found.get("transform_config") or {}).get("config_groups"):
        raise _refuse("transform_config", found["transform_config"], "an empty one")


def _strings(value: Any, field: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ModelError(f"quantization_config: {field} must be a list of strings: get config.json again")
    for pattern in value:
        try:
            re.compile(pattern[3:] if pattern.startswith("re:") else "")
        except re.error as error:
            raise ModelError(f"quantization_config: {field}: {pattern!r} is no regular expression: {error}") from None
    return tuple(value)


def _group(where: str, group: Any, found: dict[str, Any]) -> tuple[tuple[str, ...], Layout]:
    if not isinstance(group, dict):
        raise ModelError(f"quantization_config: {where} is no object: get config.json again")
    if not isinstance(group.get("weights"), dict):
        raise _refuse(f"{where}.weights", group.get("weights"), "an object that describes weights")
    targets = _strings(group.get("targets") or [], f"{where}.targets")
    weights, act = group["weights"], group.get("input_activations")
    weights = weights | {"actorder": weights.get("actorder") or None}  # false means none
    if group.get("output_activations"):
        raise _refuse(f"{where}.output_activations", group["output_activations"], "null")
    given = group.get("format") or found.get("format")
    layout_format = STORED_AS.get(str(given))
    if layout_format is None:
        raise _refuse(f"{where}.format", given, f"{PLAIN!r} and {PACKED!r}")
    bits = weights.get("num_bits")
    _expect(f"{where}.weights", weights, type=("int",), num_bits=(4, 8), symmetric=(True,), dynamic=(False,))
    _expect(f"{where}.weights", weights, actorder=(None, "weight", "static"))
    if bits == 4 and layout_format != PACKED:
        raise _refuse(f"{where}.format", given, f"{PACKED!r} for 4 bits")
    scheme = _int4(where, weights, act) if bits == 4 else _int8(where, weights, act)
    return targets, Layout(scheme, layout_format == PACKED)


# What a missing field means in compressed-tensors.
_DEFAULTS = {"type": "int", "num_bits": 8, "symmetric": True, "dynamic": False, "actorder": None}


def _expect(where: str, given: dict[str, Any], **allowed: tuple) -> None:
    for field, values in allowed.items():
        value = given.get(field, _DEFAULTS.get(field))
        # NOTE: 1 == True and 0 == False in Python; a JSON file that says 1 for true is not worth a special case.
        if value not in values:
            raise _refuse(f"{where}.{field}", value, " or ".join(_json(v) for v in values))


def _strategy(weights: dict[str, Any]) -> str:
    """As compressed-tensors infers it where it is not said."""
    if weights.get("strategy"):
        return weights["strategy"]
    size = weights.get("group_size")
    return "tensor" if size is None else "channel" if size == -1 else "group"


def _int8(where: str, weights: dict[str, Any], act: Any) -> Scheme:
    strategy = _strategy(weights)
    if strategy != "channel":
        raise _refuse(f"{where}.weights.strategy", strategy, "'channel' for 8 bits")
    if not act:
        return SCHEMES["w8a16"]
    _expect_token_int8(where, act)
    return SCHEMES["w8a8"]


def _expect_token_int8(where: str, act: dict[str, Any]) -> None:
    _expect(f"{where}.input_activations", act, type=("int",), num_bits=(8,), symmetric=(True,), dynamic=(True,))
    if act.get("strategy") != "token":
        raise _refuse(f"{where}.input_activations.strategy", act.get("strategy"), "'token'")


def _int4(where: str, weights: dict[str, Any], act: Any) -> Scheme:
    base = SCHEMES["w4a16"]
    if act:
        _expect_token_int8(where, act)
        base = SCHEMES["w4a8"]
    strategy, size = _strategy(weights), weights.get("group_size")
    if strategy == "channel":
        return replace(base, group_size=None)
    if strategy != "group":
        raise _refuse(f"{where}.weights.strategy", strategy, "'group' and 'channel' for 4 bits")
    if type(size) is not int or size < 8 or size % 8:
        raise _refuse(f"{where}.weights.group_size", size, "a positive multiple of 8")
    return replace(base, group_size=size)


def config_for(scheme: Scheme, ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` of a folder whose Linear modules, less `ignore`, are stored by `scheme`.

    NOTE: weight-only int8 is packed into int32, because vLLM reads it only in that form; the library reads both.
    """
    layout_format = format_of(scheme)
    weights = _arguments(scheme.bits, "group" if scheme.group_size else "channel", scheme.group_size, dynamic=False)
    act = _arguments(8, "token", None, dynamic=True) if scheme.act == "int8" else None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": act, "output_activations": None}
    return {
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "format": layout_format,
        "config_groups": {"group_0": group | {"format": layout_format}},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


def format_of(scheme: Scheme) -> str:
    return PLAIN if scheme.bits == 8 and scheme.act == "int8" else PACKED


def _arguments(bits: int, strategy: str, group_size: int | None, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": dynamic,
        "actorder": None,
        "block_structure": None,
        "observer": None if dynamic else "minmax",
        "observer_kwargs": {},
    }
