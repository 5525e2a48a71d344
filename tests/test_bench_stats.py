"""The statistics of the benchmark: intervals that hold what they promise, quantiles refused where n is too small."""

from __future__ import annotations

import numpy as np
import pytest

from surefoot.bench import stats


@pytest.mark.parametrize(("q", "n"), [(0.5, 6), (0.9, 36), (0.95, 72), (0.99, 368)])
def test_a_quantile_is_refused_below_the_sample_that_supports_it(q, n):
    assert stats.min_samples(q) == n
    assert stats.order_interval(n - 1, q) is None
    name = f"p{q * 100:g}"
    assert "n too small" in stats.summary(range(n - 1))[name]["refused"]
    assert "value" in stats.summary(range(n + 40))[name]


@pytest.mark.parametrize(("n", "q"), [(6, 0.5), (40, 0.9), (80, 0.95), (200, 0.5), (500, 0.9), (2000, 0.99)])
def test_order_statistics_cover_the_true_quantile(n, q):
    """Uniform numbers: the true quantile is q. Discrete ranks make the interval a little too wide, never less."""
    low, high = stats.order_interval(n, q)
    drawn = np.sort(np.random.default_rng(n).random((2000, n)), axis=1)
    covered = np.mean((drawn[:, low] <= q) & (q <= drawn[:, high]))
    assert 0.935 <= covered <= 0.99


def test_bootstrap_covers_the_true_mean():
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        low, high = stats.mean_interval(generator.exponential(size=60))
        hits += low <= 1.0 <= high
    assert 0.89 <= hits / 300 <= 0.98  # percentile bootstrap of a skewed distribution falls a little short


def test_summary_of_few_values():
    assert stats.summary([]) == {"n": 0}
    one = stats.summary([2.0])
    assert one["median"] == 2.0
    assert one["mean_ci95"] is None
    assert one["std"] is None


def test_pooled_intervals_know_that_gaps_of_one_request_belong_together():
    """Between requests the gaps differ by 1, within a request by nothing: 40 independent values, not 4,000."""
    groups = [[float(i % 2)] * 100 for i in range(40)]
    low, high = stats.pooled(groups)["mean_ci95"]
    naive = stats.mean_interval([v for g in groups for v in g])
    assert high - low > 5 * (naive[1] - naive[0])
    assert stats.pooled(groups[:5])["mean_ci95"] is None
