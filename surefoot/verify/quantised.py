"""The reference of a quantised target: transformers' modules with the weights that the scheme leaves of the model's.

Integers and scales are made here from the checkpoint (`quant.schemes`), or read from a compressed-tensors folder,
without the engine's loader. Each quantised layer is a `QuantisedLinear`: weights are fp32 products of integer and scale
in whatever dtype the model runs, and w8a8 rounds activations token by token. So what such a reference gives is the
expected result of the scheme, and the target is held to it as tightly as an unquantised one to its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError
from surefoot.layers.quant_linear import QuantLinear, shapes
from surefoot.models.registry import build
from surefoot.ops.quant import quantise_tokens, unpack_int4
from surefoot.quant.compressed_tensors import QuantisedFolder, parse
from surefoot.quant.packing import unpack_int8
from surefoot.quant.schemes import Scheme, quantise_rows, scheme
from surefoot.quant.select import select
from surefoot.verify.layerweights import CheckpointWeights, LayerWeights, RandomWeights
from surefoot.verify.pathcapture import plain
from surefoot.weights.assign import CONVERT_BYTES
from surefoot.weights.checkpoint import Checkpoint

# Right kernels may hold fp32 activations of quantised layers in 16-bit integers: half a step of the largest.
ACTIVATION_STEP = 2.0**-16
WEIGHT = ".weight"


class QuantisedLinear(nn.Linear):
    """x [..., in] -> [..., out]; weight [out, in] and scales [out, groups] in fp32, whatever the model's dtype."""

    def __init__(self, layer: nn.Linear, how: Scheme):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scheme = layer.in_features, layer.out_features, how
        groups = self.in_features // (how.group_size or self.in_features)
        with torch.device("meta"):
            self.weight = nn.Parameter(torch.empty(self.out_features, self.in_features), requires_grad=False)
            self.scales = nn.Parameter(torch.empty(self.out_features, groups), requires_grad=False)
        self.bias = layer.bias
        self.product: Callable[..., torch.Tensor] = F.linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.product(self.seen(x), self.weight, None)
        if self.bias is not None:
            y = y + self.bias.to(x.dtype).float()
        return y.to(x.dtype)

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """The activations as they enter the product, fp32."""
        if self.scheme.act != "int8":
            return x.float()
        q, step = quantise_tokens(x)
        return q * step

    def one_step(self, x: torch.Tensor) -> torch.Tensor:
        """[T]: what one activation that is rounded to the other side changes in the output, at most (L2)."""
        if self.scheme.act != "int8":
            return x.new_zeros(len(x), dtype=torch.float32)
        _, step = quantise_tokens(x.reshape(len(x), -1))
        return step.nan_to_num(nan=0.0).squeeze(-1) * self.weight.norm(dim=0).max()

    @property
    def integers(self) -> torch.Tensor:
        """Whole numbers [out, in], fp32."""
        return (self.weight / self.spread(self.scales).clamp(min=torch.finfo(torch.float32).tiny)).round()

    def spread(self, scales: torch.Tensor) -> torch.Tensor:
        """[out, groups] -> [out, in]."""
        return scales.repeat_interleave(self.in_features // scales.shape[-1], -1)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantisedLinear:
        return self  # fp32 on the CPU it stays


def dequantised(layer: QuantLinear) -> torch.Tensor:
    """fp32 weight [out, in] of a quantised layer of the engine, computed on the CPU."""
    stored, scale = (t.cpu() for t in layer.rows())
    scale = scale.float()
    if layer.scheme.bits == 8:
        return stored.float() * scale.view(-1, 1)
    q = unpack_int4(stored).float()
    return q * scale.repeat_interleave(q.shape[-1] // scale.shape[-1], -1)


@contextlib.contextmanager
def roughened(model: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """fp32 inputs of quantised layers are off by up to half a step of 16 bits, as right kernels may have them."""

    def rough(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = args[0]
        if x.dtype != torch.float32:
            return None
        noise = (2 * torch.rand(x.shape, generator=generator) - 1).to(x.device)
        return (x + noise * x.abs().amax(-1, keepdim=True) * ACTIVATION_STEP, *args[1:])

    layers = [m for m in model.modules() if isinstance(m, (QuantisedLinear, QuantLinear))]
    handles = [layer.register_forward_pre_hook(rough) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_quantised(model: nn.Module | None) -> bool:
    return model is not None and any(isinstance(m, (QuantisedLinear, QuantLinear)) for m in model.modules())


# ---- which layers, and their numbers

Numbers = tuple[torch.Tensor, torch.Tensor]  # whole numbers [out, in] fp32, scales [out, groups] fp32


class QuantisedWeights(LayerWeights):
    """Another source's tensors, of which those of `schemes` are quantised; names are transformers'.

    schemes: path of a layer -> its scheme.  numbers(path): its integers and scales.
    """

    def __init__(self, inner: LayerWeights, schemes: dict[str, Scheme], numbers: Callable[[str], Numbers], source: str):
        super().__init__(inner.sources, inner._shapes, inner.dtype)
        self.inner, self.schemes, self.numbers, self.source = inner, schemes, numbers, source

    def read(self, name: str) -> torch.Tensor:
        path, _, leaf = name.rpartition(".")
        if path not in self.schemes or leaf not in ("weight", "scales"):
            return self.inner.read(name)
        q, scales = self.numbers(path)
        return scales if leaf == "scales" else q * scales.repeat_interleave(q.shape[1] // scales.shape[1], -1)

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        return self.inner.rows(name, ids)

    def row_blocks(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        return self.inner.row_blocks(name)

    def adopt(self, model: nn.Module) -> None:
        """Put a `QuantisedLinear` where a layer is quantised."""
        for path, how in self.schemes.items():
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, QuantisedLinear(model.get_submodule(path), how))  # type: ignore[arg-type]

    def steps_off(self, path: str) -> float:
        """Largest distance of a weight to its quantised value, in steps; only where the weights are at hand."""
        q, scales = self.numbers(path)
        wide = scales.repeat_interleave(q.shape[1] // scales.shape[1], -1)
        off = (self.inner.read(path + WEIGHT).float() - q * wide).abs()
        return float((off / wide.clamp(min=torch.finfo(torch.float32).tiny))[wide > 0].max())

    def info(self) -> dict[str, Any]:
        names = sorted({str(s) for s in self.schemes.values()})
        return {"scheme": ", ".join(names), "layers": len(self.schemes), "source": self.source}


def weights_of(backend: Any) -> QuantisedWeights | None:
    """A quantised reference's weights."""
    weights = getattr(backend, "weights", None)
    return weights if isinstance(weights, QuantisedWeights) else None


def quant_info(weights: LayerWeights) -> dict[str, Any]:
    return weights.info() if isinstance(weights, QuantisedWeights) else {}


def quantise(weights: LayerWeights, checkpoint: Checkpoint, config: EngineConfig, drawn: torch.dtype) -> LayerWeights:
    """`weights` as the settings, or the folder, want them quantised; as they are if nothing says so.

    drawn: dtype that random weights are drawn in, the target's.
    """
    folder = parse(checkpoint.config)
    if folder is not None:
        if config.quant is not None:
            raise InputError(f"{checkpoint.folder} is quantised already: leave --quant out")
        return _from_folder(weights, checkpoint, folder)
    if config.quant is None:
        return weights
    how = scheme(config.quant, config.quant_group_size)
    native = build(checkpoint.config)
    chosen = {plain(n) for n in select(shapes(native), how, native.quant_exclude, config.quant_lm_head).modules}
    paths = [n.removesuffix(WEIGHT) for n in weights.sources if plain(n.removesuffix(WEIGHT)) in chosen]

    def numbers(path: str) -> Numbers:
        return _joined([quantise_rows(rows, how, path) for rows in _stored_rows(weights, path + WEIGHT, drawn)], how)

    return QuantisedWeights(weights, dict.fromkeys(paths, how), numbers, "on load")


def _stored_rows(weights: LayerWeights, name: str, drawn: torch.dtype) -> Iterable[torch.Tensor]:
    """A matrix row by row in the dtype that it is stored in, on which the scales of int4 depend."""
    if isinstance(weights, CheckpointWeights):
        return weights.checkpoint.rows(weights.sources[name], CONVERT_BYTES)
    assert isinstance(weights, RandomWeights)
    return [weights.read(name).to(drawn)]


def _joined(parts: list[dict[str, torch.Tensor]], how: Scheme) -> Numbers:
    scales = torch.cat([p["weight_scale"] for p in parts]).float()
    if how.bits == 4:
        return unpack_int4(torch.cat([p["weight_packed"] for p in parts])).float(), scales
    return torch.cat([p["weight"] for p in parts]).float(), scales.view(-1, 1)


# ---- folders


def _from_folder(weights: LayerWeights, checkpoint: Checkpoint, folder: QuantisedFolder) -> QuantisedWeights:
    schemes, packed = {}, {}
    stored = checkpoint.names()
    for name, source in weights.sources.items():
        path, there = name.removesuffix(WEIGHT), source.removesuffix(WEIGHT)
        layout = folder.layout(there) if name.endswith(WEIGHT) and f"{there}.weight_scale" in stored else None
        if layout is not None:
            schemes[path], packed[path] = layout.scheme, layout.packed

    def numbers(path: str) -> Numbers:
        source, how = weights.sources[path + WEIGHT].removesuffix(WEIGHT), schemes[path]
        scales = checkpoint.load(f"{source}.weight_scale").float()
        scales = scales.view(len(scales), -1)
        if not packed[path]:
            return checkpoint.load(f"{source}.weight").float(), scales
        words, inner = checkpoint.load(f"{source}.weight_packed"), weights.shape(path + WEIGHT)[1]
        q = unpack_int4(words)[:, :inner] if how.bits == 4 else unpack_int8(words.clone(), inner)
        return q.float(), scales

    return QuantisedWeights(weights, schemes, numbers, "folder")
