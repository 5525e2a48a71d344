"""The Llama family: everything that HF calls `LlamaForCausalLM` (Llama 2/3, Llama 3.2 1B and 3B, their fine-tunes)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surefoot import ops
from surefoot.cache.plan import PagedKVSpec
from surefoot.core.batch import Batch
from surefoot.core.errors import ModelError
from surefoot.layers.attention import attend
from surefoot.layers.linear import Embedding, Linear
from surefoot.layers.mlp import GatedMLP
from surefoot.layers.norm import RMSNorm
from surefoot.layers.rotary import RopeConfig, RotaryEmbedding
from surefoot.models.base import CausalLM, require, require_silu


@dataclass(frozen=True)
class LlamaConfig:
    """Fields of an HF Llama config.json; optional ones default as in transformers' LlamaConfig."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    initializer_range: float

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> LlamaConfig:
        require_silu(config)
        vocab, hidden, inter, layers, heads = require(
            config, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
        )
        kv_heads = config.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise ModelError(f"config.json: {heads} attention heads cannot share {kv_heads} KV heads evenly")
        head_dim = config.get("head_dim") or hidden // heads
        max_len = config.get("max_position_embeddings", 2048)
        return cls(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=inter,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=RopeConfig.from_hf(config, head_dim, max_len),
            attention_bias=config.get("attention_bias", False),
            mlp_bias=config.get("mlp_bias", False),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            max_position_embeddings=max_len,
            initializer_range=config.get("initializer_range", 0.02),
        )


class LlamaAttention(nn.Module):
    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, config.head_dim
        self.num_kv_heads = config.num_key_value_heads
        q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_size, config.attention_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, config.attention_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, config.attention_bias)
        self.o_proj = Linear(q_size, config.hidden_size, config.attention_bias)
        self.scale = config.head_dim**-0.5

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: Batch) -> torch.Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k = ops.rotary(q, k, cos, sin)
        return self.o_proj(attend(q, k, v, batch, self.layer_idx, self.scale))


class LlamaDecoderLayer(nn.Module):
    """x [T, hidden] -> [T, hidden]; the layer's output equals HF's, so that captures compare."""

    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def state_spec(self) -> PagedKVSpec:
        return PagedKVSpec(self.self_attn.num_kv_heads, self.self_attn.head_dim)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: Batch) -> torch.Tensor:
        attended = self.self_attn(self.input_layernorm(x), cos, sin, batch)
        h, x = self.post_attention_layernorm(attended, residual=x)
        return ops.add(x, self.mlp(h))


class LlamaModel(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.rope)

    def forward(self, batch: Batch) -> torch.Tensor:
        x = self.embed_tokens(batch.input_ids)
        cos, sin = self.rotary_emb(batch.positions, batch.rope_lens)
        for layer in self.layers:
            x = layer(x, cos, sin, batch)
        return self.norm(x)


class LlamaForCausalLM(CausalLM):
    architecture = "LlamaForCausalLM"
    # Old checkpoints carry the rotary table as a buffer; it follows from the config.
    ignored = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$", r"model\.rotary_emb\.inv_freq$")

    def __init__(self, hf_config: dict[str, Any]):
        config = LlamaConfig.from_hf(hf_config)
        super().__init__(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            max_position_embeddings=config.max_position_embeddings,
            initializer_range=config.initializer_range,
        )
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.tie_lm_head("model.embed_tokens")

    @property
    def decoder_layers(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def rotary(self) -> RotaryEmbedding:
        return self.model.rotary_emb

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.model(batch)
