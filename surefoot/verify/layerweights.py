"""Weights of a model that is never in memory as a whole: layer by layer, row by row, from a checkpoint or a seed.

Names are those of transformers' model; a checkpoint of the multimodal container holds the same tensors under
`model.language_model.`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surefoot.core.errors import ModelError
from surefoot.weights.assign import place
from surefoot.weights.checkpoint import Checkpoint
from surefoot.weights.messages import some

BUFFER_BYTES = 4 << 20
BLOCK_BYTES = 32 << 20  # a slice of the head, in the dtype of the reference


class LayerWeights:
    """Tensors by transformers' names, read when asked for.

    sources: transformers' name -> name in the source.  shapes: as the model has them.
    """

    def __init__(self, sources: dict[str, str], shapes: dict[str, tuple[int, ...]], dtype: torch.dtype):
        self.sources, self._shapes, self.dtype = sources, shapes, dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in memory of its own."""
        raise NotImplementedError

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """Rows of a matrix: ids [...] -> [..., columns]."""
        return self.read(name)[ids]

    def row_blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows) of a matrix, block by block; a block is only good until the next one."""
        yield 0, self.read(name)

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Give a module's parameters their values; `prefix` is its path with a dot."""
        for name in [name for name, _ in module.named_parameters()]:
            place(module, name, self.read(prefix + name))

    @contextlib.contextmanager
    def resident(self, module: nn.Module, prefix: str) -> Iterator[None]:
        """Within the block the module has its weights."""
        empty = dict(module.named_parameters())
        self.fill(module, prefix)
        try:
            yield
        finally:
            for name, parameter in empty.items():
                place(module, name, parameter.data)


class CheckpointWeights(LayerWeights):
    """From the files of a model folder."""

    def __init__(self, checkpoint: Checkpoint, *args: Any):
        super().__init__(*args)
        self.checkpoint = checkpoint

    @cached_property
    def _buffer(self) -> torch.Tensor:
        return torch.empty(BUFFER_BYTES, dtype=torch.uint8)

    def read(self, name: str) -> torch.Tensor:
        out = torch.empty(self.shape(name), dtype=self.dtype)
        flat = out.view(-1)
        for begin, piece in self.checkpoint.chunks(self.sources[name], self._buffer):
            flat[begin : begin + piece.numel()].copy_(piece)
        return out

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        return self.checkpoint.load(self.sources[name])[ids].to(self.dtype)

    def row_blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        info = self.checkpoint.info(self.sources[name])
        columns = math.prod(info.shape[1:])
        count = max(1, BLOCK_BYTES // (columns * self.dtype.itemsize))
        buffer = torch.empty(count * columns * info.dtype.itemsize, dtype=torch.uint8)
        for begin, piece in self.checkpoint.chunks(self.sources[name], buffer):
            yield begin // columns, piece.view(-1, columns).to(self.dtype)


class RandomWeights(LayerWeights):
    """What `--random-weights SEED` draws."""

    def __init__(self, config: dict[str, Any], seed: int, *args: Any):
        from surefoot.models.registry import build

        super().__init__(*args)
        self.model, self.seed = build(config), seed

    def read(self, name: str) -> torch.Tensor:
        from surefoot.weights.random_init import draw

        out = torch.empty(self.shape(name), dtype=self.dtype)
        draw(self.model, self.sources[name], out, self.seed, torch.empty(BUFFER_BYTES // 4))
        return out


def open_weights(folder: Path, model: Any, dtype: torch.dtype, seed: int | None) -> LayerWeights:
    """The weights of transformers' `model` (built on the meta device); every parameter must have a source."""
    checkpoint = Checkpoint(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if seed is not None:
        from surefoot.models.registry import build

        known = dict(build(checkpoint.config).state_dict())
        sources = match(shapes, {n: tuple(t.shape) for n, t in known.items()}, tied_names(model), folder)
        return RandomWeights(checkpoint.config, seed, sources, shapes, dtype)
    sources = match(shapes, stored_shapes(checkpoint), tied_names(model), folder)
    return CheckpointWeights(checkpoint, sources, shapes, dtype)


def stored_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shapes of what a folder stores, quantised layers as if they had a plain weight."""
    found: dict[str, tuple[int, ...]] = {}
    for name, info in checkpoint.names().items():
        if name.endswith(".weight_packed"):
            path = name.removesuffix(".weight_packed")
            found[f"{path}.weight"] = tuple(checkpoint.load(path + ".weight_shape").tolist())
        elif not name.endswith((".weight_scale", ".weight_shape")):
            found[name] = info.shape
    return found


def tied_names(model: Any) -> dict[str, str]:
    """{parameter: the parameter whose tensor it shares}."""
    if not model.config.get_text_config().tie_word_embeddings:
        return {}
    embedding = model.get_input_embeddings()
    path = next(name for name, module in model.named_modules() if module is embedding)
    return {"lm_head.weight": f"{path}.weight"}


def match(
    wanted: dict[str, tuple[int, ...]], stored: dict[str, tuple[int, ...]], tied: dict[str, str], folder: Path
) -> dict[str, str]:
    """Where each of the model's tensors is stored, or a ModelError that lists what is absent."""
    sources, wrong = {}, []
    for name, shape in wanted.items():
        known_as = tied.get(name, name)
        names = [known_as, known_as.replace("model.", "model.language_model.", 1), name]
        found = next((n for n in names if n in stored), None)
        if found is None or stored[found] != shape:
            wrong.append(name if found is None else f"{name} (file {list(stored[found])}, model {list(shape)})")
        else:
            sources[name] = found
    if wrong:
        raise ModelError(f"the weights in {folder} do not fit the model; missing or misshapen: {some(wrong)}")
    return sources
