"""Models to drill on: the canaries, and tiny random ones of both families, awkward on purpose, in HF format.

Random ones are made by transformers with norms, biases and decays random too, so that none of them is the identity that
would hide a fault. "massive": at one token of seven a channel of the residual stream is 3000 and the others are loud,
as at the sink tokens of real models. "overflow": activations that fp16 cannot hold.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surefoot.canaries import CANARIES, path

LLAMA: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
QWEN: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
NOBODY = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
MASSIVE_EVERY, MASSIVE_CHANNEL, MASSIVE, OVERFLOWING = 7, 7, 3000.0, 300.0


@dataclass(frozen=True)
class Specimen:
    """A model to drill on. family: "llama" or "qwen3.5"; kind: "canary", "random", "massive" or "overflow"."""

    name: str
    family: str
    kind: str
    model_ref: str

    @property
    def answers_to(self) -> tuple[str, ...]:
        """Families in `Fault.models` that it stands for."""
        return (f"{self.family}-overflow",) if self.kind == "overflow" else (self.family,)


def canary(name: str) -> Specimen:
    return Specimen(name, name.removeprefix("canary-"), "canary", str(path(name)))


def canaries() -> list[Specimen]:
    return [canary(name) for name in CANARIES]


def random(folder: Path, family: str, seed: int, kind: str = "random", **changes: Any) -> Specimen:
    """Make a tiny model and write it to a folder of its own inside `folder`."""
    name = f"{family}-{kind}-{seed}"
    untied = {"tie_word_embeddings": False} if kind == "massive" else {}
    model = _build(family, seed, untied | changes)
    with torch.no_grad():
        if kind == "massive":
            loud = model.model.embed_tokens.weight[::MASSIVE_EVERY]
            loud *= MASSIVE / 30
            loud[:, MASSIVE_CHANNEL] = MASSIVE
        if kind == "overflow":
            for layer in model.model.layers:
                layer.mlp.up_proj.weight *= OVERFLOWING
                layer.mlp.gate_proj.weight *= OVERFLOWING
    with quiet():
        model.save_pretrained(folder / name)
    return Specimen(name, family, kind, str(folder / name))


def _build(family: str, seed: int, changes: dict[str, Any]) -> Any:
    import transformers

    model: Any
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # transformers draws the convolution by the global generator
        if family == "llama":
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(LLAMA | NOBODY | changes)))
        else:
            model = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**(QWEN | NOBODY | changes)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("A_log"):
                # NOTE: transformers draws rates up to 16: forgetting within a token, many faults of a state are one.
                p.copy_(torch.empty(p.shape).uniform_(0.01, 1.0, generator=generator).log_())
            elif p.ndim == 1:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
            elif p.ndim == 2:
                p.copy_(torch.randn(p.shape, generator=generator) * model.config.initializer_range)
    return model.float().eval()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars and advice."""
    from transformers.utils import logging as hf_logging

    bars, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
