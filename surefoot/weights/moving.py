"""Weights that an engine begins to use where they lie in their mapped files, moved into memory of their own afterwards.

Fresh memory for all weights can take longer than everything else in loading (in a virtual machine that gives free pages
back to its host: a second for a gigabyte), and the first token needs none of it. What it buys, pages of 2 MiB and
integer weights in panels (`QuantLinear`), pays over many steps; so it comes with them, piece by piece. Where the
weights lie changes no result, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from surefoot.device import hugepages

PIECE_BYTES = 64 << 20  # moved between two steps
MIN_BYTES = 256 << 10  # of a tensor, and
LEAST = 64 << 20  # of all together: less is soon read


@dataclass
class Piece:
    """Parameters of some modules that still lie in a file."""

    slots: list[tuple[Any, str]]
    nbytes: int

    def move(self) -> None:
        """Again is harmless, whenever the first time was interrupted."""
        for module, leaf in self.slots:
            parameter = module._parameters.get(leaf)
            if parameter is not None:  # as it was read; `finalize` may have put another in its place
                fresh = hugepages.empty(parameter.shape, parameter.dtype)
                parameter.data = fresh.copy_(parameter.data)
        for module in dict.fromkeys(module for module, _ in self.slots):
            if hasattr(module, "in_file"):
                module.in_file = False
                module.finalize()


def hold_back(model: nn.Module, names: Iterable[str]) -> list[Piece]:
    """The pieces in which these parameters are to be moved, in the model's order; call it before `finalize`."""
    wanted = set(names)
    pieces: list[Piece] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in wanted:
            continue
        path, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(path)
        if hasattr(module, "in_file"):
            module.in_file = True
        if not pieces or module is not pieces[-1].slots[-1][0] and pieces[-1].nbytes + parameter.nbytes > PIECE_BYTES:
            pieces.append(Piece([], 0))
        pieces[-1].slots.append((module, leaf))
        pieces[-1].nbytes += parameter.nbytes
    return pieces
