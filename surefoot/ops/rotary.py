"""Rotary position embedding, "half" (NeoX) layout over the first rotary dimensions: the angles, and turning by them."""

from __future__ import annotations

import torch

from surefoot.ops.samples import ELEMENTWISE, nbytes, randn
from surefoot.ops.spec import Cost, OpSpec, Sample, define, dispatch


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
    """Rotate pairs (x[i], x[i + R]) by the token's angle i and leave dimensions from 2R on as they are.

    q: [T, H, D]; k: [T, Hk, D]; cos, sin: [T, R] fp32 with 2R <= D. Returns new (q, k).
    """
    return dispatch(ROTARY, q.device.type, (q, k, cos, sin), {})


def rotary_angles(positions: torch.Tensor, inv_freq: torch.Tensor):
    """(cos, sin) [T, R] fp32 of positions [T] int64 times inv_freq, [R] fp32 or, a row for each token, [T, R]."""
    return dispatch(ROTARY_ANGLES, positions.device.type, (positions, inv_freq), {})


def _angles(positions, inv_freq):
    angle = positions.float().unsqueeze(-1) * inv_freq
    return angle.cos(), angle.sin()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    a, b = x[..., :half].float(), x[..., half : 2 * half].float()
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat((turned, x[..., 2 * half :]), dim=-1)


def _rotary(q, k, cos, sin):
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _samples():
    def sample(name, tokens, heads, kv_heads, head_dim, half):
        def make(dtype, device, gen):
            angle = torch.rand(tokens, half, generator=gen) * 6.3
            return {
                "q": randn((tokens, heads, head_dim), dtype, device, gen),
                "k": randn((tokens, kv_heads, head_dim), dtype, device, gen),
                "cos": angle.cos().to(device),
                "sin": angle.sin().to(device),
            }

        return Sample(name, make)

    return [
        sample("llama-1b decode", 8, 32, 8, 64, 32),
        sample("llama-3b prefill", 129, 24, 8, 128, 64),
        sample("qwen3.5 partial", 17, 8, 2, 256, 32),
        sample("one token, one head", 1, 1, 1, 8, 4),
        sample("narrow head", 3, 2, 1, 6, 2),
    ]


def _angle_samples():
    def sample(name, positions, half, each=False):
        def make(dtype, device, gen):
            inv_freq = torch.rand(*([len(positions)] if each else []), half, generator=gen)
            return {"positions": torch.tensor(positions, device=device), "inv_freq": inv_freq.to(device)}

        return Sample(name, make)

    return [
        sample("decode", [0, 17, 8191, 131071], 32),
        sample("prefill", list(range(100, 229)), 64),
        sample("one, odd", [5], 7),
        sample("a row each", [1, 40000], 32, each=True),
    ]


ROTARY_ANGLES = define(
    OpSpec(
        "rotary_angles",
        _angles,
        cost=lambda positions, inv_freq: Cost(
            40.0 * positions.numel() * inv_freq.shape[-1],
            nbytes(positions, inv_freq) + 8 * positions.numel() * inv_freq.shape[-1],
        ),
        samples=_angle_samples,
        tolerance=ELEMENTWISE,
    )
)
ROTARY = define(
    OpSpec(
        "rotary",
        _rotary,
        cost=lambda q, k, cos, sin: Cost(3 * (q.numel() + k.numel()), 2 * nbytes(q, k) + nbytes(cos, sin)),
        samples=_samples,
        tolerance=ELEMENTWISE,
    )
)
