"""Distances against closed forms on Gaussians and sets whose neighbours can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rayexpand.contract.errors import UsageError
from rayexpand.contract.rng import generator, row_key
from rayexpand.evaluation import distance
from rayexpand.evaluation.distance import (
    METRICS,
    density_coverage,
    fid,
    kid,
    measure,
    median_distance,
    mmd2_linear,
    mmd2_rbf,
    precision_recall,
)


def normals(n: int, d: int, key: int = 0) -> np.ndarray:
    return generator(row_key(key, "test", "", 0, 0, "normals")).standard_normal((n, d))


def with_moments(n: int, mean: np.ndarray, covariance: np.ndarray, key: int = 0) -> np.ndarray:
    """Rows whose own mean and (n - 1) covariance are exactly these."""
    z = normals(n, len(mean), key)
    z = z - z.mean(axis=0)
    white = z @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(z.T)))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def gaussian_distance(m1: np.ndarray, s1: np.ndarray, m2: np.ndarray, s2: np.ndarray) -> float:
    from scipy.linalg import sqrtm

    half = sqrtm(s1)
    return float(np.square(m1 - m2).sum() + np.trace(s1 + s2 - 2 * sqrtm(half @ s2 @ half).real))


def gaussian_mmd2(shift2: float, v1: float, v2: float, d: int, sigma: float) -> float:
    """Squared MMD of N(m1, v1 I) and N(m2, v2 I) with |m1 - m2|^2 = shift2: expectations of the kernel are Gaussian
    integrals, E k(x, y) = (s/(s+v1+v2))^(d/2) exp(-|m1-m2|^2 / (2 (s+v1+v2))) with s = sigma^2."""
    def mean(v: float, at2: float) -> float:
        return (sigma ** 2 / (sigma ** 2 + v)) ** (d / 2) * np.exp(-at2 / (2 * (sigma ** 2 + v)))

    return mean(2 * v1, 0) + mean(2 * v2, 0) - 2 * mean(v1 + v2, shift2)


# ------------------------------------------------------------------------------------------------------------------ FID


def test_fid_of_gaussians_that_do_not_commute() -> None:
    m1, m2 = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 2.0])
    a, b = normals(3, 3, 1), normals(3, 3, 2)
    s1, s2 = a @ a.T + np.eye(3), b @ b.T + 0.3 * np.eye(3)
    expected = gaussian_distance(m1, s1, m2, s2)

    assert fid(with_moments(50, m1, s1), with_moments(50, m2, s2, 1)) == pytest.approx(expected, rel=1e-9)
    assert fid(with_moments(50, m1, s1), with_moments(80, m1, s1, 1)) == pytest.approx(0, abs=1e-6)


def test_fid_by_hand_in_one_dimension() -> None:
    """N(0, 1) and N(3, 4): 3^2 + (1 - 2)^2 = 10."""
    x = with_moments(20, np.zeros(1), np.eye(1))

    assert fid(x, 3 + 2 * x) == pytest.approx(10, rel=1e-9)


def test_fid_does_not_lose_digits_far_from_zero() -> None:
    x, y = with_moments(50, np.zeros(2), np.eye(2)), with_moments(50, np.ones(2), np.eye(2), 1)

    assert fid(x + 1e7, y + 1e7) == pytest.approx(2, rel=1e-6)


def test_fid_of_few_images_is_said_to_be_of_low_rank() -> None:
    few = measure(["fid"], normals(8, 8), normals(8, 8, 1))

    assert "not of full rank" in few["warnings"][0]
    assert measure(["fid"], normals(9, 8), normals(9, 8, 1))["warnings"] == []
    assert measure(["kid"], normals(8, 8), normals(8, 8, 1))["warnings"] == []


def test_unequal_numbers_are_recorded_and_said() -> None:
    found = measure(["fid"], normals(40, 4), normals(50, 4, 1))

    assert (found["n_samples"], found["n_reference"], found["features"]) == (40, 50, 4)
    assert "40 samples against 50" in found["warnings"][0]


# ------------------------------------------------------------------------------------------------------------------ MMD


@pytest.mark.parametrize(("shift", "scale", "sigma"), [(0.0, 1.0, 1.5), (1.0, 1.0, 1.5), (0.0, 2.0, 1.0),
                                                       (0.5, 1.5, 3.0)])
def test_mmd_of_gaussians(shift: float, scale: float, sigma: float) -> None:
    """Mean of the unbiased estimate over 20 pairs of samples, against the integral."""
    d, n = 3, 300
    values = [mmd2_rbf(normals(n, d, 2 * i), shift + scale * normals(n, d, 2 * i + 1), sigma) for i in range(20)]
    expected = gaussian_mmd2(d * shift ** 2, 1, scale ** 2, d, sigma)

    assert abs(np.mean(values) - expected) < 4 * np.std(values) / 20 ** 0.5 + 1e-12
    assert np.std(values) < 0.03


def test_mmd_by_hand() -> None:
    """x = {0, 1}, y = {0, 2}, kernel exp(-d^2/2): within x e^-.5, within y e^-2, across {1, e^-2, e^-.5, e^-.5}."""
    x, y = np.array([[0.0], [1.0]]), np.array([[0.0], [2.0]])
    near, far = np.exp(-0.5), np.exp(-2)
    across = (1 + far + 2 * near) / 4

    assert mmd2_rbf(x, y, 1.0) == pytest.approx(near + far - 2 * across)
    assert mmd2_rbf(x, y, 1.0, biased=True) == pytest.approx((1 + near) / 2 + (1 + far) / 2 - 2 * across)


def test_blocks_do_not_change_mmd(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normals(50, 3), normals(41, 3, 1)
    whole = mmd2_rbf(x, y, 1.0), kid(x, y)
    monkeypatch.setattr(distance, "_BLOCK", 7)

    assert (mmd2_rbf(x, y, 1.0), kid(x, y)[0]) == (pytest.approx(whole[0]), pytest.approx(whole[1][0]))


def test_linear_mmd_is_that_of_real_fake() -> None:
    """Errors (1,2), (3,-2): their mean (2,0) gives 4 / D = 2; mean over all, then squared, would give 1."""
    assert mmd2_linear(np.array([[1.0, 2.0], [3.0, -2.0]]), np.zeros((2, 2))) == 2.0
    assert mmd2_linear(np.array([[1.0, 2], [3, -2], [-1, 0], [1, 4]]), np.zeros((4, 2))) == 1.0


def test_median_bandwidth() -> None:
    assert median_distance(np.array([[0.0], [1.0], [3.0]])) == 2.0
    assert median_distance(normals(3000, 2)) == pytest.approx(2 * np.log(2) ** 0.5, rel=0.03)  # |x - y|^2 / 2 ~ chi^2
    with pytest.raises(UsageError, match="no bandwidth"):
        median_distance(np.zeros((5, 2)))


# ------------------------------------------------------------------------------------------------------------------ KID


def test_kid_is_unbiased_at_any_number_of_rows() -> None:
    values = [kid(normals(30, 6, 2 * i), normals(30, 6, 2 * i + 1))[0] for i in range(200)]

    assert min(values) < 0 < max(values), "a biased estimate is never negative"
    assert abs(np.mean(values)) < 4 * np.std(values) / 200 ** 0.5


def test_kid_of_a_shift_in_closed_form() -> None:
    """One feature, x ~ N(0,1), y ~ N(1,1): (xy+1)^3 = sum of binom(3,j) (xy)^j, so the distance is
    sum of binom(3,j) (E x^j - E y^j)^2 = 3 * 1 + 3 * 1 + 1 * 4^2 = 22."""
    values = [kid(normals(400, 1, 2 * i), 1 + normals(400, 1, 2 * i + 1))[0] for i in range(40)]

    assert abs(np.mean(values) - 22) < 4 * np.std(values) / 40 ** 0.5


def test_kid_subsets_are_keyed_and_agree_with_torchmetrics() -> None:
    import torch
    from torchmetrics.image.kid import poly_mmd

    x, y = normals(60, 4), 0.5 + normals(80, 4, 1)
    value, std, subsets, rows = kid(x, y, seed=1, subsets=30, subset=20)

    assert (subsets, rows) == (30, 20)
    assert std is not None
    assert kid(x, y, seed=1, subsets=30, subset=20)[0] == value != kid(x, y, seed=2, subsets=30, subset=20)[0]
    assert value == pytest.approx(kid(x, y)[0], abs=4 * std / 30 ** 0.5)
    assert kid(x, y[:60])[0] == pytest.approx(float(poly_mmd(torch.from_numpy(y[:60]), torch.from_numpy(x))))


# ----------------------------------------------------------------------------------------- precision, recall, and so on


def column(*values: float) -> np.ndarray:
    return np.array(values)[:, None]


@pytest.mark.parametrize(("samples", "reference", "expected"), [
    # radius 1 around 0 1 2 3; of the samples .5 is in two balls, 4 is on the edge of one, 9 and 10 in none
    (column(0.5, 4, 9, 10), column(0, 1, 2, 3), {"precision": 2 / 4, "density": 3 / 4, "coverage": 3 / 4}),
    # radii of these samples: 3.5, 3.5, 1, 1 -> [-3, 4], [.5, 7.5], [8, 10], [9, 11]
    (column(0.5, 4, 9, 10), column(0, 1, 2, 30), {"recall": 3 / 4}),
    # a sample set that collapsed on one mode: all inside, most of the reference not covered
    (column(0, 0.1, 0.2, 0.3), column(0, 1, 2, 3), {"precision": 1.0, "recall": 1 / 4, "coverage": 2 / 4}),
    # far apart
    (column(100, 101, 102), column(0, 1, 2), {"precision": 0.0, "recall": 0.0, "density": 0.0, "coverage": 0.0}),
    # the same set
    (column(0, 1, 2, 3), column(0, 1, 2, 3), {"precision": 1.0, "recall": 1.0, "density": 10 / 4, "coverage": 1.0}),
])
def test_neighbours_counted_by_hand(samples: np.ndarray, reference: np.ndarray, expected: dict[str, float]) -> None:
    found = dict(zip(("precision", "recall"), precision_recall(samples, reference, k=1), strict=True))
    found |= dict(zip(("density", "coverage"), density_coverage(samples, reference, k=1), strict=True))

    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_an_outlier_in_the_reference_costs_density_less_than_precision() -> None:
    """Naeem et al., figure 2: one far reference image makes a huge ball that hides wrong samples from precision."""
    reference = np.concatenate([normals(200, 2), np.array([[40.0, 0.0]])])
    wrong = np.array([20.0, 0.0]) + normals(200, 2, 1)

    assert precision_recall(wrong, reference)[0] == 1.0
    assert density_coverage(wrong, reference)[0] <= 0.2


def test_equal_distributions_reach_their_expectation() -> None:
    """Naeem et al., lemma 2: coverage of equal distributions is 1 - (M-1)...(M-k) / ((N+M-1)...(N+M-k)), density 1."""
    n, k = 400, 5
    found = np.mean([density_coverage(normals(n, 5, 2 * i), normals(n, 5, 2 * i + 1)) for i in range(5)], axis=0)
    expected = 1 - np.prod([(n - j) / (2 * n - j) for j in range(1, k + 1)])

    assert found[0] == pytest.approx(1, abs=0.1)
    assert found[1] == pytest.approx(expected, abs=0.02)


def test_copies_are_inside_balls_of_radius_zero() -> None:
    """A set that repeats each image has balls of radius 0, and inner products in float64 round."""
    reference = 1000 + 300 * normals(60, 64)

    assert precision_recall(np.repeat(reference, 5, axis=0), reference) == (1.0, 1.0)


# ------------------------------------------------------------------------------------------------------------- together


def test_every_result_states_what_it_depends_on() -> None:
    found = measure(list(METRICS), normals(60, 5), normals(60, 5, 1))["scores"]

    assert set(found) == {"fid", "kid_poly3_unbiased", "mmd2_linear_biased", "mmd2_rbf_median_unbiased", "precision_k3",
                          "recall_k3", "density_k5", "coverage_k5"}
    assert all(np.isfinite(one["value"]) for one in found.values())
    assert found["mmd2_rbf_median_unbiased"]["sigma"] == median_distance(normals(60, 5, 1))
    assert found["kid_poly3_unbiased"]["subset_rows"] == 60


@pytest.mark.parametrize(("x", "y", "words"), [
    (normals(5, 3), normals(5, 4), "same extractor"),
    (normals(1, 3), normals(5, 3), "at least two"),
    (np.full((5, 3), np.nan), normals(5, 3), "not finite"),
    (normals(3, 3), normals(3, 3), "3-th nearest"),
])
def test_refuses_what_cannot_be_compared(x: np.ndarray, y: np.ndarray, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        measure(["precision_recall"], x, y)
