"""RMSNorm by `npu_rms_norm` and `npu_add_rms_norm`.

npu_rms_norm takes a gamma in x's dtype or in fp32 (op-plugin's own test, test_rms_norm_mix_dtype, on a 910B);
npu_add_rms_norm takes one dtype for all. A model whose gamma is fp32 because it is 1 + weight (Qwen3.5) therefore adds
by itself.
"""

from __future__ import annotations

import torch

from surefoot.ops.npu.common import FLOAT, PRIORITY, need
from surefoot.ops.spec import register


def _norm_ok(x, weight, eps) -> bool:
    return x.dtype in FLOAT and weight.dtype in (x.dtype, torch.float32) and x.numel() > 0


@register("rms_norm", "npu", "npu_rms_norm", supports=_norm_ok, priority=PRIORITY)
def rms_norm(x, weight, eps):
    need(weight.shape == x.shape[-1:], f"rms_norm of rows of {x.shape[-1]} by a weight of {tuple(weight.shape)}")
    return torch.ops.npu.npu_rms_norm(x.contiguous(), weight, eps)[0]


@register(
    "add_rms_norm",
    "npu",
    "npu_add_rms_norm",
    supports=lambda x, residual, weight, eps: _norm_ok(x, weight, eps) and residual.dtype == x.dtype,
    priority=PRIORITY,
)
def add_rms_norm(x, residual, weight, eps):
    need(x.shape == residual.shape, f"add_rms_norm of {tuple(x.shape)} and {tuple(residual.shape)}")
    if weight.dtype != x.dtype:
        total = x + residual
        return rms_norm(total, weight, eps), total
    need(weight.shape == x.shape[-1:], f"add_rms_norm of rows of {x.shape[-1]} by a weight of {tuple(weight.shape)}")
    y, _, total = torch.ops.npu.npu_add_rms_norm(x.contiguous(), residual.contiguous(), weight, eps)
    return y, total


@register(
    "gated_rms_norm",
    "npu",
    "npu_rms_norm",
    supports=lambda x, gate, weight, eps: _norm_ok(x, weight, eps) and gate.dtype == x.dtype,
    priority=PRIORITY,
)
def gated_rms_norm(x, gate, weight, eps):
    """Three kernels; the normalised row is rounded to x's dtype before the gate."""
    return rms_norm(x, weight, eps) * torch.nn.functional.silu(gate)
