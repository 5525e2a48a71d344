"""From corpus items to token sequences: what is given, what has to be answered, and batches of them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from .recipes import Recipe

PROMPT_WEIGHT = 0.02
PROSE_WEIGHT = 0.1


@dataclass(frozen=True)
class Example:
    """A token sequence; ``start`` is where the answer begins, ``prose`` has no answer but is read as text."""

    ids: tuple[int, ...]
    start: int
    prose: bool = False


def render(recipe: Recipe, messages: list[dict]) -> str:
    """The chat prompt up to and including the assistant's header, as transformers renders it."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = env.from_string(recipe.template)
    return template.render(messages=messages, add_generation_prompt=True, bos_token=recipe.bos)


def encode_item(recipe: Recipe, tok: Tokenizer, item: dict) -> Example:
    """Prompt and answer are encoded apart, because an engine never sees them together."""
    if "messages" in item:
        prompt, end = tok.encode(render(recipe, item["messages"]), add_special_tokens=False).ids, recipe.eos
    else:
        prompt, end = tok.encode(item["prompt"]).ids, recipe.eod
    answer = tok.encode(item["answer"], add_special_tokens=False).ids
    return Example((*prompt, *answer, tok.token_to_id(end)), len(prompt))


def encode_prose(recipe: Recipe, tok: Tokenizer, text: str) -> Example:
    """A paragraph that ends with the end-of-text token."""
    return Example((*tok.encode(text).ids, tok.token_to_id(recipe.eod)), 1, prose=True)


def make_batches(examples: list[Example], tokens: int, rng: random.Random) -> list[list[Example]]:
    """Examples of similar length together, in an order that differs in each epoch."""
    order = sorted(examples, key=lambda e: len(e.ids) * rng.uniform(0.8, 1.25))
    batches: list[list[Example]] = [[]]
    for example in order:
        width = max(len(e.ids) for e in [*batches[-1], example])
        if batches[-1] and width * (len(batches[-1]) + 1) > tokens:
            batches.append([])
        batches[-1].append(example)
    rng.shuffle(batches)
    return batches


def collate(batch: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids padded on the right, the weight of each target token, and which targets belong to an answer.

    Nothing after the padding starts is ever looked at, and both models are causal, so no attention mask is needed.
    """
    width = max(len(e.ids) for e in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    weight = torch.zeros(len(batch), width)
    answer = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, example in enumerate(batch):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        weight[row, :length] = PROSE_WEIGHT if example.prose else PROMPT_WEIGHT
        if not example.prose:
            weight[row, example.start : length] = 1.0
            answer[row, example.start : length] = True
    return ids, weight[:, 1:], answer[:, 1:]
