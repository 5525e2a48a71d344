"""The two architectures, their tokenizers and their chat templates."""

from __future__ import annotations

from dataclasses import dataclass

LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)

LLAMA_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

QWEN_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@dataclass(frozen=True)
class Recipe:
    """What distinguishes one canary from the other, apart from its weights."""

    name: str
    vocab_size: int
    split: str
    nfc: bool
    specials: tuple[str, ...]
    bos: str | None
    eos: str  # ends a chat answer
    eod: str  # ends a plain completion
    template: str
    steps: int
    batch_tokens: int
    lr: float


LLAMA = Recipe(
    name="canary-llama",
    vocab_size=1536,
    split=LLAMA_SPLIT,
    nfc=False,
    specials=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    eod="<|end_of_text|>",
    template=LLAMA_TEMPLATE,
    steps=2000,
    batch_tokens=1024,
    lr=2e-3,
)

QWEN = Recipe(
    name="canary-qwen3.5",
    vocab_size=1280,
    split=QWEN_SPLIT,
    nfc=True,
    specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    bos=None,
    eos="<|im_end|>",
    eod="<|endoftext|>",
    template=QWEN_TEMPLATE,
    steps=1100,
    batch_tokens=1024,
    lr=2e-3,
)

RECIPES = {"llama": LLAMA, "qwen3.5": QWEN}


def llama_config(ids: dict[str, int]) -> dict:
    """Llama 3.2 in small: grouped heads of 64, tied embeddings, llama3 rope scaling.

    ``original_max_position_embeddings`` is 64 instead of 8192, so that the scaling changes the angles at the short
    distances that the canary sees: an engine which ignores the scaling is caught.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|begin_of_text|>"],
        "eos_token_id": [ids["<|end_of_text|>"], ids["<|eot_id|>"]],
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": LLAMA.vocab_size,
    }


def qwen_config(ids: dict[str, int]) -> dict:
    """Qwen3.5 text model in small: six gated delta net layers and two gated attention layers, heads of 256.

    There are twice as many value heads as key heads (unlike the 0.8B model), so that a wrong head mapping is caught.
    """
    kinds = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    return {
        "architectures": ["Qwen3_5ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "bos_token_id": None,
        "dtype": "bfloat16",
        "eos_token_id": ids["<|im_end|>"],
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "layer_types": kinds * 2,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 64,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 8192,
        "model_type": "qwen3_5_text",
        "num_attention_heads": 2,
        "num_hidden_layers": 8,
        "num_key_value_heads": 1,
        "pad_token_id": None,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": QWEN.vocab_size,
    }


def config_of(recipe: Recipe, ids: dict[str, int]) -> dict:
    """The ``config.json`` of a canary."""
    return llama_config(ids) if recipe is LLAMA else qwen_config(ids)


def generation_config(recipe: Recipe, ids: dict[str, int]) -> dict:
    """Greedy; both end tokens stop the generation, as in the official files."""
    out: dict = {"do_sample": False, "eos_token_id": sorted([ids[recipe.eod], ids[recipe.eos]])}
    return {**out, "bos_token_id": ids[recipe.bos]} if recipe.bos else {**out, "pad_token_id": ids[recipe.eod]}
