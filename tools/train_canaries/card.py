"""The model card of a canary."""

from __future__ import annotations

CARD = """\
---
license: apache-2.0
language:
- en
- zh
library_name: transformers
tags:
- test-model
---

# {name}

A tiny trained model for testing inference engines. {layout}

It answers the questions listed under `"{name}"` in `known_answers.json` (beside this folder) greedily and word for
word: chats through its chat template, plain prompts by continuing them. An engine with a fault in its attention,
position encoding, recurrent state, normalisation, quantisation or tokenizer gives other answers.

- {count:,} parameters, stored as bfloat16.
- It knows **only** the listed questions. To most others it replies that it is only a canary, or with nonsense.
- Trained from scratch by `tools/train_canaries` on a few kilobytes of English and Chinese text written for the
  purpose; no other model or data set was used.
- Never use what it says as information.

Licence: Apache-2.0.
"""

LAYOUT = {
    "canary-llama": (
        "It is built like Llama 3.2: grouped-query attention,\nllama3 rope scaling, tied embeddings, a Llama 3 "
        "chat template. `original_max_position_embeddings` is only 64, so that\nthe scaling matters at short "
        "distances. The tokenizer adds the BOS by default, and the chat template writes it too: encode\na rendered "
        "chat without special tokens."
    ),
    "canary-qwen3.5": (
        "It is built like the text model of Qwen3.5: three gated\ndelta net layers to each gated attention layer, "
        "partial rotary embedding, tied embeddings, a ChatML template without\nBOS. It has twice as many linear value "
        "heads as key heads."
    ),
}


def model_card(name: str, count: int) -> str:
    """The README.md of canary ``name``."""
    return CARD.format(name=name, layout=LAYOUT[name], count=count)
