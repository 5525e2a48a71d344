"""The canaries: two tiny trained models that ship with the package, and what they must answer.

A canary knows a short list of questions and answers them greedily, word for word. An engine which gets an answer
wrong has a fault somewhere, and finding that out needs no download and takes seconds. This module only says where the
files are; it imports nothing heavy.
"""

from __future__ import annotations

import json
from pathlib import Path

CANARIES: tuple[str, ...] = ("canary-llama", "canary-qwen3.5")

_HERE = Path(__file__).resolve().parent


def path(name: str) -> Path:
    """The folder of canary ``name``, in Hugging Face format."""
    if name not in CANARIES:
        raise KeyError(f"no canary is called {name!r}; there are {', '.join(CANARIES)}")
    return _HERE / name


def known_answers(name: str) -> list[dict]:
    """What canary ``name`` must answer.

    Each item has an ``answer`` and either ``messages`` (a chat, to be rendered by the canary's own template) or a
    ``prompt`` (plain text, encoded with the tokenizer's default special tokens). The answer is followed by the
    model's end token: end of turn for chats, end of text for prompts.
    """
    path(name)  # complain about unknown names in one place
    with open(_HERE / "known_answers.json", encoding="utf-8") as file:
        return json.load(file)[name]
