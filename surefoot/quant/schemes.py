"""The schemes, and rounding to nearest: w8a16, w8a8 (int8 per output channel), w4a16, w4a8 (int4 per group of inputs).

A weight is rounded matrix by matrix, with no data, so that a model can be quantised while it streams in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from surefoot.core.errors import InputError, ModelError
from surefoot.ops.quant import pack_int4


@dataclass(frozen=True)
class Scheme:
    """bits of the weights, group_size along the input (None: per output channel), act: how activations enter."""

    name: str
    bits: int
    act: str
    group_size: int | None = None

    @property
    def bits_per_weight(self) -> float:
        """With a 16-bit scale per group."""
        return self.bits + (16 / self.group_size if self.group_size else 0)

    def __str__(self) -> str:
        return f"{self.name}, groups of {self.group_size}" if self.group_size else self.name


_ALL = (
    Scheme("w8a16", 8, "float"),
    Scheme("w8a8", 8, "int8"),
    Scheme("w4a16", 4, "float", 32),
    Scheme("w4a8", 4, "int8", 32),
)
SCHEMES = {s.name: s for s in _ALL}

GROUP_SIZES = (32, 64, 128)


def scheme(name: str, group_size: int | None = None) -> Scheme:
    """The scheme of that name; `group_size` replaces its default (int4 only)."""
    if name not in SCHEMES:
        raise InputError(f"unknown quantisation scheme {name!r}: choose one of {', '.join(SCHEMES)}")
    found = SCHEMES[name]
    if group_size is None:
        return found
    if found.group_size is None:
        raise InputError(f"{name} has one scale per output channel and takes no group size")
    if group_size not in GROUP_SIZES:
        raise InputError(f"group size {group_size} is not supported: choose one of {', '.join(map(str, GROUP_SIZES))}")
    return replace(found, group_size=group_size)


def quantise_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, in] float -> (int8 [out, in] in [-127, 127], scale [out] fp32). An all-zero channel gets scale 0."""
    weight = weight.float()
    scale = weight.abs().amax(-1) / 127.0
    q = torch.round(weight / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1))
    return q.clamp_(-127, 127).to(torch.int8), scale


def dequantise_int8(qweight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return qweight.float() * scale.unsqueeze(-1)


# Where the largest magnitude of an int4 group may come to lie. The range is -8 ... 7: at 7 nothing is cut off, at 8
# steps are finer and a positive maximum loses one. compressed-tensors always takes 7.5; to choose lowers the KL by 1/7.
INT4_TOPS = (7.0, 7.5, 8.0)


def quantise_int4(
    weight: torch.Tensor, group_size: int = 32, scale_dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, in] float -> (packed int32 [out, in / 8], scale [out, in / group_size]).

    Of the scales that INT4_TOPS allow, each group takes the one with the least squared error.
    """
    if weight.shape[-1] % group_size:
        raise InputError(f"int4 groups of {group_size} do not divide a weight of {weight.shape[-1]} inputs")
    groups = weight.float().unflatten(-1, (-1, group_size))
    top = groups.abs().amax(-1, keepdim=True)
    best: tuple[torch.Tensor, ...] = ()  # integers, scale, squared error
    for steps in INT4_TOPS:
        # Rounded to its storage type before it is used, so that the integers fit the scale that will be read back.
        scale = (top / steps).to(scale_dtype).float()
        q = torch.div(groups, scale.clamp_min(torch.finfo(torch.float32).tiny)).round_().clamp_(-8, 7)
        error = (q * scale).sub_(groups).square_().sum(-1, keepdim=True)
        better = error < best[2] if best else None
        found = (q, scale, error)
        best = found if better is None else tuple(torch.where(better, new, old) for new, old in zip(found, best))
    q, scale, _ = best
    return pack_int4(q.flatten(-2)), scale.squeeze(-1).to(scale_dtype)


def group_scale_dtype(stored: torch.dtype) -> torch.dtype:
    """That of the weights as they were stored, but never 32 bits: one scale per group adds up."""
    return stored if stored.itemsize == 2 else torch.bfloat16


def quantise_rows(rows: torch.Tensor, scheme: Scheme, name: str) -> dict[str, torch.Tensor]:
    """Rows of the weight `name` [n, in], rounded: {"weight" int8 | "weight_packed" int32, "weight_scale"}."""
    if scheme.bits == 8:
        q, scale = quantise_int8(rows)
    else:
        q, scale = quantise_int4(rows, scheme.group_size or rows.shape[-1], group_scale_dtype(rows.dtype))
    if not bool(torch.isfinite(scale).all()):
        raise ModelError(f"{name} holds NaN or infinity and cannot be quantised")
    return {"weight" if scheme.bits == 8 else "weight_packed": q, "weight_scale": scale}
