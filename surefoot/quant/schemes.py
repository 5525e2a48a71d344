"""The schemes, and rounding to nearest: w8a16 and w8a8 (int8 per output channel), w4a16 (int4 per group of inputs).

A weight is rounded matrix by matrix, with no data, so that a model can be quantised while it streams in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surefoot.core.errors import InputError
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


SCHEMES = {s.name: s for s in (Scheme("w8a16", 8, "float"), Scheme("w8a8", 8, "int8"), Scheme("w4a16", 4, "float", 32))}


def scheme(name: str) -> Scheme:
    if name not in SCHEMES:
        raise InputError(f"unknown quantisation scheme {name!r}: choose one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


def quantise_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, in] float -> (int8 [out, in] in [-127, 127], scale [out] fp32). An all-zero channel gets scale 0."""
    weight = weight.float()
    scale = weight.abs().amax(-1) / 127.0
    q = torch.round(weight / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1))
    return q.clamp_(-127, 127).to(torch.int8), scale


def dequantise_int8(qweight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return qweight.float() * scale.unsqueeze(-1)


def quantise_int4(
    weight: torch.Tensor, group_size: int = 32, scale_dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, in] float -> (packed int32 [out, in / 8], scale [out, in / group_size]).

    The largest magnitude of a group maps to 7.5, as in compressed-tensors: the range is -8 ... 7.
    """
    if weight.shape[-1] % group_size:
        raise InputError(f"int4 groups of {group_size} do not divide a weight of {weight.shape[-1]} inputs")
    groups = weight.float().unflatten(-1, (-1, group_size))
    # Rounded to its storage type before it is used, so that the integers fit the scale that will be read back.
    scale = (groups.abs().amax(-1) / 7.5).to(scale_dtype)
    q = torch.round(groups / scale.float().clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1))
    return pack_int4(q.clamp_(-8, 7).flatten(-2)), scale
