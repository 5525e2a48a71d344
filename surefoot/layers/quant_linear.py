"""Linear layers with int8 or int4 weights, in place of `Linear`: before a quantised folder is read, or on load.

A `QuantLinear` is born with the tensors that a folder stores (names and layout of `compressed-tensors`) or straight in
the layout that the ops take; `finalize` turns the first into the second, in place where it can:

    weight         [out, in] int8                   weight_scale  [out] fp32
    weight_packed  [out, in / 8] int32 (int4)       weight_scale  [out, in / group_size], as stored

On a CPU with the C++ kernels `finalize` also packs them into panels, in place, unless they still lie in a mapped file
(`in_file`, see weights/moving.py); `rows` gives them back as stored.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from surefoot import ops
from surefoot.core.errors import ModelError
from surefoot.device import hugepages
from surefoot.layers.linear import Linear
from surefoot.ops.cpu import pack_
from surefoot.ops.quant import in_rows
from surefoot.quant.compressed_tensors import Layout, QuantisedFolder
from surefoot.quant.packing import unpack_int8
from surefoot.quant.schemes import Scheme, group_scale_dtype, quantise_rows
from surefoot.quant.select import Selection


class QuantLinear(nn.Module):
    """y = x @ dequantised(weight).T + bias. x: [T, in] -> [T, out]. The scheme says how activations enter."""

    weight: torch.Tensor
    weight_packed: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, in_features: int, out_features: int, scheme: Scheme, bias: nn.Parameter | None):
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.group_size = scheme.group_size or in_features
        self.bias = bias
        self.layout, self.in_file = "rows", False

    def hold(self, **tensors: torch.Tensor) -> QuantLinear:
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        return self

    def held_dtype(self, leaf: str, stored: torch.dtype, default: torch.dtype) -> torch.dtype:
        """Group scales stay in the 16 bits that they were stored in; a scale per channel is fp32."""
        if leaf != "weight_scale":
            return default
        return stored if self.scheme.bits == 4 and stored.itemsize == 2 else torch.float32

    def finalize(self) -> None:
        """Bring what was read into the layout that the ops take. Again is harmless."""
        shape = self._parameters.pop("weight_shape", None)
        if shape is not None and not torch.equal(shape, shape.new_tensor([self.out_features, self.in_features])):
            raise ModelError(
                f"a weight_shape in the folder is not the {self.out_features} x {self.in_features} of its layer: "
                "config.json and weight files must belong together"
            )
        if self.scheme.bits == 8:
            packed = self._parameters.pop("weight_packed", None)
            if packed is not None:
                self.hold(weight=unpack_int8(packed.data, self.in_features))
            self.weight_scale.data = self.weight_scale.data.view(-1)
        if self.layout == "rows" and not self.in_file and pack_(self.stored, self.weight_scale):
            self.layout = "panels"

    @property
    def stored(self) -> torch.Tensor:
        """The integers as they lie."""
        return self.weight if self.scheme.bits == 8 else self.weight_packed

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight or weight_packed, weight_scale) row by row."""
        return in_rows(self.stored.detach(), self.weight_scale.detach(), self.layout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scheme.bits == 8:
            return ops.linear_w8(x, self.weight, self.weight_scale, self.bias, self.scheme.act, self.layout)
        return ops.linear_w4(
            x, self.weight_packed, self.weight_scale, self.group_size, self.bias, self.scheme.act, self.layout
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme}"


def linears(model: nn.Module) -> dict[str, Linear]:
    """The dense layers of a model by path, in module order: what can be quantised."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (layer.out_features, layer.in_features) for name, layer in linears(model).items()}


def as_stored(layer: Linear, layout: Layout) -> QuantLinear:
    """In place of `layer`: a layer with the slots that a folder of this layout fills."""
    outer, inner, scheme = layer.out_features, layer.in_features, layout.scheme
    quantised = QuantLinear(inner, outer, scheme, layer.bias)
    group = scheme.group_size or inner
    columns = -(-inner // group)
    with torch.device("meta"):
        scale = torch.empty(outer, columns)
        if not layout.packed:
            return quantised.hold(weight=torch.empty(outer, inner, dtype=torch.int8), weight_scale=scale)
        words = -(-inner * scheme.bits // 32)
        packed = torch.empty(outer, words, dtype=torch.int32)
        return quantised.hold(weight_packed=packed, weight_scale=scale, weight_shape=torch.empty(2, dtype=torch.int64))


def adopt_folder(model: nn.Module, folder: QuantisedFolder, tied: Iterable[str] = ()) -> None:
    """Replace the layers that the folder stores quantised; the model then wants exactly the folder's tensors.

    A tied layer has no tensor of its own and stays.
    """
    kept = {name.removesuffix(".weight") for name in tied}
    found = 0
    for name, layer in linears(model).items():
        layout = folder.layout(name)
        if layout is None or name in kept:
            continue
        group = layout.scheme.group_size
        if group and layer.in_features % group or layout.scheme.bits == 4 and layer.in_features % 8:
            raise ModelError(
                f"quantization_config: group_size {group} does not divide the {layer.in_features} inputs of {name}"
            )
        replace(model, name, as_stored(layer, layout))
        found += 1
    if not found:
        raise ModelError("quantization_config: its targets match no layer of this model (get config.json again)")


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def quantised(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


class QuantiseOnLoad:
    """Quantises the chosen layers of a model while their weights stream in, a few rows at a time.

    See `weights.assign.Converter`, whose methods these are.
    """

    def __init__(self, selection: Selection):
        self.selection = selection
        self._chosen = frozenset(f"{name}.weight" for name in selection.modules)

    def takes(self, name: str) -> bool:
        return name in self._chosen

    def convert(self, name: str, layer: nn.Module, pieces: Iterable[torch.Tensor], device) -> QuantLinear:
        """`pieces` are consecutive rows of the weight, on the CPU, in the dtype that they are stored in."""
        assert isinstance(layer, Linear)
        scheme, outer, row = self.selection.scheme, layer.out_features, 0
        held: dict[str, torch.Tensor] = {}
        for piece in pieces:
            # Room for the result before there is any scratch: memory given back below it could not be used again.
            held = held or _room(outer, layer.in_features, scheme, group_scale_dtype(piece.dtype), device)
            for leaf, tensor in quantise_rows(piece, scheme, name).items():
                held[leaf][row : row + piece.shape[0]].copy_(tensor)
            row += piece.shape[0]
        return QuantLinear(layer.in_features, outer, scheme, layer.bias).hold(**held)

    def place(self, model: nn.Module, name: str, layer: nn.Module) -> None:
        """In the model's place; a bias that arrived before the weight comes along."""
        path = name.removesuffix(".weight")
        layer.bias = model.get_submodule(path).bias
        replace(model, path, layer)


def _room(outer: int, inner: int, scheme: Scheme, scale_dtype: torch.dtype, device) -> dict[str, torch.Tensor]:
    """Empty tensors of a finalised `QuantLinear`."""
    if scheme.bits == 8:
        weight = hugepages.empty((outer, inner), torch.int8, device)
        return {"weight": weight, "weight_scale": torch.empty(outer, device=device)}
    groups = inner // (scheme.group_size or inner)
    return {
        "weight_packed": hugepages.empty((outer, inner // 8), torch.int32, device),
        "weight_scale": torch.empty(outer, groups, dtype=scale_dtype, device=device),
    }
