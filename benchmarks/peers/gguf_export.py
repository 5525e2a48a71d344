"""Write a Llama config with random weights as GGUF (F16), then let llama.cpp's own quantiser make the other formats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

BLOCK = {
    "attn_norm.weight": "hidden",
    "ffn_norm.weight": "hidden",
    "attn_q.weight": ("q", "hidden"),
    "attn_k.weight": ("kv", "hidden"),
    "attn_v.weight": ("kv", "hidden"),
    "attn_output.weight": ("hidden", "q"),
    "ffn_gate.weight": ("inter", "hidden"),
    "ffn_up.weight": ("inter", "hidden"),
    "ffn_down.weight": ("hidden", "inter"),
}


def export_f16(folder: Path, out: Path) -> None:
    """Random numbers suffice: speed does not depend on the values, and nobody compares the text."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads, head_dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    size = {
        "hidden": config["hidden_size"],
        "inter": config["intermediate_size"],
        "q": heads * head_dim,
        "kv": kv_heads * head_dim,
    }
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(size["hidden"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(size["inter"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    writer.add_token_merges(["t0 t1"])  # an empty list is not written, and a file without merges is refused
    values = (np.random.default_rng(0).standard_normal(1 << 24, dtype=np.float32) * 0.02).astype(np.float16)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return np.resize(values, (rows, columns))

    writer.add_tensor("token_embd.weight", matrix(config["vocab_size"], size["hidden"]))
    writer.add_tensor("output_norm.weight", np.ones(size["hidden"], np.float32))
    for layer in range(config["num_hidden_layers"]):
        for name, shape in BLOCK.items():
            value = np.ones(size[shape], np.float32) if isinstance(shape, str) else matrix(*(size[s] for s in shape))
            writer.add_tensor(f"blk.{layer}.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(source: Path, out: Path, ftype: str) -> None:
    """ftype: "Q8_0", "Q4_0", ...; pure, so that the tied output layer has the same bits as the rest."""
    import llama_cpp

    from peers.llamacpp import silence

    silence()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{ftype}")
    params.pure = True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), params) != 0:
        raise SystemExit(f"llama.cpp could not quantise {source} to {ftype}")
