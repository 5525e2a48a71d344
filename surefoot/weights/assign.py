"""Put real tensors into a model that was built on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from surefoot.weights.mapped import MappedFiles
from surefoot.weights.moving import Piece

Progress = Callable[[str, "float | None"], None]  # (what is being done, fraction of it done or None)


@dataclass
class LoadReport:
    """What was loaded. bytes: as held by the model, tied tensors once; ignored: tensors left out, by pattern.

    mapped: what was left in its file; unmoved: what of that is to be moved into memory.
    """

    used: int = 0
    bytes: int = 0
    seconds: float = 0.0
    ignored: dict[str, int] = field(default_factory=dict)
    mapped: MappedFiles = field(default_factory=MappedFiles)
    unmoved: list[Piece] = field(default_factory=list)


class Converter(Protocol):
    """Holds some weights in another form than the checkpoint does (quantised), without ever holding them whole."""

    def takes(self, name: str) -> bool:
        """Whether this model tensor is converted."""
        ...

    def convert(
        self, name: str, layer: nn.Module, pieces: Iterable[torch.Tensor], device: torch.device | str
    ) -> nn.Module:
        """The module that takes `layer`'s place, from consecutive rows of its weight. May run on any thread."""
        ...

    def place(self, model: nn.Module, name: str, layer: nn.Module) -> None:
        """Put it there."""
        ...


CONVERT_BYTES = 256 << 10  # rows handed to a converter at a time: with its scratch they fit a core's cache


def tensor_slots(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name: what a checkpoint of this model consists of."""
    return model.state_dict(keep_vars=True)


def held_dtype(
    model: Any, name: str, slot: torch.Tensor, default: torch.dtype, stored: torch.dtype | None = None
) -> torch.dtype:
    """The dtype in which the model wants this tensor; a module may decide it itself by `held_dtype`."""
    if not slot.is_floating_point():
        return slot.dtype
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if stored is not None and hasattr(module, "held_dtype"):
        return module.held_dtype(leaf, stored, default)
    return model.param_dtype(name, default)


def place(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a real tensor where the model has one on the meta device."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(module, leaf, tensor)


def place_converted(model: Any, converter: Converter, name: str, layer: nn.Module) -> int:
    """Bytes of the weight in its new form. A tied weight that was converted has a tensor of its own from now on."""
    converter.place(model, name, layer)
    model.tied.pop(name, None)
    return sum(p.nbytes for key, p in layer.named_parameters() if key != "bias")


def tie(model: Any) -> None:
    """Let each tied module hold the very Parameter that it is tied to."""
    for alias, name in model.tied.items():
        path, _, leaf = alias.rpartition(".")
        setattr(model.get_submodule(path), leaf, model.get_parameter(name))
