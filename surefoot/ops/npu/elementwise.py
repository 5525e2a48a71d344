"""Gates and the rotary embedding: `npu_swiglu`, `npu_rotary_mul`."""

from __future__ import annotations

import torch

from surefoot.ops.npu.common import FLOAT, PRIORITY, need
from surefoot.ops.spec import register

# npu_rotary_mul without just-in-time compile, mode "half" (op-plugin's document of it).
MAX_ROTARY_WIDTH = 896
MAX_HEADS = 1000


@register("swiglu", "npu", "npu_swiglu", supports=lambda gate, up: gate.dtype in FLOAT, priority=PRIORITY)
def swiglu(gate, up):
    """npu_swiglu wants [gate | up] in one tensor, so the halves are joined first: two kernels, as silu and multiply
    would be, but with one rounding instead of two."""
    need(gate.shape == up.shape and gate.dtype == up.dtype, f"swiglu of {tuple(gate.shape)} and {tuple(up.shape)}")
    return torch.ops.npu.npu_swiglu(torch.cat((gate, up), dim=-1), -1)


@register("sigmoid_mul", "npu", "sigmoid", supports=lambda x, gate: x.dtype in FLOAT, priority=PRIORITY)
def sigmoid_mul(x, gate):
    return x * torch.sigmoid(gate)


def _rotary_ok(q, k, cos, sin) -> bool:
    return q.dtype in FLOAT and 2 * cos.shape[-1] < MAX_ROTARY_WIDTH and max(q.shape[1], k.shape[1]) < MAX_HEADS


@register("rotary", "npu", "npu_rotary_mul", supports=_rotary_ok, priority=PRIORITY)
def rotary(q, k, cos, sin):
    """Cosines and sines are rounded to q's dtype, as transformers and vLLM do it.

    npu_apply_rotary_pos_emb would turn q and k in one call, but knows heads of 64 and 128 only on A2 and A3 and writes
    into its arguments; this one takes any even width, so a partial rotary (Qwen3.5) is a slice.
    """
    need(cos.shape == sin.shape and len(cos) == len(q) == len(k), f"rotary of {len(q)} tokens by {tuple(cos.shape)}")
    need(q.dtype == k.dtype and 2 * cos.shape[-1] <= q.shape[-1], f"rotary: {2 * cos.shape[-1]} of {q.shape[-1]}")
    r1, r2 = _wide(cos, q.dtype), _wide(sin, q.dtype)
    return _turn(q, r1, r2), _turn(k, r1, r2)


def _wide(angles: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[T, R] -> [1, T, 1, 2R] in `dtype`. Made once per forward pass: every layer is given the same tensor."""
    wide = getattr(angles, "wide_for_npu", None)
    if wide is None or wide.dtype != dtype:
        wide = torch.cat((angles, angles), dim=-1).to(dtype)[None, :, None]
        angles.wide_for_npu = wide  # type: ignore[attr-defined]
    return wide


def _turn(x: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor) -> torch.Tensor:
    width = r1.shape[-1]
    turned = torch.ops.npu.npu_rotary_mul(x[None, ..., :width].contiguous(), r1, r2)[0]
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)
