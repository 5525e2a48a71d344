"""RMSNorm, plain or fused with the residual add, and the gated RMSNorm of a delta net."""

from __future__ import annotations

import torch
from torch import nn

from surefoot import ops


class RMSNorm(nn.Module):
    """Root-mean-square norm. `offset` is what the checkpoint leaves out of the weight: 0 for Llama, 1 for Qwen3.5.

    With `residual`, returns (norm(x + residual), x + residual).
    """

    scale: torch.Tensor

    def __init__(self, dim: int, eps: float, offset: float = 0.0):
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)
        self.register_buffer("scale", None, persistent=False)

    def finalize(self) -> None:
        # fp32, so that 1 + weight is not rounded to the model's dtype. Without an offset it is the weight itself, in
        # the one dtype that fused add-and-norm kernels take for all arguments.
        self.scale = self.weight.float() + self.offset if self.offset else self.weight.data

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        if residual is None:
            return ops.rms_norm(x, self.scale, self.eps)
        return ops.add_rms_norm(x, residual, self.scale, self.eps)


class GatedRMSNorm(nn.Module):
    """norm(x) * silu(gate); its weight is stored as it is (no minus one), unlike Qwen3.5's other norms."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return ops.gated_rms_norm(x, gate, self.weight, self.eps)
