"""Rank correlations against scipy's, and their bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr

from rayexpand.studies.rank_correlation import FEWEST, RESAMPLES, _kendall, _loses, _spearman, rank_correlation

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("levels", [3, 1000])
def test_the_correlations_are_those_of_scipy_also_of_resamples(levels: int) -> None:
    """Weights are how often a trial stands in a resample."""
    x, y = RNG.integers(levels, size=12), RNG.integers(levels, size=12)
    w_BN = RNG.multinomial(12, np.full(12, 1 / 12), 20)
    for w_N, rho, tau in zip(w_BN, _spearman(x, y, w_BN.astype(float)), _kendall(x, y, w_BN.astype(float)),
                             strict=True):
        own = np.repeat(np.arange(12), w_N)
        assert rho == pytest.approx(spearmanr(x[own], y[own]).statistic)
        assert tau == pytest.approx(kendalltau(x[own], y[own]).statistic)


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    inside = 0
    for n in range(60):
        x, y = np.random.default_rng(n).multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 25).T
        low, high = rank_correlation(x, y, [str(i) for i in range(25)]).spearman_interval or (2, 2)
        inside += low <= 6 / np.pi * np.arcsin(0.3) <= high  # Spearman's of a normal pair
    assert inside >= 51, "95 % of 60 are 57; 51 would be a chance of less than one in a hundred"


def test_trials_with_the_same_samples_are_one_case() -> None:
    x, y = np.repeat(RNG.normal(size=8), 6), np.repeat(RNG.normal(size=8), 6)
    alone = rank_correlation(x, y, [str(n) for n in range(48)])
    together = rank_correlation(x, y, [str(n // 6) for n in range(48)])

    assert alone.spearman == together.spearman
    assert alone.spearman_interval is not None
    assert together.spearman_interval is not None
    assert np.ptp(together.spearman_interval) > 1.5 * np.ptp(alone.spearman_interval)


def test_few_cases_and_equal_values_have_no_interval() -> None:
    few = rank_correlation([1, 2, 3, 4], [1, 2, 3, 4], list("abcd"))
    equal = rank_correlation([1.0] * 9, range(9), list("abcdefghi"))

    assert (few.spearman, few.kendall, few.spearman_interval, few.loses_best_share) == (1.0, 1.0, None, None)
    assert (equal.spearman, equal.kendall, equal.kendall_interval) == (None, None, None)
    assert rank_correlation([1], [1], ["a"]).spearman is None
    assert FEWEST == 5


@pytest.mark.parametrize(("x", "keep", "loses"), [
    ([9, 8, 1, 2], 0.5, True), ([1, 8, 7, 9], 0.5, False), ([9, 8, 7, 6], 0.75, True), ([5, 5, 5, 5], 0.25, False)])
def test_a_choice_loses_the_best_where_as_many_look_better(x: list[float], keep: float, loses: bool) -> None:
    """The last is the best."""
    assert rank_correlation(x, [0.1, 0.2, 0.3, 0.4], list("abcd"), keep).loses_best is loses


def test_the_share_of_resamples_is_between_never_and_always() -> None:
    y = np.arange(20.0)
    good, bad, none = (rank_correlation(x, y, [str(n) for n in range(20)]).loses_best_share
                       for x in (y, -y, RNG.permutation(20)))
    assert good == 0.0
    assert bad is not None
    assert none is not None
    assert good < none < bad
    assert bad > 0.99
    assert rank_correlation(y, y, [str(n) for n in range(20)]) == rank_correlation(y, y, [str(n) for n in range(20)])
    assert _loses(y, y, np.ones((RESAMPLES, 20)), 0.5).shape == (RESAMPLES,)
