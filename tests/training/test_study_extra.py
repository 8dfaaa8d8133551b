"""The statistics of the smaller studies."""

from __future__ import annotations

import numpy as np

from training.study.extra import rank_correlation, rank_interval


def test_rank_correlation_by_hand() -> None:
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(x, np.array([10.0, 20.0, 30.0, 1000.0])) == 1.0
    assert rank_correlation(x, -x) == -1.0
    assert abs(rank_correlation(x, np.array([1.0, 3.0, 2.0, 4.0])) - 0.8) < 1e-12
    assert abs(rank_correlation(x, np.array([1.0, 1.0, 2.0, 2.0])) - 2 / np.sqrt(5)) < 1e-12  # ties: mean ranks
    assert rank_correlation(x, np.ones(4)) == 0.0


def test_its_interval_holds_it_and_repeats() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=28)
    y = x + rng.normal(size=28)
    low, high = rank_interval(x, y)
    assert low < rank_correlation(x, y) < high and (low, high) == rank_interval(x, y)
