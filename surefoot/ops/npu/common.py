"""What the NPU implementations share: dtypes of the fused operators, checks, small constants made once per device."""

from __future__ import annotations

import functools

import torch

PRIORITY = 10
HALF = (torch.bfloat16, torch.float16)
FLOAT = (*HALF, torch.float32)


def need(condition: bool, why: str) -> None:
    """Stop before a fused operator reads memory by a shape that its Meta kernel does not check."""
    if not condition:
        raise ValueError(f"npu: {why}")


@functools.lru_cache(maxsize=64)
def filled(device: torch.device, width: int, value: float) -> torch.Tensor:
    """[width] fp32, all `value`: a constant gamma."""
    return torch.full((width,), value, device=device)
