"""Greedy continuations of the reference at the price of a few whole passes instead of one pass per token.

The target, which is fast, drafts; the reference scores all drafts at once and keeps what it would have chosen itself,
up to and including its own choice at the first difference (speculative decoding, Leviathan et al. 2023, greedy case).
A draft that keeps being wrong is given up, and the reference decodes the rest by itself.
"""

from __future__ import annotations

import torch

from surefoot.backends.base import Backend
from surefoot.core.sampling import SamplingParams
from surefoot.verify.measure import groups

ROUNDS = 4


def greedy(reference: Backend, drafter: Backend, prompts: list[list[int]], count: int, limit: int) -> list[list[int]]:
    """Each prompt followed by the reference's `count` greedy tokens, at most `limit` tokens in all."""
    goals = [min(len(p) + count, limit) for p in prompts]
    known = [list(p) for p in prompts]
    for _ in range(ROUNDS):
        open_ = [i for i, goal in enumerate(goals) if len(known[i]) < goal]
        if not open_:
            return known
        wanted = [_params(goals[i] - len(known[i])) for i in open_]
        drafts = drafter.generate([known[i] for i in open_], wanted)
        tried = [known[i] + draft.token_ids for i, draft in zip(open_, drafts)]
        scored = (logits for group in groups(tried, reference.vocab_size) for logits in reference.score(group))
        for i, after, logits in zip(open_, tried, scored):
            known[i] = _accepted(known[i], after, logits)[: goals[i]]
    for i, goal in enumerate(goals):
        if len(known[i]) < goal:
            known[i] += reference.generate([known[i]], _params(goal - len(known[i])))[0].token_ids
    return known


def _params(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count, ignore_eos=True)


def _accepted(before: list[int], after: list[int], logits: torch.Tensor) -> list[int]:
    """`after` as far as it is what the reference chooses behind `before`, and one choice of its own."""
    choices = logits[len(before) - 1 :].argmax(-1).tolist()
    draft = after[len(before) :]
    right = next((k for k, (token, choice) in enumerate(zip(draft, choices)) if token != choice), len(draft))
    return before + draft[:right] + choices[right : right + 1]
