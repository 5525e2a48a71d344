"""Means with honest standard errors, quantiles, and where the largest is."""

from __future__ import annotations

from typing import Any

import numpy as np


def batch_means_se(values: np.ndarray, sequence: np.ndarray, block: int = 16) -> float:
    """Standard error of the mean when neighbouring tokens are alike.

    Batch means (Law & Kelton, Simulation Modeling and Analysis, 9.5.3): blocks of up to 16 tokens of one sequence are
    taken as independent, SE = sqrt(sum n_b^2 (mean_b - mean)^2 / n^2 * B / (B - 1)).
    """
    starts = np.r_[0, np.flatnonzero(np.diff(sequence)) + 1, len(sequence)]
    edges = [np.arange(a, b, block) for a, b in zip(starts[:-1], starts[1:])]
    cut = np.concatenate(edges) if edges else np.array([0])
    sums, sizes = np.add.reduceat(values, cut), np.diff(np.r_[cut, len(values)])
    count = len(cut)
    if count < 2:
        return float("inf")
    spread = np.sum((sums - sizes * values.mean()) ** 2) / len(values) ** 2
    return float(np.sqrt(spread * count / (count - 1)))


def summary(values: np.ndarray, sequence: np.ndarray) -> dict[str, Any]:
    """Mean with standard error, quantiles, maximum and where it is."""
    good = np.isfinite(values)
    kept = values[good]
    if not len(kept):
        return {"mean": float("nan"), "count": 0}
    q = np.quantile(kept, [0.5, 0.9, 0.99])
    at = int(np.argmax(np.where(good, values, -np.inf)))
    return {
        "mean": float(kept.mean()),
        "se": batch_means_se(kept, sequence[good]),
        "median": float(q[0]),
        "p90": float(q[1]),
        "p99": float(q[2]),
        "max": float(kept.max()),
        "argmax": at,
        "count": len(kept),
    }
