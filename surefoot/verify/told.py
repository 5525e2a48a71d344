"""What a server tells about its logits, as rows that the gate can judge like logits.

Per token a server gives the log-probabilities of the token itself and of some alternatives: a small vocabulary. Rows of
both sides are taken at these entries only, so `metrics.logit_rows` applies; KL is that of the distributions over them.
An anchor, equal on both sides and below every entry, keeps an error visible that all entries share (taking off the mean
would hide it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from surefoot.core.outputs import TokenLogprob
from surefoot.verify import metrics
from surefoot.verify.measure import Measurer
from surefoot.verify.pack import pack_index, pack_rows


@dataclass
class Told:
    """One sequence of T tokens. entries[t]: about token t given those before it, None where nothing was told."""

    token_ids: list[int]
    entries: list[TokenLogprob | None]
    places: list[int] = field(init=False)
    ids: torch.Tensor = field(init=False)
    values: torch.Tensor = field(init=False)
    told: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        """places: the t of the N entries.  ids, values, told: [N, K] tokens, their values, whether there is one."""
        self.places = [t for t, entry in enumerate(self.entries) if entry is not None and t > 0]
        pairs = [_pairs(entry) for t in self.places if (entry := self.entries[t]) is not None]
        width = max(map(len, pairs), default=1)
        self.ids = torch.zeros(len(pairs), width, dtype=torch.long)
        self.values = torch.zeros(len(pairs), width)
        self.told = torch.zeros(len(pairs), width, dtype=torch.bool)
        for i, row in enumerate(pairs):
            self.ids[i, : len(row)] = torch.tensor([t for t, _ in row])
            self.values[i, : len(row)] = torch.tensor([v for _, v in row])
            self.told[i, : len(row)] = True

    def pick(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [N, K] at the told entries, from logits [T, vocab]."""
        rows = logits[[t - 1 for t in self.places]]
        return rows.gather(1, self.ids) - rows.logsumexp(-1, keepdim=True)

    def rows(self, right: torch.Tensor, got: torch.Tensor) -> metrics.Rows:
        """`metrics.logit_rows` of picked values."""
        finite = torch.where(self.told & torch.isfinite(right), right, 0.0)
        anchor = finite.amin(-1, keepdim=True) - 1.0
        both = [torch.cat([torch.where(self.told, side, anchor), anchor], dim=-1) for side in (right, got)]
        return metrics.logit_rows(*both)


def _pairs(entry: TokenLogprob) -> list[tuple[int, float]]:
    return [(entry.token_id, entry.logprob)] + [(t, v) for t, v in entry.top if t != entry.token_id]


def each(backend: Any, sequences: Sequence[list[int]]) -> Iterator[torch.Tensor]:
    """Logits [T, vocab] of one sequence at a time; a streamed reference reads its weights once for all of them."""
    if hasattr(backend, "score_each"):
        yield from backend.score_each(sequences)
    else:
        for sequence in sequences:
            yield backend.score([sequence])[0]


def logits_evidence(measurer: Measurer, told: Sequence[Told], tick: Callable[[str], None]) -> dict[str, Any]:
    """Evidence in the shape that the gate takes for logits, three-way as for any target."""
    told = [t for t in told if t.places]
    sequences = [t.token_ids for t in told]
    tick("logits of the reference")
    right, facts = [], []
    for seen, logits in zip(told, each(measurer.reference, sequences)):
        right.append(seen.pick(logits))
        facts.append(metrics.reference_rows(logits[[t - 1 for t in seen.places]]))

    def picked(backend: Any) -> list[torch.Tensor]:
        return [seen.pick(logits) for seen, logits in zip(told, each(backend, sequences))]

    def packed(side: Sequence[torch.Tensor]) -> dict[str, Any]:
        return pack_rows(metrics.concatenate([t.rows(r, s) for t, r, s in zip(told, right, side)]))

    nulls = [{"name": name, "rows": packed(side)} for name, side in measurer.nulls(picked)]
    return {
        "eps": measurer.eps,
        "device": 1.0,
        "reference": pack_rows(metrics.concatenate(facts)),
        "run": packed([t.values for t in told]),
        "nulls": nulls,
        "sequence": pack_index(np.repeat(np.arange(len(told)), [len(t.places) for t in told])),
        "position": pack_index(np.concatenate([np.array(t.places) - 1 for t in told])),
    }


@dataclass
class Choices:
    """How much the reference prefers its own choice to each token that a server chose, beyond what noise explains.

    slack: largest change of a preference that noise can bring about: twice the largest error of a logit in the null
    runs, times SAFETY.
    """

    measurer: Measurer
    slack: float = 0.0
    SAFETY = 3.0

    def calibrate(self, sequences: Sequence[list[int]]) -> None:
        """The null runs' largest logit error among the reference's 20 likeliest tokens of each position."""
        top: list[torch.Tensor] = []
        right: list[torch.Tensor] = []
        for logits in each(self.measurer.reference, sequences):
            top.append(logits.topk(min(20, logits.shape[-1])).indices)
            right.append(logits.gather(1, top[-1]))

        def off(backend: Any) -> float:
            sides = zip(top, right, each(backend, sequences))
            return max(float((logits.gather(1, ids) - r).abs().max()) for ids, r, logits in sides)

        worst = max((w for _, w in self.measurer.nulls(off)), default=0.0)
        self.slack = self.SAFETY * 2 * max(worst, 1e-5)

    def margins(self, prompt: list[int], answer: list[int]) -> torch.Tensor:
        """[N]: the reference's best logit minus its second, less `slack`, where it chooses each token of `answer`."""
        (logits,) = each(self.measurer.reference, [prompt + answer])
        top = logits[len(prompt) - 1 : -1].topk(2).values
        return top[:, 0] - top[:, 1] - self.slack

    def lost(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[torch.Tensor]:
        """Per answer [N]: the reference's best logit minus that of the token taken, less `slack`; above 0 is wrong."""
        found = []
        whole = [p + a for p, a in zip(prompts, answers)]
        for prompt, answer, logits in zip(prompts, answers, each(self.measurer.reference, whole)):
            rows = logits[len(prompt) - 1 : len(prompt) - 1 + len(answer)]
            taken = rows.gather(1, torch.tensor(answer, dtype=torch.long).view(-1, 1)).squeeze(-1)
            found.append(rows.amax(-1) - taken - self.slack)
        return found
