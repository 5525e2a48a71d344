"""Buckets that waste least: given how often each size occurs, the k sizes to pad to, by dynamic programming.

Waste is the number of padded rows that a model's layers compute for nothing. With sizes v_1 < ... < v_m, padding
everything in (v_j, v_i] to v_i costs v_i * count - sum; the best k buckets follow from the best k - 1 in O(m^2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Counts = Mapping[int, int]


@dataclass(frozen=True)
class Choice:
    """Buckets for one kind of step, and what padding to them costs."""

    buckets: tuple[int, ...]
    padded: int
    tokens: int

    @property
    def waste(self) -> float:
        """Share of the computed rows that are padding."""
        return self.padded / max(1, self.padded + self.tokens)


def padding(counts: Counts, buckets: tuple[int, ...]) -> Choice:
    """What these buckets cost; every size must fit into one."""
    sizes = np.array(sorted(counts))
    times = np.array([counts[int(s)] for s in sizes])
    given = np.array(buckets)[np.searchsorted(buckets, sizes)]
    return Choice(buckets, int(((given - sizes) * times).sum()), int((sizes * times).sum()))


def choices(counts: Counts, most: int, *, align: int = 1, cover: int) -> list[Choice]:
    """The best 1, 2, ... `most` buckets, multiples of `align`, of which the largest is `cover` and holds every size.

    `cover` itself need not be a multiple. The list is shorter where more buckets would not waste less.
    """
    ends = sorted({min(cover, -(-size // align) * align) for size in counts} | {cover})
    values, times, tokens = np.array([0, *ends]), np.zeros(len(ends) + 1), np.zeros(len(ends) + 1)
    for size, n in counts.items():
        at = 1 + int(np.searchsorted(ends, size))
        times[at] += n
        tokens[at] += n * size
    times, tokens = times.cumsum(), tokens.cumsum()
    # cost[j, i]: sizes above values[j] and up to values[i] are padded to values[i].
    cost = values[None, :] * (times[None, :] - times[:, None]) - (tokens[None, :] - tokens[:, None])
    cost[np.tril_indices(len(values))] = np.inf
    best, came_from = cost[0].copy(), []
    found = [_choice(values, [], best, tokens)]
    for _ in range(min(most, len(ends)) - 1):
        through = best[:, None] + cost
        came_from.append(through.argmin(axis=0))
        best = through.min(axis=0)
        if best[-1] >= found[-1].padded:
            break
        found.append(_choice(values, came_from, best, tokens))
    return found


def _choice(values: np.ndarray, came_from: list[np.ndarray], best: np.ndarray, tokens: np.ndarray) -> Choice:
    at, picked = len(values) - 1, []
    for step in [*reversed(came_from), None]:
        picked.append(int(values[at]))
        if step is not None:
            at = int(step[at])
    return Choice(tuple(reversed(picked)), int(best[-1]), int(tokens[-1]))


def split(first: list[Choice], second: list[Choice], most: int) -> tuple[Choice, Choice]:
    """One choice of each list, together at most `most` buckets, with the least padding; fewer buckets where equal."""
    pairs = [(a, b) for a in first for b in second if len(a.buckets) + len(b.buckets) <= most]
    return min(pairs, key=lambda p: (p[0].padded + p[1].padded, len(p[0].buckets) + len(p[1].buckets)))


def powers_of_two(cover: int) -> tuple[int, ...]:
    """1, 2, 4, ... and `cover`: what one takes without looking at the workload."""
    sizes, size = [], 1
    while size < cover:
        sizes.append(size)
        size *= 2
    return (*sizes, cover)
