"""Real images that a sample is worth, read from a curve; against numbers that were computed elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import isotonic_regression

from rayexpand.classifier.equivalence import (
    bounds,
    equivalent,
    holds,
    isotonic,
    power_law,
    range_of_fits,
    worth,
)
from tests.classifier.test_statistics import rng_of

SIZES, CURVE = (25, 50, 100, 200, 400), np.array([0.5, 0.6, 0.7, 0.78, 0.84])


@pytest.mark.parametrize(("accuracy", "n_eq", "k"), [
    (0.70, 100, 0), (0.78, 200, 1), (0.74, 141.421, 0.41421), (0.65, 70.711, -0.29289), (0.90, np.inf, np.inf),
    (0.84, 400, 3), (0.49, -np.inf, -np.inf)])
def test_a_curve_is_read_backwards(accuracy: float, n_eq: float, k: float) -> None:
    found = equivalent(SIZES, CURVE, np.array([accuracy]), 100)

    assert found == pytest.approx([n_eq], abs=1e-3)
    assert worth(found, 100, 100) == pytest.approx([k], abs=1e-5)


@pytest.mark.parametrize(("accuracy", "n_eq"), [(0.7, 100), (0.6, 50), (0.8, 400)])
def test_a_level_stretch_gives_the_size_nearest_to_what_is_there(accuracy: float, n_eq: float) -> None:
    level = np.array([0.6, 0.6, 0.7, 0.7, 0.8])
    assert equivalent(SIZES, level, np.array([accuracy]), 100).tolist() == [n_eq]


def test_curves_never_fall_and_are_the_nearest_such() -> None:
    y_DP = rng_of(3).normal(size=(40, 6))
    assert isotonic(y_DP) == pytest.approx(np.stack([isotonic_regression(one).x for one in y_DP]))


def test_an_interval_is_open_where_resamples_leave_the_curve() -> None:
    k = np.linspace(0, 1, 1001)
    assert bounds(k) == pytest.approx((0.025, 0.975))
    assert bounds(np.where(k > 0.94, np.inf, k)) == (pytest.approx(0.025), None)
    assert bounds(np.where(k > 0.99, np.inf, k))[1] == pytest.approx(0.975)
    assert bounds(np.where(k < 0.06, -np.inf, k)) == (None, pytest.approx(0.975))
    assert bounds(np.where(k > 0.94, np.nan, k)) == (None, None)
    assert bounds(np.full(9, np.inf), ends=(-0.75, 3.0)) == (3.0, None), "it is above, whatever it is"
    assert bounds(np.full(9, -np.inf), ends=(-0.75, 3.0)) == (None, -0.75)
    assert not holds(bounds(np.full(9, np.inf), ends=(-0.75, 3.0)), 1.0)
    assert holds((None, 0.5), -9)
    assert holds((0.5, None), 9)
    assert not holds((0.5, 0.9), 1)


def test_laws_that_the_data_do_not_tell_apart() -> None:
    """Samples alone of Real-Fake on ImageNet: 70.9, 72.9, 74.5, 76.0 % at 1, 2, 5, 10x; 79.6 % with real images."""
    found = {one.law: one for one in range_of_fits([1, 2, 5, 10], [0.709, 0.729, 0.745, 0.760], 0.796)}

    assert found["line in log n"].crossover == pytest.approx(52, abs=0.5)
    assert found["power law"].crossover == pytest.approx(240, abs=1)
    assert found["power law"].asymptote == pytest.approx(0.830, abs=5e-4)
    assert found["power law to 80 %"].crossover == pytest.approx(9900, rel=0.005)
    assert found["power law to 90 %"].crossover == pytest.approx(97, abs=0.5)
    assert found["power law to 79 %"].crossover is None
    assert all(0.07 <= one.residual <= 0.115 for law, one in found.items() if law != "line in log n")


def test_a_power_law_is_found_again() -> None:
    n = np.array([25, 50, 100, 200, 400])
    law = power_law(n.tolist(), (0.9 - 2.0 * n ** -0.7).tolist())
    assert law[:3] == pytest.approx((0.9, 2.0, 0.7), rel=1e-3)
    assert law(n) == pytest.approx(0.9 - 2.0 * n ** -0.7)
    assert law.reaches(0.95) is None


# ------------------------------------------------------------------------------------------------------------ simulated


def simulated(number: int, sizes: list[float], images: int, seeds: int = 3) -> np.ndarray:
    """bool (A, S, N): right answers of classifiers that had so many real images, by a power law."""
    rng = rng_of(number)
    accuracy_A = 0.95 - 1.6 * np.array(sizes) ** -0.4
    score_ASN = rng.normal(size=images) + 0.4 * rng.normal(size=(len(sizes), 1, images)) + 0.4 * rng.normal(
        size=(len(sizes), seeds, images))
    return score_ASN.argsort(axis=2).argsort(axis=2) < (accuracy_A[:, None, None] + 0.004 * rng.normal(
        size=(len(sizes), seeds, 1))) * images


@pytest.mark.parametrize("repetitions", [6, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_the_worth_of_known_samples_is_found(repetitions: int) -> None:
    """100 images added to 100 that are worth 1, 0, 0.5 and -0.25 each; 2,000 test images, 3 seeds."""
    from rayexpand.classifier.statistics import resampled

    true = (1.0, 0.0, 0.5, -0.25)
    found, held = np.zeros(4), np.zeros(4)
    for number in range(repetitions):
        correct = simulated(number, [*SIZES, *(100 + 100 * k for k in true)], 2000)
        means_DA = np.concatenate([correct.mean(axis=(1, 2))[None], resampled(correct, 500, seed=number)])
        rising_DP = isotonic(means_DA[:, :5])
        for place, k in enumerate(true):
            k_D = worth(equivalent(SIZES, rising_DP, means_DA[:, 5 + place], 100), 100, 100)
            found[place] += k_D[0] / repetitions
            held[place] += holds(bounds(k_D[1:]), k) / repetitions
    print(f"\nmean k {found.round(2)}, intervals hold it in {held.round(3)}")
    assert found == pytest.approx(true, abs=0.25)
    assert held.min() >= (0.8 if repetitions < 60 else 0.95 - 2 * (0.95 * 0.05 / 60) ** 0.5)
