"""Angles of the rotary embedding for packed positions: rope types default, linear, dynamic and llama3.

Formulas follow transformers' `modeling_rope_utils` (5.x), in fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from surefoot import ops
from surefoot.core.errors import ModelError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """Rope settings of a model, from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (4)."""

    head_dim: int
    max_position_embeddings: int
    theta: float = 10000.0
    rope_type: str = "default"
    partial_rotary_factor: float = 1.0
    scaling: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_hf(cls, config: dict[str, Any], head_dim: int, max_position_embeddings: int) -> RopeConfig:
        raw = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
        rope_type = raw.get("rope_type", raw.get("type", "default"))
        if rope_type == "mrope":  # the older spelling of default with sections for images
            rope_type = "default"
        if rope_type not in ROPE_TYPES:
            raise ModelError(f"rope type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
        theta = raw.get("rope_theta", config.get("rope_theta", 10000.0))
        partial = raw.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        needed = {"linear": ["factor"], "dynamic": ["factor"]}.get(rope_type, [])
        if rope_type == "llama3":
            needed = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
        if missing := [k for k in needed if k not in raw]:
            raise ModelError(f"config.json: rope type {rope_type!r} lacks {', '.join(missing)}")
        scaling = {k: float(raw[k]) for k in needed}
        return cls(head_dim, max_position_embeddings, float(theta), rope_type, float(partial), scaling)

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def max_length(self) -> int:
        """Tokens that the model can be run on: stretched ropes reach `factor` times beyond the trained length, as vLLM
        takes it for these types (llama3 configs state the stretched length themselves)."""
        stretched = self.rope_type in ("linear", "dynamic")
        return int(self.max_position_embeddings * (self.scaling["factor"] if stretched else 1))

    @property
    def depends_on_length(self) -> bool:
        return self.rope_type == "dynamic"


class RotaryEmbedding(nn.Module):
    """positions [T] -> cos, sin [T, rotary_dim / 2] in fp32."""

    inv_freq: torch.Tensor

    def __init__(self, config: RopeConfig):
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq", None, persistent=False)

    def finalize(self, device: torch.device) -> None:
        self.inv_freq = inverse_frequencies(self.config, device)

    def forward(self, positions: torch.Tensor, rope_lens: torch.Tensor | None = None):
        inv_freq = self.inv_freq
        if rope_lens is not None:
            inv_freq = dynamic_inverse_frequencies(self.config, inv_freq, rope_lens)
        return ops.rotary_angles(positions, inv_freq)


def inverse_frequencies(config: RopeConfig, device: torch.device) -> torch.Tensor:
    """[rotary_dim / 2] fp32. Type dynamic starts as default (it changes only beyond the trained length)."""
    dim = config.rotary_dim
    inv_freq = 1.0 / config.theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    if config.rope_type == "linear":
        return inv_freq / config.scaling["factor"]
    if config.rope_type == "llama3":
        return _llama3(inv_freq, **config.scaling)
    return inv_freq


def _llama3(
    inv_freq: torch.Tensor,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> torch.Tensor:
    """Slow waves are divided by `factor`, fast ones kept, those between blended smoothly (Llama 3.1)."""
    wavelength = 2 * math.pi / inv_freq
    turns = original_max_position_embeddings / wavelength
    smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    low = wavelength > original_max_position_embeddings / low_freq_factor
    high = wavelength < original_max_position_embeddings / high_freq_factor
    return torch.where(low, inv_freq / factor, torch.where(high, inv_freq, blended))


def dynamic_inverse_frequencies(config: RopeConfig, inv_freq: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """NTK-aware base stretched by each token's governing length [T] -> [T, rotary_dim / 2].

    NOTE: transformers stretches by the longest length of a forward pass, so its result depends on how a prompt is cut.
    Here the length of a token is max(prompt length, its position + 1): equal to transformers' whole-prompt prefill
    followed by one-token steps, and independent of chunks, neighbours and preemption.
    """
    dim, factor, trained = config.rotary_dim, config.scaling["factor"], config.max_position_embeddings
    stretch = factor * lengths.clamp(min=trained).float() / trained - (factor - 1)
    base = config.theta * stretch ** (dim / (dim - 2))
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=lengths.device) / dim
    stretched = 1.0 / base.unsqueeze(-1) ** exponent
    return torch.where(lengths.unsqueeze(-1) > trained, stretched, inv_freq)
