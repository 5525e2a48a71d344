"""int8 weights as `compressed-tensors` packs them ("pack-quantized"): four to an int32, stored plus 128."""

from __future__ import annotations

import torch
import torch.nn.functional as F

FLIP = -128  # adding 128 modulo 256 is flipping the top bit


def pack_int8(q: torch.Tensor) -> torch.Tensor:
    """[out, in] int8 -> [out, ceil(in / 4)] int32, element 4 i + j of a row in bits 8 j ... 8 j + 7 of word i."""
    missing = -q.shape[-1] % 4
    stored = F.pad(q.bitwise_xor(FLIP), (0, missing))
    return stored.contiguous().view(torch.int32)


def unpack_int8(packed: torch.Tensor, inner: int) -> torch.Tensor:
    """[out, ceil(in / 4)] int32 -> [out, in] int8, in the same memory when 4 divides `in`."""
    return packed.view(torch.int8).bitwise_xor_(FLIP)[:, :inner].contiguous()
