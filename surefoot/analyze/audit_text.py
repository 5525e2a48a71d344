"""Which family a chat template belongs to, by the marks that only that family uses. Torch-free."""

from __future__ import annotations

import re

# The mark that shows a family in a prompt, most telling first: "[INST]" comes last, as Llama 2's and Mistral's.
MARKS = {
    "Llama 3": "<|start_header_id|>",
    "ChatML (Qwen)": "<|im_start|>",
    "Gemma": "<start_of_turn>",
    "DeepSeek": "<｜User｜>",
    "Llama 2 or Mistral": "[INST]",
}
NAMES = (
    (r"llama[-_ .]?3", "Llama 3"),
    (r"qwen", "ChatML (Qwen)"),
    (r"gemma", "Gemma"),
    (r"deepseek", "DeepSeek"),
    (r"llama[-_ .]?2|mistral|mixtral", "Llama 2 or Mistral"),
)


def family_in(prompt: str) -> str | None:
    """The family whose mark stands in the prompt."""
    return next((family for family, mark in MARKS.items() if mark in prompt), None)


def family_of(model: str, stated: str | None = None) -> str | None:
    """The family that a model's own template belongs to: as stated, or by its name; None if neither says."""
    if stated:
        return stated if stated in MARKS else None
    return next((family for pattern, family in NAMES if re.search(pattern, model, re.IGNORECASE)), None)
