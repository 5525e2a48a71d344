"""Byte-level BPE tokenizers in the official layout: text tokens first, special tokens at the end."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from .recipes import Recipe


def build_tokenizer(recipe: Recipe, texts: list[str]) -> Tokenizer:
    """Train a vocabulary on ``texts``; all 256 bytes are in it, so that any input can be encoded."""
    tok = Tokenizer(models.BPE(ignore_merges=recipe.bos is not None))
    if recipe.nfc:
        tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(recipe.split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size - len(recipe.specials),
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(sorted(set(texts)), trainer)
    tok.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in recipe.specials])
    tok.post_processor = _post_processor(recipe, tok)
    return tok


def _post_processor(recipe: Recipe, tok: Tokenizer) -> processors.PostProcessor:
    """Llama 3 puts the BOS before every text it encodes; Qwen adds nothing."""
    byte_level = processors.ByteLevel(trim_offsets=False)
    if recipe.bos is None:
        return byte_level
    template = processors.TemplateProcessing(
        single=f"{recipe.bos} $A",
        pair=f"{recipe.bos} $A {recipe.bos}:1 $B:1",
        special_tokens=[(recipe.bos, tok.token_to_id(recipe.bos))],
    )
    return processors.Sequence([byte_level, template])


def special_ids(recipe: Recipe, tok: Tokenizer) -> dict[str, int]:
    """The number of each special token."""
    return {text: tok.token_to_id(text) for text in recipe.specials}


def save_tokenizer(recipe: Recipe, tok: Tokenizer, folder: Path) -> None:
    """Write the tokenizer files by hand: transformers' own writer names classes that older versions do not know."""
    text = json.dumps(json.loads(tok.to_str()), ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    named = {"bos_token": recipe.bos, "eos_token": recipe.eos, "pad_token": recipe.eod}
    named = {key: value for key, value in named.items() if value is not None}
    config = {
        **named,
        "chat_template": recipe.template,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 8192,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", named)
    (folder / "chat_template.jinja").write_text(recipe.template, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Readable JSON with Chinese left as it is."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
