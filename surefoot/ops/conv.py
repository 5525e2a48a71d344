"""Causal depthwise convolution over a stream, as in front of a gated delta net: short kernel, SiLU, carried state.

The state of a request is its last K - 1 raw inputs (before the convolution), oldest first; a fresh slot holds zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from surefoot.ops.samples import ELEMENTWISE, nbytes, randn, starts
from surefoot.ops.spec import Cost, OpSpec, Sample, define, dispatch


def causal_conv_step(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """One new token for each of N requests. x: [N, C]; weight: [C, K]; bias: [C] or None;
    state: [num_slots, C, K - 1], read and shifted in place at slots [N]. Returns silu(conv) [N, C]."""
    return dispatch(CAUSAL_CONV_STEP, x.device.type, (x, weight, bias, state, slots), {})


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    slots: torch.Tensor,
    query_start_loc: torch.Tensor,
    query_lens_host: list[int],
) -> torch.Tensor:
    """Several new tokens for each of N requests, packed: x [T, C]. Continues from, and leaves behind, `state`."""
    args = (x, weight, bias, state, slots, query_start_loc, query_lens_host)
    return dispatch(CAUSAL_CONV, x.device.type, args, {})


def _step(x, weight, bias, state, slots):
    window = torch.cat((state.index_select(0, slots), x.unsqueeze(-1)), dim=-1)
    state.index_copy_(0, slots, window[..., 1:])
    y = (window.float() * weight.float()).sum(-1)
    return F.silu(y if bias is None else y + bias.float()).to(x.dtype)


def _conv(x, weight, bias, state, slots, query_start_loc, query_lens_host):
    kernel = weight.shape[1]
    out = torch.empty_like(x)
    row = 0
    for i, n in enumerate(query_lens_host):
        slot = slots[i : i + 1]
        window = torch.cat((state.index_select(0, slot)[0], x[row : row + n].transpose(0, 1)), dim=-1)
        y = F.conv1d(
            window.float()[None],
            weight.float()[:, None],
            None if bias is None else bias.float(),
            groups=weight.shape[0],
        )
        out[row : row + n] = F.silu(y[0].transpose(0, 1)).to(x.dtype)
        state.index_copy_(0, slot, window[None, :, window.shape[1] - kernel + 1 :])
        row += n
    return out


def _cost(x, weight, bias, state, slots, query_start_loc=None, query_lens_host=None):
    per_slot = state[0].numel() * state.element_size()
    return Cost(2.0 * x.numel() * weight.shape[1], 2 * nbytes(x) + nbytes(weight, bias) + 2 * slots.numel() * per_slot)


def _samples(*, step: bool):
    def sample(name, lens, channels, kernel, bias=False):
        def make(dtype, device, gen):
            call = {
                "x": randn((sum(lens), channels), dtype, device, gen),
                "weight": randn((channels, kernel), dtype, device, gen, 0.5),
                "bias": randn((channels,), dtype, device, gen) if bias else None,
                "state": randn((len(lens) + 3, channels, kernel - 1), dtype, device, gen),
                "slots": (torch.randperm(len(lens) + 2, generator=gen)[: len(lens)] + 1).to(device),
            }
            if not step:
                call["query_start_loc"] = torch.tensor(starts(lens), dtype=torch.int32, device=device)
                call["query_lens_host"] = list(lens)
            return call

        return Sample(name, make)

    if step:
        return [
            sample("qwen3.5-0.8b", [1] * 8, 6144, 4),
            sample("one row", [1], 12, 4),
            sample("bias", [1] * 3, 8, 2, True),
        ]
    return [
        sample("qwen3.5-0.8b", [65], 6144, 4),
        sample("shorter than the kernel", [1, 2, 3, 4, 5], 48, 4),
        sample("bias", [7, 3], 8, 2, True),
    ]


CAUSAL_CONV_STEP = define(
    OpSpec(
        "causal_conv_step",
        _step,
        cost=_cost,
        samples=lambda: _samples(step=True),
        tolerance=ELEMENTWISE,
        mutates=("state",),
    )
)
CAUSAL_CONV = define(
    OpSpec(
        "causal_conv",
        _conv,
        cost=_cost,
        samples=lambda: _samples(step=False),
        tolerance=ELEMENTWISE,
        mutates=("state",),
    )
)
