"""One step of the gated delta rule in batched matrix products; the L2 norms by `npu_rms_norm`.

npu_recurrent_gated_delta_rule and npu_chunk_gated_delta_rule are not used: they take a bf16 state only (op-plugin's
documents of them), and a state in 16 bits loses half of the accuracy of trained models. Prefill takes the chunked form
of `ops/torch_native.py`, whose triangular solve has an NPU kernel.
"""

from __future__ import annotations

import torch

from surefoot.ops.delta import L2_EPS
from surefoot.ops.npu.common import FLOAT, PRIORITY, filled, need
from surefoot.ops.spec import register


def _l2_normalise(x: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * x / sqrt(sum(x^2) + eps) in fp32: an RMSNorm whose gamma holds the scale and the root of the width."""
    width = x.shape[-1]
    gamma = filled(x.device, width, scale * width**-0.5)
    return torch.ops.npu.npu_rms_norm(x.float().contiguous(), gamma, L2_EPS / width)[0]


@register("gated_delta_step", "npu", "bmm", supports=lambda q, *args, **kwargs: q.dtype in FLOAT, priority=PRIORITY)
def gated_delta_step(q, k, v, g, beta, state, slots):
    heads, dv = v.shape[1:]
    need(state.shape[1:] == (heads, q.shape[2], dv), f"a state of {tuple(state.shape)} for values {tuple(v.shape)}")
    need(
        state.dtype is torch.float32 and heads % k.shape[1] == 0, "the state is fp32, its heads share key heads evenly"
    )
    need(g.shape == beta.shape == v.shape[:2] and len(slots) == len(q), "a decay, a rate and a slot for each token")
    queries, keys = _l2_normalise(q, q.shape[-1] ** -0.5), _l2_normalise(k, 1.0)
    if heads != k.shape[1]:
        group = heads // k.shape[1]
        queries, keys = queries.repeat_interleave(group, dim=1), keys.repeat_interleave(group, dim=1)
    # One small matrix per token and head: [N * Hv, 1, Dk], [N * Hv, 1, Dv], [N * Hv, Dk, Dv].
    queries, keys = queries.view(-1, 1, q.shape[-1]), keys.view(-1, 1, q.shape[-1])
    s = (state.index_select(0, slots) * g.exp()[..., None, None]).flatten(0, 1)
    delta = (v.float().reshape(-1, 1, dv) - torch.bmm(keys, s)) * beta.reshape(-1, 1, 1)
    s = torch.baddbmm(s, keys.transpose(1, 2), delta)
    state.index_copy_(0, slots, s.view(len(q), *state.shape[1:]))
    return torch.bmm(queries, s).view(v.shape).to(v.dtype)
