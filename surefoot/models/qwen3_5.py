"""Qwen3.5 text: three gated-delta-net layers, then one gated full-attention layer, and so on.

Two containers of the same text model, named as in HF: `Qwen3_5ForCausalLM` (`model.layers...`) and the text part of
`Qwen3_5ForConditionalGeneration` (`model.language_model.layers...`).

NOTE: traps that ports of this model fell into:
- RMSNorm weights are stored minus one; the gated norm inside the delta net is not.
- `q_proj` packs, head by head, the query and then the output gate: [H, 2, D], not [2, H, D].
- Rotary turns only the first quarter of a head. Its sections for time/height/width are interleaved, but text has the
  same position in all three, so plain angles are exact here.
- `A_log`, the gated norm's weight and the recurrent state are fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surefoot import ops
from surefoot.cache.plan import LinearStateSpec, PagedKVSpec
from surefoot.core.batch import Batch
from surefoot.core.errors import ModelError
from surefoot.layers.attention import attend
from surefoot.layers.gated_delta import GatedDeltaNet
from surefoot.layers.linear import Embedding, Linear
from surefoot.layers.mlp import GatedMLP
from surefoot.layers.norm import RMSNorm
from surefoot.layers.rotary import RopeConfig, RotaryEmbedding
from surefoot.models.base import CausalLM, require, require_silu


@dataclass(frozen=True)
class Qwen3_5Config:
    """Fields of the text part of an HF Qwen3.5 config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layer_types: tuple[str, ...]
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    attention_bias: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    initializer_range: float

    @classmethod
    def from_hf(cls, config: dict[str, Any], tie_word_embeddings: bool) -> Qwen3_5Config:
        require_silu(config)
        if not config.get("attn_output_gate", True):
            raise ModelError("config.json: attn_output_gate false is not supported (no released Qwen3.5 has it)")
        vocab, hidden, inter, layers, heads, kv_heads = require(
            config,
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
        )
        if heads % kv_heads:
            raise ModelError(f"config.json: {heads} attention heads cannot share {kv_heads} KV heads evenly")
        k_heads, v_heads = config.get("linear_num_key_heads", 16), config.get("linear_num_value_heads", 32)
        if v_heads % k_heads:
            raise ModelError(f"config.json: {v_heads} linear value heads cannot share {k_heads} key heads evenly")
        head_dim = config.get("head_dim", 256)
        max_len = config.get("max_position_embeddings", 32768)
        # As transformers' config class: a quarter of the head turns unless the file says otherwise.
        rope_source = {"partial_rotary_factor": 0.25} | config
        return cls(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=inter,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            layer_types=_layer_types(config, layers),
            linear_num_key_heads=k_heads,
            linear_num_value_heads=v_heads,
            linear_key_head_dim=config.get("linear_key_head_dim", 128),
            linear_value_head_dim=config.get("linear_value_head_dim", 128),
            linear_conv_kernel_dim=config.get("linear_conv_kernel_dim", 4),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=RopeConfig.from_hf(rope_source, head_dim, max_len),
            attention_bias=config.get("attention_bias", False),
            tie_word_embeddings=tie_word_embeddings,
            max_position_embeddings=max_len,
            initializer_range=config.get("initializer_range", 0.02),
        )


def _layer_types(config: dict[str, Any], layers: int) -> tuple[str, ...]:
    interval = config.get("full_attention_interval", 4)
    types = config.get("layer_types") or [
        "linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers)
    ]
    if len(types) < layers:
        raise ModelError(f"config.json: {len(types)} layer_types for {layers} layers")
    if unknown := sorted(set(types) - {"linear_attention", "full_attention"}):
        raise ModelError(f"config.json: unknown layer type {unknown[0]!r} (known: linear_attention, full_attention)")
    return tuple(types[:layers])


class Qwen3_5Attention(nn.Module):
    """Full attention with per-head q/k norms, partial rotary and a sigmoid gate on the output."""

    def __init__(self, config: Qwen3_5Config, layer_idx: int):
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, config.head_dim
        self.num_kv_heads = config.num_key_value_heads
        q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, 2 * q_size, config.attention_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, config.attention_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, config.attention_bias)
        self.o_proj = Linear(q_size, config.hidden_size, config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, offset=1.0)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, offset=1.0)
        self.scale = config.head_dim**-0.5

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: Batch) -> torch.Tensor:
        q, gate = self.q_proj(x).unflatten(-1, (-1, 2, self.head_dim)).unbind(-2)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k = ops.rotary(self.q_norm(q), self.k_norm(k), cos, sin)
        out = attend(q, k, v, batch, self.layer_idx, self.scale)
        # The gate is every other head of q_proj's result: taken as it lies, it need not be copied.
        return self.o_proj(ops.sigmoid_mul(out.view_as(gate), gate).flatten(1))


class Qwen3_5DecoderLayer(nn.Module):
    """x [T, hidden] -> [T, hidden]; holds `linear_attn` or `self_attn`, as its layer type says."""

    def __init__(self, config: Qwen3_5Config, layer_idx: int):
        super().__init__()
        self.is_linear = config.layer_types[layer_idx] == "linear_attention"
        if self.is_linear:
            self.linear_attn = GatedDeltaNet(
                layer_idx,
                config.hidden_size,
                config.linear_num_key_heads,
                config.linear_num_value_heads,
                config.linear_key_head_dim,
                config.linear_value_head_dim,
                config.linear_conv_kernel_dim,
                config.rms_norm_eps,
            )
        else:
            self.self_attn = Qwen3_5Attention(config, layer_idx)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, offset=1.0)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, offset=1.0)

    def state_spec(self) -> PagedKVSpec | LinearStateSpec:
        if self.is_linear:
            return self.linear_attn.state_spec()
        return PagedKVSpec(self.self_attn.num_kv_heads, self.self_attn.head_dim)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: Batch) -> torch.Tensor:
        h = self.input_layernorm(x)
        mixed = self.linear_attn(h, batch) if self.is_linear else self.self_attn(h, cos, sin, batch)
        h, x = self.post_attention_layernorm(mixed, residual=x)
        return ops.add(x, self.mlp(h))


class Qwen3_5TextModel(nn.Module):
    def __init__(self, config: Qwen3_5Config):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Qwen3_5DecoderLayer(config, i) for i in range(len(config.layer_types)))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, offset=1.0)
        self.rotary_emb = RotaryEmbedding(config.rope)

    def forward(self, batch: Batch) -> torch.Tensor:
        x = self.embed_tokens(batch.input_ids)
        cos, sin = self.rotary_emb(batch.positions, batch.rope_lens)
        for layer in self.layers:
            x = layer(x, cos, sin, batch)
        return self.norm(x)


class Qwen3_5CausalLM(CausalLM):
    """What both containers share."""

    config: Qwen3_5Config
    # One output per head: small, and they set the decay and the step of the recurrent state.
    quant_exclude = (*CausalLM.quant_exclude, r".*\.in_proj_[ab]")

    def _init_base(self, config: Qwen3_5Config) -> None:
        CausalLM.__init__(
            self,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            max_position_embeddings=config.max_position_embeddings,
            initializer_range=config.initializer_range,
        )
        self.config = config

    @property
    def text_model(self) -> Qwen3_5TextModel:
        raise NotImplementedError

    @property
    def decoder_layers(self) -> nn.ModuleList:
        return self.text_model.layers

    @property
    def rotary(self) -> RotaryEmbedding:
        return self.text_model.rotary_emb

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.text_model(batch)

    def param_dtype(self, name: str, default: torch.dtype) -> torch.dtype:
        return torch.float32 if name.endswith((".A_log", "linear_attn.norm.weight")) else default

    def init_weight(self, name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
        if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
            tensor.zero_()  # stored minus one
        else:
            super().init_weight(name, tensor, generator)


class Qwen3_5ForCausalLM(Qwen3_5CausalLM):
    architecture = "Qwen3_5ForCausalLM"
    ignored = (r"mtp\.",)

    def __init__(self, hf_config: dict[str, Any]):
        text = hf_config.get("text_config") or hf_config
        self._init_base(Qwen3_5Config.from_hf(text, text.get("tie_word_embeddings", False)))
        self.model = Qwen3_5TextModel(self.config)
        self.lm_head = Linear(self.config.hidden_size, self.config.vocab_size)
        if self.config.tie_word_embeddings:
            self.tie_lm_head("model.embed_tokens")

    @property
    def text_model(self) -> Qwen3_5TextModel:
        return self.model


class Qwen3_5Model(nn.Module):
    """Container with HF's name for the multimodal model; the vision tower is not loaded."""

    def __init__(self, config: Qwen3_5Config):
        super().__init__()
        self.language_model = Qwen3_5TextModel(config)


class Qwen3_5ForConditionalGeneration(Qwen3_5CausalLM):
    """Text only: images are refused upstream, `model.visual.*` and `mtp.*` are named as ignored."""

    architecture = "Qwen3_5ForConditionalGeneration"
    ignored = (r"mtp\.", r"model\.visual\.")

    def __init__(self, hf_config: dict[str, Any]):
        (text,) = require(hf_config, "text_config")
        tied = hf_config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        self._init_base(Qwen3_5Config.from_hf(text, tied))
        self.model = Qwen3_5Model(self.config)
        self.lm_head = Linear(self.config.hidden_size, self.config.vocab_size)
        if tied:
            self.tie_lm_head("model.language_model.embed_tokens")

    @property
    def text_model(self) -> Qwen3_5TextModel:
        return self.model.language_model
