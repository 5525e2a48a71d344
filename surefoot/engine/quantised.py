"""What loading has to know about quantised weights: what to quantise on the way in, and what to say about it."""

from __future__ import annotations

from typing import Any

from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError
from surefoot.layers import quant_linear
from surefoot.layers.quant_linear import QuantiseOnLoad
from surefoot.models.base import CausalLM
from surefoot.quant.schemes import Scheme, scheme
from surefoot.quant.select import in_effect, select


def scheme_of(config: EngineConfig) -> Scheme | None:
    """The scheme to quantise by on load, if that was asked for."""
    return scheme(config.quant, config.quant_group_size) if config.quant else None


def on_load(model: CausalLM, wanted: Scheme | None, lm_head: bool) -> QuantiseOnLoad | None:
    """What quantises the weights while they stream in."""
    if wanted is None:
        return None
    if quant_linear.quantised(model):
        raise InputError(f"the folder is quantised already, so it cannot be quantised by {wanted.name}: leave that out")
    return QuantiseOnLoad(select(quant_linear.shapes(model), wanted, model.quant_exclude, lm_head))


def describe(model: CausalLM, converter: QuantiseOnLoad | None) -> dict[str, Any]:
    """For `EngineInfo.quant`; empty for a model in full precision."""
    schemes = [layer.scheme for layer in quant_linear.quantised(model).values()]
    if not schemes:
        return {}
    if converter is not None:
        return in_effect(schemes, converter.selection.excluded, "on load")
    return in_effect(schemes, dict.fromkeys(quant_linear.shapes(model), ""), "folder")


def count_parameters(model: CausalLM) -> int:
    """Weights of the model, each once however it is stored; scales of quantised layers do not count."""
    layers = quant_linear.quantised(model)
    inside = {
        f"{name}.{leaf}" for name, layer in layers.items() for leaf, _ in layer.named_parameters() if leaf != "bias"
    }
    plain = sum(p.numel() for name, p in model.named_parameters() if name not in inside)
    return plain + sum(layer.in_features * layer.out_features for layer in layers.values())
