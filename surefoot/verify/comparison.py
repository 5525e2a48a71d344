"""How far one path's numbers are from another's: the worst difference, where it first goes too far, other tokens.

Differences are in units of the range of the logits (largest minus smallest of the baseline). A log-probability is a
logit minus the log-sum-exp of its row, so differences of log-probabilities can be twice as large; they get twice the
tolerance. A greedy token that another path does not choose counts only where the choice was not within the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from surefoot.core.outputs import Completion
from surefoot.verify.shapes import Finding, Status

COLUMNS = 2048  # vocabulary entries that are compared; every fault of a hidden state shows in all of them


class Kept:
    """What is kept of logits: all columns of a small vocabulary, a fixed draw of a large one, and the log-sum-exp."""

    def __init__(self, vocab_size: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(vocab_size, generator=generator)[:COLUMNS].sort().values
        self.columns = None if vocab_size <= 2 * COLUMNS else chosen

    def rows(self, logits: torch.Tensor) -> torch.Tensor:
        """[T, vocab] -> [T, kept + 1]."""
        columns = logits if self.columns is None else logits[:, self.columns]
        return torch.cat([columns, logits.logsumexp(-1, keepdim=True)], dim=-1)


def difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Largest absolute difference of each row; a NaN, or an infinity that the other side does not have, is infinite."""
    apart = torch.where(a == b, 0.0, (a - b).abs())
    return apart.nan_to_num(nan=math.inf, posinf=math.inf).amax(-1) if apart.numel() else apart.new_zeros(len(a))


@dataclass
class Comparison:
    """All that was compared on one path. spread: range of the baseline's logits.  page: tokens per KV page.

    worst: largest difference, of the range.  ratio: largest difference over what is allowed there; above 1 it fails.
    flips: greedy tokens that differ beyond the tolerance.  near_ties: those that differ within it.
    """

    path: str
    tolerance: float
    spread: float
    page: int
    bitwise: bool | None = None
    worst: float = 0.0
    ratio: float = 0.0
    rows: int = 0
    sequences: int = 0
    flips: int = 0
    near_ties: int = 0
    first: dict[str, Any] | None = None
    problem: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def logits(self, right: torch.Tensor, got: torch.Tensor, what: str, allowed: torch.Tensor | None = None) -> None:
        """Rows of `Kept.rows` of the same tokens, from position 0. allowed: tolerance of each position."""
        if right.shape != got.shape:
            self.broken(f"{what}: {len(got)} rows of logits instead of {len(right)}")
            return
        self.bitwise = self.bitwise is not False and torch.equal(right, got)
        limits = torch.full((len(right),), self.tolerance) if allowed is None else allowed[: len(right)]
        self._count(difference(right, got) / self.spread, what, 0, limits)

    def answer(self, exact: torch.Tensor, done: Completion, wanted: int) -> None:
        """A greedy answer against `exact`: log-probabilities [N, vocab] of its own tokens, computed in one piece."""
        what = f"prompt of {len(done.prompt_token_ids)} tokens"
        if len(done.token_ids) < wanted:
            self.broken(f"{what}: {len(done.token_ids)} tokens instead of {wanted} ({done.finish_reason})")
        if not done.token_ids:
            return
        start = len(done.prompt_token_ids)
        self._tokens(exact, done, what, start)
        if done.logprobs:
            told = self._told(exact, done)
            self._count(told, what, start, torch.full((len(told),), 2 * self.tolerance))

    def _tokens(self, exact: torch.Tensor, done: Completion, what: str, start: int) -> None:
        chosen = torch.tensor(done.token_ids).unsqueeze(-1)
        lost = exact.amax(-1) - exact.gather(-1, chosen).squeeze(-1)
        wrong = lost.nan_to_num(nan=math.inf) > 2 * self.tolerance * self.spread
        self.flips += int(wrong.sum())
        self.near_ties += int((lost > 0).sum() - (wrong & (lost > 0)).sum())
        if wrong.any():
            i = int(wrong.nonzero()[0])
            self._first(what, start + i, float(lost[i] / self.spread), 2 * self.tolerance)

    def _told(self, exact: torch.Tensor, done: Completion) -> torch.Tensor:
        """Per step, the worst difference of the log-probabilities that came with the answer, of the range."""
        worst = []
        for row, entry in zip(exact, done.logprobs or []):
            pairs = [(entry.token_id, entry.logprob), *entry.top]
            told = torch.tensor([value for _, value in pairs])
            worst.append(difference(row[[i for i, _ in pairs]].unsqueeze(0), told.unsqueeze(0)))
        return torch.cat(worst) / self.spread

    def broken(self, problem: str) -> None:
        self.problem = self.problem or problem

    def _count(self, worst: torch.Tensor, what: str, start: int, allowed: torch.Tensor) -> None:
        self.sequences += 1
        self.rows += len(worst)
        if not len(worst):
            return
        self.worst = max(self.worst, float(worst.max()))
        self.ratio = max(self.ratio, float((worst / allowed).max()))
        beyond = worst > allowed
        if beyond.any():
            i = int(beyond.nonzero()[0])
            self._first(what, start + i, float(worst[i]), float(allowed[i]))

    def _first(self, what: str, position: int, off: float, allowed: float) -> None:
        if self.first is None or position < self.first["position"]:
            page, row = divmod(position, self.page)
            self.first = {"sequence": what, "position": position, "page": page, "row": row}
            self.first |= {"off": off, "allowed": allowed}

    # ---- the outcome

    def finding(self, must_be_bitwise: bool = False) -> Finding:
        same = f"{self.rows} rows of {self.sequences} sequences"
        status: Status = "pass"
        if self.problem is not None:
            status, line = "fail", self.problem
        elif self.first is not None:
            at = self.first
            what = "another token is chosen" if self.flips and self.ratio <= 1 else "differs"
            status, line = (
                "fail",
                (
                    f"{what} from position {at['position']} on ({at['sequence']}; row {at['row']} of its page), "
                    f"by {at['off']:.2g} of the range, allowed {at['allowed']:.1g}"
                ),
            )
        elif must_be_bitwise and not self.bitwise:
            status, line = "fail", f"not the same bits twice: off by {self.worst:.2g} of the range"
        elif not self.rows and not self.sequences:
            status, line = "not_possible", "nothing could be compared"
        else:
            line = f"{same}, worst {self.worst:.1e} of the range, {self.ratio:.2g} of what is allowed"
        return Finding("parity", status, f"{self.path}: {line}", self.details())

    def details(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "worst": self.worst,
            "ratio": self.ratio,
            "tolerance": self.tolerance,
            "bitwise": self.bitwise,
            "rows": self.rows,
            "sequences": self.sequences,
            "tokens_equal": not self.flips,
            "flips": self.flips,
            "near_ties": self.near_ties,
            "first": self.first,
            "problem": self.problem,
        } | self.facts


def spread(rows: Sequence[torch.Tensor]) -> float:
    """Range of kept logits; the last column is their log-sum-exp."""
    values = torch.cat([r[:, :-1].reshape(-1) for r in rows])
    values = values[torch.isfinite(values)]
    return max(float(values.max() - values.min()), 1e-30) if len(values) else 1.0
