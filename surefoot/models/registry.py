"""From a config.json to a model on the meta device. Architectures are known by HF's class names."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

from surefoot.core.errors import ModelError
from surefoot.layers.quant_linear import adopt_folder
from surefoot.quant.compressed_tensors import parse

if TYPE_CHECKING:
    from surefoot.models.base import CausalLM

ARCHITECTURES = {
    "LlamaForCausalLM": "surefoot.models.llama",
    "Qwen3_5ForCausalLM": "surefoot.models.qwen3_5",
    "Qwen3_5ForConditionalGeneration": "surefoot.models.qwen3_5",
}
# For configs that name no architecture.
MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
}


def architecture_of(config: dict[str, Any]) -> str:
    """The architecture that a config asks for, or a ModelError that names the known ones."""
    names = config.get("architectures") or [MODEL_TYPES.get(config.get("model_type", ""), "")]
    for name in names:
        if name in ARCHITECTURES:
            return name
    said = names[0] or f"model_type {config.get('model_type')!r}"
    raise ModelError(f"unknown architecture {said}; Surefoot's own engine knows {', '.join(ARCHITECTURES)}")


def build(config: dict[str, Any]) -> CausalLM:
    """The model for this HF config, without memory for its parameters (meta device).

    Layers that the config calls quantised want the tensors of a quantised folder.
    """
    name = architecture_of(config)
    folder = parse(config)
    cls = getattr(importlib.import_module(ARCHITECTURES[name]), name)
    with torch.device("meta"):
        model = cls(config)
    if folder is not None:
        adopt_folder(model, folder, model.tied)
    return model
