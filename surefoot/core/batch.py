"""The batch: everything one forward pass needs, as an argument. There is no global context.

Tokens of all scheduled requests are packed one after another, never padded. Requests with a single token this step come
first, so that attention and delta-rule kernels can split [decode | prefill] by one number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class KVPages:
    """Paged keys and values of one attention layer; slot s is page s // block_size, row s % block_size.

    k, v: [num_blocks, block_size, num_kv_heads, head_dim]
    """

    k: torch.Tensor
    v: torch.Tensor


@dataclass
class LinearState:
    """Recurrent state of one gated-delta-net layer, one slot per running request.

    conv: [num_slots, conv_dim, kernel_size - 1] the last raw inputs of the causal convolution, oldest first
    recurrent: [num_slots, num_v_heads, head_k_dim, head_v_dim], fp32 whatever the model dtype
    """

    conv: torch.Tensor
    recurrent: torch.Tensor


@dataclass
class Batch:
    """T packed tokens of N requests. Integer tensors live on the model's device; the lists are host copies of the same.

    input_ids, positions: [T] int64
    slot_mapping: [T] int64, flat KV slot of each token (block id x block_size + offset)
    query_start_loc: [N + 1] int32, request i owns packed rows query_start_loc[i]:query_start_loc[i + 1]
    seq_lens: [N] int32, tokens of request i in the cache after this step
    block_table: [N, max_blocks] int32, rows padded with 0
    state_slots: [N] int64 slot of each request's recurrent state (all 0 for attention-only models)
    logits_indices: [L] int64 packed rows whose logits are wanted
    num_decodes: the first num_decodes requests have exactly one token this step
    rope_lens: [T] int64 or None: sequence length that a length-dependent rope (type dynamic) goes by for each token
    layers: cache of each decoder layer, indexed by layer_idx
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    state_slots: torch.Tensor
    logits_indices: torch.Tensor
    query_lens_host: list[int]
    seq_lens_host: list[int]
    num_decodes: int
    layers: list[KVPages | LinearState]
    rope_lens: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def num_reqs(self) -> int:
        return len(self.query_lens_host)
