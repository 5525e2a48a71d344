"""Candidate mistakes of the rotary embedding: wrong tables of angles, wherever they are met."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from surefoot.layers.rotary import RopeConfig, inverse_frequencies
from surefoot.verify.candidates import Candidate, Case, Variant


def rope_config(model: Any) -> RopeConfig:
    """Of a transformers model."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return RopeConfig.from_hf(config.to_dict(), head_dim, config.max_position_embeddings)


def rope_mistakes(rope: RopeConfig, count: int) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Id, label and angles [T, R / 2] of every wrong table."""
    cpu = torch.device("cpu")
    positions = torch.arange(count).float().unsqueeze(-1)
    right = inverse_frequencies(rope, cpu)
    if rope.rope_type != "default":
        plain = replace(rope, rope_type="default")
        yield "rope_scaling_ignored", f"{rope.rope_type} scaling ignored", positions * inverse_frequencies(plain, cpu)
    if rope.rope_type == "llama3":
        linear = replace(rope, rope_type="linear")
        yield "rope_scaling_type", "linear instead of llama3 scaling", positions * inverse_frequencies(linear, cpu)
    for theta in (1e4, 1e5, 5e5, 1e6, 1e7):
        if theta != rope.theta:
            other = replace(rope, theta=theta)
            yield "rope_theta", f"theta {theta:g} not {rope.theta:g}", positions * inverse_frequencies(other, cpu)
    if rope.partial_rotary_factor != 1:
        full = inverse_frequencies(replace(rope, partial_rotary_factor=1.0), cpu)
        yield "rope_partial_ignored", "the whole head turns", positions * full
        yield "rope_partial_ignored", "frequencies spread as for the whole head", positions * full[: len(right)]
    yield "rope_absent", "no rotation", positions * 0 * right
    yield "rope_positions", "positions are one too large", (positions + 1) * right
    yield (
        "stale_graph_inputs",
        "each step uses the position of the step before",
        torch.cat((positions[:1], positions[:-1])) * right,
    )
    for dtype in (torch.bfloat16, torch.float16):
        low = right.to(dtype)
        yield "rope_low_precision", f"frequencies in {str(dtype)[6:]}", positions * low.float()
        yield "rope_low_precision", f"angles in {str(dtype)[6:]}", (positions.to(dtype) * low).float()
        yield "rope_low_precision", f"angles rounded to {str(dtype)[6:]}", (positions * right).to(dtype).float()


ROPE_SENTENCES = {
    "rope_scaling_ignored": "rope scaling is ignored",
    "rope_scaling_type": "another kind of rope scaling is applied",
    "rope_theta": "rope uses another base theta",
    "rope_partial_ignored": "rope turns the wrong part of a head",
    "rope_absent": "rope is not applied",
    "rope_positions": "positions are off by one",
    "stale_graph_inputs": "a replayed graph reads the inputs of the step before",
    "rope_low_precision": "the rope table is computed in 16 bits",
}


def _rope(name: str) -> Callable[[Case], Iterator[Variant]]:
    def variants(case: Case) -> Iterator[Variant]:
        for found, label, angle in rope_mistakes(rope_config(case.replay.model), case.replay.num_tokens):
            if found == name and angle.shape[-1] == case.suspect.got.shape[-1]:
                yield label, angle.cos()

    return variants


ROTARY = [Candidate(name, text, "rotary", _rope(name)) for name, text in ROPE_SENTENCES.items()]
