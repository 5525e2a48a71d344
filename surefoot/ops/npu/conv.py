"""The causal depthwise convolution as K shifted multiply-adds over tokens, elementwise kernels only.

npu_fused_causal_conv1d is not used: its kernel width is fixed at 3 and these models have 4 (op-plugin's document of
it). A depthwise aten convolution would go through a two-dimensional one with a group per channel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from surefoot.ops.npu.common import FLOAT, PRIORITY, need
from surefoot.ops.spec import register


@register("causal_conv_step", "npu", "shifted", supports=lambda x, *args, **kwargs: x.dtype in FLOAT, priority=PRIORITY)
def causal_conv_step(x, weight, bias, state, slots):
    _check(x, weight, state)
    window = torch.cat((state.index_select(0, slots), x.unsqueeze(-1)), dim=-1)
    state.index_copy_(0, slots, window[..., 1:])
    y = (window.float() * weight.float()).sum(-1)
    return F.silu(y if bias is None else y + bias).to(x.dtype)


@register("causal_conv", "npu", "shifted", supports=lambda x, *args, **kwargs: x.dtype in FLOAT, priority=PRIORITY)
def causal_conv(x, weight, bias, state, slots, query_start_loc, query_lens_host):
    _check(x, weight, state)
    need(sum(query_lens_host) == len(x), f"query lengths sum to {sum(query_lens_host)}, there are {len(x)} tokens")
    kernel = weight.shape[1]
    taps = weight.float().t().contiguous()
    out = torch.empty_like(x)
    row = 0
    for i, n in enumerate(query_lens_host):
        slot = slots[i : i + 1]
        before = state.index_select(0, slot)[0].t()
        window = torch.cat((before, x[row : row + n]))
        state.index_copy_(0, slot, window[n:].t().unsqueeze(0))
        window = window.float()
        y = window[:n] * taps[0]
        for j in range(1, kernel):
            y = y.addcmul(window[j : j + n], taps[j])
        out[row : row + n] = F.silu(y if bias is None else y + bias).to(x.dtype)
        row += n
    return out


def _check(x, weight, state) -> None:
    need(x.shape[1] == len(weight) == state.shape[1], f"{x.shape[1]} channels, weights for {len(weight)}")
    need(state.shape[2] == weight.shape[1] - 1, f"a state of {state.shape[2]} inputs for a kernel of {weight.shape[1]}")
