"""Summaries that say how sure they are: bootstrap for means, binomial order statistics for quantiles. Torch-free.

A quantile is reported only if a two-sided 95 % interval around it exists in the sample: p50 from 6 values, p90 from 36,
p95 from 72, p99 from 368. Below that the entry says "n too small", because the number would be the sample's maximum
under another name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

CONFIDENCE = 0.95
QUANTILES = (0.5, 0.9, 0.95, 0.99)
DRAWS = 2000  # bootstrap resamples; fewer for large samples, whose intervals are narrow anyway
DRAWN_VALUES = 20_000_000
BLOCK = 1_000_000  # values drawn at once
CLUSTER_DRAWS = 200
MIN_CLUSTERS = 20


@functools.lru_cache(maxsize=64)
def min_samples(q: float, confidence: float = CONFIDENCE) -> int:
    """Smallest n for which order statistics bracket the quantile q on both sides."""
    tail = (1 - confidence) / 2
    return math.ceil(math.log(tail) / math.log(max(q, 1 - q)))


@functools.lru_cache(maxsize=256)
def order_interval(n: int, q: float, confidence: float = CONFIDENCE) -> tuple[int, int] | None:
    """0-based ranks (low, high) whose values enclose the quantile with at least `confidence`; None if n is too small.

    The number of values below the quantile is Binomial(n, q), whatever the distribution.
    """
    if n < min_samples(q, confidence):
        return None
    tail = (1 - confidence) / 2
    below = _binomial_cdf(n, q)  # below[k] = P(at most k values lie below)
    low = int(np.searchsorted(below, tail, side="right")) - 1
    high = int(np.searchsorted(below, 1 - tail, side="left"))
    return (low, high) if low >= 0 and high <= n - 1 else None


def _binomial_cdf(n: int, q: float) -> np.ndarray:
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    k = np.arange(n + 1)
    log_p = log_factorial[n] - log_factorial[k] - log_factorial[n - k] + k * math.log(q) + (n - k) * math.log1p(-q)
    return np.cumsum(np.exp(log_p))


def quantile(values: Sequence[float] | np.ndarray, q: float) -> float:
    """Linear interpolation between order statistics, as numpy (and vLLM) do."""
    return float(np.quantile(np.asarray(values, dtype=float), q))


def mean_interval(values: Sequence[float] | np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Percentile bootstrap of the mean; None for fewer than two values. Seeded: the same values, the same interval."""
    data = np.asarray(values, dtype=float)
    if len(data) < 2:
        return None
    generator = np.random.default_rng(0)
    draws = max(200, min(DRAWS, DRAWN_VALUES // len(data)))
    rows = max(1, BLOCK // len(data))
    blocks = [min(rows, draws - done) for done in range(0, draws, rows)]
    means = np.concatenate([data[generator.integers(0, len(data), (n, len(data)))].mean(axis=1) for n in blocks])
    tail = (1 - confidence) / 2
    return float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail))


def summary(values: Sequence[float] | np.ndarray, quantiles: Sequence[float] = QUANTILES) -> dict[str, Any]:
    """n, mean, its interval, spread, and each quantile with its interval or the reason why there is none."""
    data = np.sort(np.asarray(values, dtype=float))
    if not len(data):
        return {"n": 0}
    result = _spread(data) | {"mean_ci95": mean_interval(data), "median": quantile(data, 0.5)}
    for q in quantiles:
        ranks = order_interval(len(data), q)
        if ranks is None:
            result[_name(q)] = too_small(len(data), q)
        else:
            result[_name(q)] = {"value": quantile(data, q), "ci95": (float(data[ranks[0]]), float(data[ranks[1]]))}
    return result


def pooled(groups: Sequence[Sequence[float]], quantiles: Sequence[float] = QUANTILES) -> dict[str, Any]:
    """Summary of values that come in groups (the gaps of one request are not independent of each other).

    Intervals resample whole groups; with fewer than 20 groups there are none.
    """
    arrays = [np.asarray(g, dtype=float) for g in groups if len(g)]
    if not arrays:
        return {"n": 0}
    data = np.sort(np.concatenate(arrays))
    result = _spread(data) | {"groups": len(arrays), "mean_ci95": None, "median": quantile(data, 0.5)}
    shown = [q for q in quantiles if len(data) >= min_samples(q)]
    draws = _group_draws(arrays, shown) if len(arrays) >= MIN_CLUSTERS else None
    if draws is not None:
        result["mean_ci95"] = _percentiles(draws[:, 0])
    for q in quantiles:
        if q not in shown:
            result[_name(q)] = too_small(len(data), q)
            continue
        interval = None if draws is None else _percentiles(draws[:, 1 + shown.index(q)])
        result[_name(q)] = {"value": quantile(data, q), "ci95": interval}
    return result


def _group_draws(arrays: list[np.ndarray], quantiles: Sequence[float]) -> np.ndarray:
    """[CLUSTER_DRAWS, 1 + len(quantiles)]: mean and quantiles of resampled groups."""
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(CLUSTER_DRAWS):
        drawn = np.concatenate([arrays[i] for i in generator.integers(0, len(arrays), len(arrays))])
        rows.append([drawn.mean(), *np.quantile(drawn, quantiles)] if quantiles else [drawn.mean()])
    return np.array(rows)


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    return float(np.quantile(values, tail)), float(np.quantile(values, 1 - tail))


def _spread(data: np.ndarray) -> dict[str, Any]:
    std = float(data.std(ddof=1)) if len(data) > 1 else None
    return {"n": len(data), "mean": float(data.mean()), "std": std, "min": float(data[0]), "max": float(data[-1])}


def too_small(n: int, q: float) -> dict[str, str]:
    return {"refused": f"n too small: {n} values, {_name(q)} needs {min_samples(q)}"}


def _name(q: float) -> str:
    return f"p{q * 100:g}"
