"""The sides of a comparison, as the settings say: reference, expected, target; and for a quantised target the base.

reference   fp32; of a quantised target with the quantised weights and activations (`quantised`)
expected    the reference in the target's dtype
base        the model as it was before it was quantised, fp32: what the scheme's cost is counted from
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surefoot.backends import Backend, open_backend
from surefoot.backends.transformers import TransformersBackend
from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError, ModelError
from surefoot.quant.compressed_tensors import parse
from surefoot.verify.layerweights import LayerWeights, open_weights
from surefoot.verify.quantised import QuantisedWeights, quant_info, quantise
from surefoot.verify.shapes import VerifySettings
from surefoot.verify.streamed import StreamedReference, skeleton
from surefoot.weights.assign import place
from surefoot.weights.checkpoint import Checkpoint
from surefoot.weights.hub import resolve


class QuantisedReference(TransformersBackend):
    """transformers' model with the quantised weights, whole in memory. weights: where they came from."""

    name = "transformers, quantised"

    def __init__(self, model_ref: str, config: EngineConfig, drawn: torch.dtype = torch.float32):
        folder = resolve(model_ref)
        model = skeleton(str(folder), getattr(torch, config.dtype))
        plain = open_weights(folder, model, getattr(torch, config.dtype), config.random_weights)
        self.weights = quantise(plain, Checkpoint(folder), config, drawn)
        super().__init__(model_ref, config, filled(model, self.weights))

    def info(self) -> dict[str, Any]:
        return super().info() | {"quant": quant_info(self.weights)}


def filled(model: Any, weights: LayerWeights) -> nn.Module:
    """A model on the meta device with its weights, and with the tables that it computes itself."""
    if isinstance(weights, QuantisedWeights):
        weights.adopt(model)
    tied = model.config.get_text_config().tie_word_embeddings and type(model.lm_head) is nn.Linear
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        if not (tied and name == "lm_head.weight"):
            place(model, name, weights.read(name))
    if tied:
        model.lm_head.weight = model.get_input_embeddings().weight
    for path, module in list(model.named_modules()):
        if path.endswith("rotary_emb"):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, type(module)(config=module.config))
    left = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if left:
        raise ModelError(
            f"{type(model).__name__} cannot be filled with quantised weights: {', '.join(left[:3])} is open"
        )
    return model.eval().requires_grad_(False)


def quantised_folder(model_ref: str | Path) -> bool:
    return parse(Checkpoint(resolve(str(model_ref))).config) is not None


def is_quantised(settings: VerifySettings) -> bool:
    return settings.quant is not None or quantised_folder(settings.model)


def open_reference(settings: VerifySettings, drawn: torch.dtype = torch.float32) -> Backend:
    """fp32, on the CPU. drawn: dtype that the target draws random weights in, before they are quantised."""
    return expected_backend(settings, torch.float32, drawn)


def expected_backend(settings: VerifySettings, dtype: torch.dtype, drawn: torch.dtype | None = None) -> Backend:
    """The reference computed in a dtype: what the dtype costs."""
    config = settings.reference_config(dtype=str(dtype).removeprefix("torch."))
    if settings.streamed_reference:
        return StreamedReference(settings.model, dtype, config=config, drawn=drawn or dtype)
    if is_quantised(settings):
        return QuantisedReference(settings.model, config, drawn or dtype)
    return open_backend("transformers", settings.model, config)


def base_of(settings: VerifySettings) -> VerifySettings | None:
    """Settings of the model as it was before it was quantised; None where that is not at hand."""
    if not is_quantised(settings) or settings.base is None and quantised_folder(settings.model):
        return None
    model = settings.base or settings.model
    if quantised_folder(model):
        raise InputError(f"--base {model} is quantised itself: give the model that {settings.model} was made from")
    return replace(settings, model=model, quant=None, quant_group_size=None, quant_lm_head=False)


def open_target(settings: VerifySettings) -> Backend:
    if settings.backend == "transformers" and is_quantised(settings):
        raise InputError("the transformers backend runs no quantised model here: use the native one")
    return open_backend(settings.backend, settings.model, settings.target_config())
