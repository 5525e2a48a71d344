"""Put real tensors into a model that was built on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Progress = Callable[[str, "float | None"], None]  # (what is being done, fraction of it done or None)


@dataclass
class LoadReport:
    """What was loaded. bytes: as held by the model, tied tensors once; ignored: tensors left out, by pattern."""

    used: int = 0
    bytes: int = 0
    seconds: float = 0.0
    ignored: dict[str, int] = field(default_factory=dict)


def tensor_slots(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name: what a checkpoint of this model consists of."""
    return model.state_dict(keep_vars=True)


def held_dtype(model: Any, name: str, slot: torch.Tensor, default: torch.dtype) -> torch.dtype:
    return model.param_dtype(name, default) if slot.is_floating_point() else slot.dtype


def place(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a real tensor where the model has one on the meta device."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(module, leaf, tensor)


def tie(model: Any) -> None:
    """Let each tied module hold the very Parameter that it is tied to."""
    for alias, name in model.tied.items():
        path, _, leaf = alias.rpartition(".")
        setattr(model.get_submodule(path), leaf, model.get_parameter(name))
