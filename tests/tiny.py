"""Tiny random models of both families, in HF format, awkward on purpose; and transformers as the other opinion."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch

LLAMA = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
QWEN = {
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
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CONFIGS = {
    "llama": ("llama", {}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-mha-odd-head-dim": ("llama", {"num_key_value_heads": 6, "head_dim": 10}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-rope-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-rope-dynamic": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
            "max_position_embeddings": 100,
        },
    ),
    "llama-rope-llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "qwen3.5": ("qwen3.5", {}),
    "qwen3.5-untied-equal-heads": (
        "qwen3.5",
        {"tie_word_embeddings": False, "linear_num_key_heads": 4, "linear_conv_kernel_dim": 2},
    ),
    "qwen3.5-bias-one-kv-head": ("qwen3.5", {"attention_bias": True, "num_key_value_heads": 1}),
    "qwen3.5-all-linear": ("qwen3.5", {"layer_types": ["linear_attention"] * 4}),
}


def need_transformers_of(model: str) -> None:
    """Skip when the installed transformers is older than the model's family."""
    version = importlib.metadata.version("transformers")
    if "qwen3.5" in model and tuple(map(int, version.split(".")[:2])) < (5, 2):
        pytest.skip(f"transformers {version} has no Qwen3.5 (5.2 and newer have)")


def reference(name: str):
    """The transformers model of a named config: fp32, eager attention, norms and biases random too."""
    import transformers

    from surefoot.weights.hf_config import rope_of_version_4

    family, changes = CONFIGS[name]
    need_transformers_of(family)
    if family == "llama":
        config = transformers.LlamaConfig(**(LLAMA | changes))
        rope_of_version_4(config)
        cls = transformers.LlamaForCausalLM
    else:
        config = transformers.Qwen3_5TextConfig(**(QWEN | changes))
        cls = transformers.Qwen3_5ForCausalLM
    config._attn_implementation = "eager"
    torch.manual_seed(sum(name.encode()))
    model = cls(config).float().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.ndim == 1 and not key.endswith("A_log"):
                p.add_(torch.randn_like(p) * 0.2)
    return model


def save(model, folder: Path) -> Path:
    """Write an HF folder without a tokenizer."""
    model.save_pretrained(folder)
    return folder


def prompts(count: int, vocab: int, seed: int = 0, lengths: tuple[int, ...] = (1, 2, 3, 5, 17, 33, 64, 90)):
    """Ragged random prompts; the lengths include one token, the conv kernel, and page and chunk edges."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (lengths[i % len(lengths)],), generator=generator).tolist() for i in range(count)]


@torch.no_grad()
def reference_logits(model, ids: list[int]) -> torch.Tensor:
    """Plain whole forward: [T, vocab]."""
    return model(torch.tensor([ids]), use_cache=False).logits[0].float()


@torch.no_grad()
def reference_greedy(model, ids: list[int], count: int) -> list[int]:
    """Greedy continuation with transformers' own cache, one plain forward a token."""
    # NOTE: transformers' cache cannot tell its length when every layer is linear attention.
    cached = "full_attention" in getattr(model.config, "layer_types", ["full_attention"])
    out, cache, feed = [], None, torch.tensor([ids])
    for _ in range(count):
        result = model(feed, past_key_values=cache, use_cache=cached)
        cache = result.past_key_values
        out.append(int(result.logits[0, -1].argmax()))
        feed = torch.tensor([[out[-1]] if cached else ids + out])
    return out
