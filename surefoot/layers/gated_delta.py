"""Gated delta net: the linear-attention layer of Qwen3.5, over packed tokens and per-request state slots.

qkv projection -> short causal convolution -> gated delta rule -> gated RMSNorm -> output projection.
"""

from __future__ import annotations

import torch
from torch import nn

from surefoot import ops
from surefoot.cache.plan import LinearStateSpec
from surefoot.core.batch import Batch, LinearState
from surefoot.layers.linear import Linear
from surefoot.layers.norm import GatedRMSNorm


class ConvWeight(nn.Module):
    """Holds the depthwise kernel under its HF name: weight [C, 1, K]."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size), requires_grad=False)


class GatedDeltaNet(nn.Module):
    """x: [T, hidden] -> [T, hidden]; carries a `LinearState` per request."""

    def __init__(
        self,
        layer_idx: int,
        hidden_size: int,
        num_k_heads: int,
        num_v_heads: int,
        head_k_dim: int,
        head_v_dim: int,
        conv_kernel: int,
        eps: float,
    ):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_k_heads, self.num_v_heads = num_k_heads, num_v_heads
        self.head_k_dim, self.head_v_dim = head_k_dim, head_v_dim
        self.key_dim, self.value_dim = num_k_heads * head_k_dim, num_v_heads * head_v_dim
        self.conv_dim, self.conv_kernel = 2 * self.key_dim + self.value_dim, conv_kernel
        self.in_proj_qkv = Linear(hidden_size, self.conv_dim)
        self.in_proj_z = Linear(hidden_size, self.value_dim)
        self.in_proj_b = Linear(hidden_size, num_v_heads)
        self.in_proj_a = Linear(hidden_size, num_v_heads)
        self.conv1d = ConvWeight(self.conv_dim, conv_kernel)
        self.dt_bias = nn.Parameter(torch.empty(num_v_heads), requires_grad=False)
        self.A_log = nn.Parameter(torch.empty(num_v_heads), requires_grad=False)
        self.norm = GatedRMSNorm(head_v_dim, eps)
        self.out_proj = Linear(self.value_dim, hidden_size)

    def state_spec(self) -> LinearStateSpec:
        return LinearStateSpec(self.conv_dim, self.conv_kernel - 1, self.num_v_heads, self.head_k_dim, self.head_v_dim)

    def forward(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        state = batch.layers[self.layer_idx]
        assert isinstance(state, LinearState)
        mixed = self.in_proj_qkv(x)
        z = self.in_proj_z(x).view(-1, self.num_v_heads, self.head_v_dim)
        g, beta = ops.delta_gates(self.in_proj_a(x), self.in_proj_b(x), self.A_log, self.dt_bias)
        # Decodes come first in the batch: one token each, a step; the rest goes through the chunked form.
        n, weight = batch.num_decodes, self.conv1d.weight.squeeze(1)
        parts = []
        if n:
            parts.append(self._step(mixed[:n], g[:n], beta[:n], weight, state, batch.state_slots[:n]))
        if batch.num_tokens > n:
            parts.append(self._chunk(mixed[n:], g[n:], beta[n:], weight, state, batch))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self.out_proj(self.norm(out, z).flatten(1))

    def _split(self, mixed: torch.Tensor):
        q, k, v = mixed.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        heads = (self.num_k_heads, self.head_k_dim)
        return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, (self.num_v_heads, self.head_v_dim))

    def _step(self, mixed, g, beta, weight, state: LinearState, slots):
        q, k, v = self._split(ops.causal_conv_step(mixed, weight, None, state.conv, slots))
        return ops.gated_delta_step(q, k, v, g, beta, state.recurrent, slots)

    def _chunk(self, mixed, g, beta, weight, state: LinearState, batch: Batch):
        n = batch.num_decodes
        slots, lens = batch.state_slots[n:], batch.query_lens_host[n:]
        starts = batch.query_start_loc[n:] - n
        q, k, v = self._split(ops.causal_conv(mixed, weight, None, state.conv, slots, starts, lens))
        return ops.gated_delta_chunk(q, k, v, g, beta, state.recurrent, slots, starts, lens)
