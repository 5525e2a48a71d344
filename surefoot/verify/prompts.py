"""What a proof is made over: prompts in English and Chinese, the reference's continuation of each, and one long text.

Everything that is scored is token ids, the same for both sides: prompt plus continuation (teacher forcing), so that the
sides never drift apart. The long text mixes languages, digits and code and covers late positions.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surefoot.core.errors import InputError

QUESTIONS = (
    "请介绍一下你自己",
    "写一个Python函数计算斐波那契数列",
    "中国的首都是哪里?",
    "请解释一下机器学习是什么?",
    "1+2+3+4+5等于多少?",
)
COMPLETIONS = (
    "The capital of France is",
    "Machine learning is a branch of",
    "The meaning of life according to philosophy is",
    "Artificial intelligence will",
    "Python is a programming language used for",
    "The solar system consists of",
    "Quantum computing works by",
    "The theory of relativity was proposed by",
    "法国的首都是",
    "机器学习是一种",
    "人工智能将会",
)
LONG_TEXT = (
    "The harbour woke slowly. 渔船一只接一只地回来,甲板上堆满了银色的鱼。 On 17 March 1998 the ledger shows 4,096 "
    "crates at 3.75 each, 15,360 in total; 税率是百分之十三。\n\n```python\ndef total(crates: int, price: float):\n"
    '    """Price of all crates."""\n    return crates * price\n```\n\n'
    "“Is that right?” she asked. 他想了想,说:“差不多对,但是最后一行错了。” The wind turned east at 06:30, "
    "https://example.org/tide?port=7&unit=m gave 2.4 m, and nobody believed it. "
    "春天的时候,山上的雪化了,河水涨得很高;老人们说,从前的桥比现在的低。 It is a truth that a good bridge is dull: "
    "it holds, day after day, and no song is written about it. x² + y² = z², 3² + 4² = 5². 再见! "
)


@dataclass
class Prompt:
    """messages or text; ids: the reference's token ids."""

    name: str
    messages: list[dict[str, Any]] | None = None
    text: str | None = None
    ids: list[int] = field(default_factory=list)


@dataclass
class PromptSet:
    """prompts: as asked.  sequences: the token ids to score, teacher-forced.  source: where they come from."""

    source: str
    prompts: list[Prompt]
    sequences: list[list[int]] = field(default_factory=list)

    def digest(self) -> str:
        return digest(self.sequences)


def digest(sequences: list[list[int]]) -> str:
    """SHA-256 over token ids."""
    return hashlib.sha256(json.dumps(sequences, separators=(",", ":")).encode()).hexdigest()


def built_in(has_template: bool) -> PromptSet:
    """Chats where the model has a template, else the same questions as plain text; and the completions."""
    asked = [
        Prompt(text, messages=[{"role": "user", "content": text}]) if has_template else Prompt(text, text=text)
        for text in QUESTIONS
    ]
    return PromptSet("built in", asked + [Prompt(text, text=text) for text in COMPLETIONS])


def read_file(path: Path, has_template: bool) -> PromptSet:
    """A .jsonl file (messages, prompt, question, text or turns per line), or a text file with a prompt per line."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    if not lines:
        raise InputError(f"{path} holds no prompts")
    as_json = path.suffix in (".jsonl", ".json", ".ndjson")
    found = [_from_json(line, path, i + 1) if as_json else line for i, line in enumerate(lines)]
    return PromptSet(str(path), [_prompt(value, i, has_template) for i, value in enumerate(found)])


def _from_json(line: str, path: Path, number: int) -> Any:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path} line {number} is not JSON: {error}") from None
    if isinstance(value, str):
        return value
    for key in ("messages", "prompt", "question", "text", "turns"):
        found = value.get(key) if isinstance(value, dict) else None
        if key == "messages" and isinstance(found, list) and found:
            return found
        if isinstance(found, list) and found and isinstance(found[0], str):
            return found[0]
        if isinstance(found, str) and found:
            return found
    raise InputError(f'{path} line {number} needs a "prompt" (text) or "messages" (a list)')


def _prompt(value: str | list[dict[str, Any]], index: int, has_template: bool) -> Prompt:
    if isinstance(value, list):
        if not has_template:
            raise InputError(f"prompt {index + 1} is a chat, but the model has no chat template: give plain text")
        return Prompt(f"prompt {index + 1}", messages=value)
    if has_template:
        return Prompt(value[:60], messages=[{"role": "user", "content": value}])
    return Prompt(value[:60], text=value)


def random_ids(vocab_size: int, long_tokens: int, seed: int, count: int = 12, length: int = 40) -> PromptSet:
    """Seeded token ids for models without a tokenizer."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[int]:
        return torch.randint(0, vocab_size, (n,), generator=generator).tolist()

    prompts = [Prompt(f"random ids {i}", ids=draw(length)) for i in range(count)]
    return PromptSet(f"random token ids, seed {seed}", prompts, [p.ids for p in prompts] + [draw(long_tokens)])
