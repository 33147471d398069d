"""Rates at small errors, areas and intervals."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from rayexpand.contract.rng import generator, row_key
from rayexpand.evaluation.roc import POINTS, epsilon, exact_interval, measured, ranked


def half_a_step_above(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.r_[np.arange(n), np.arange(n) + 0.5], np.arange(2 * n) >= n


@pytest.mark.parametrize(("n", "tpr", "fpr"), [(1000, .002, .001), (500, .002, 0.0)])
def test_at_most_the_whole_number_of_non_members_lies_above(n: int, tpr: float, fpr: float) -> None:
    curve = ranked(*half_a_step_above(n)).curve()

    assert curve.tpr[curve.at(0.001)] == pytest.approx(tpr)
    assert curve.fpr[curve.at(0.001)] == pytest.approx(fpr)


def test_equal_scores_are_not_split() -> None:
    curve = ranked(np.array([1.0, 1.0, 0.0]), np.array([True, False, False])).curve()

    assert curve.tpr[curve.at(0.4)] == 0
    assert curve.tpr[curve.at(0.5)] == 1
    assert curve.auc() == 0.75
    assert curve.balanced_accuracy() == 0.75


def test_area_equals_that_of_scikit_learn() -> None:
    rng = generator(row_key(0, "test", "roc", 0, 0, "scores"))
    scores, member = np.round(rng.normal(size=500), 1), rng.random(500) < 0.4

    assert ranked(scores, member).curve().auc() == pytest.approx(roc_auc_score(member, scores))


@pytest.mark.parametrize(("hits", "of", "low", "high"), [(1, 1000, 2.53e-5, .00556), (50, 1000, .0373, .0654)])
def test_exact_intervals(hits: int, of: int, low: float, high: float) -> None:
    assert exact_interval(hits, of) == pytest.approx((low, high), rel=2e-3)


def test_epsilon_and_its_lower_bound() -> None:
    found = epsilon(50, 1000, 1, 1000)

    assert found["value"] == pytest.approx(3.912, abs=5e-4)
    assert found["low"] == pytest.approx(1.905, abs=5e-4)
    assert epsilon(0, 10, 1, 10)["low"] is None


def test_the_interval_resamples_examples_whose_scores_depend_on_each_other() -> None:
    rng = generator(row_key(0, "test", "bootstrap", 0, 0, "scores"))
    shared, member = rng.normal(size=100), rng.random((8, 100)).argsort(axis=0) < 4
    apart = measured((rng.normal(size=(8, 100)) + member).ravel(), member.ravel(), np.tile(np.arange(100), 8), 0)
    copies = np.repeat(np.arange(100) % 2 == 0, 8)  # eight equal scores of an example count as one
    once = measured(np.repeat(shared, 8), copies, np.repeat(np.arange(100), 8), 0)

    assert apart["auc"]["low"] < apart["auc"]["value"] < apart["auc"]["high"]
    assert apart["auc"]["high"] - apart["auc"]["low"] < 0.10
    assert once["auc"]["high"] - once["auc"]["low"] > 0.18
    assert apart["members"] == apart["non_members"] == 400
    assert set(apart) == {"auc", "balanced_accuracy", "tpr_at_fpr_001", "tpr_at_fpr_01", "members", "non_members",
                          "roc"}


def test_a_stored_curve_keeps_its_ends_and_few_points() -> None:
    rng = generator(row_key(0, "test", "points", 0, 0, "scores"))
    points = ranked(rng.normal(size=20_000), rng.random(20_000) < 0.5).curve().points()

    assert len(points) <= POINTS + 1
    assert points[0][0] == 0
    assert points[-1] == (1, 1)
    assert sum(fpr < 0.01 for fpr, _ in points) > 50
