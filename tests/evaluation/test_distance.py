"""Distances against closed forms on Gaussians and against other implementations."""

from __future__ import annotations

import numpy as np
import pytest

from rayexpand.contract.errors import UsageError
from rayexpand.contract.rng import generator, row_key
from rayexpand.evaluation import distance
from rayexpand.evaluation.distance import cmmd, fd, fd_infinity, kd, median_distance, mmd2_linear, mmd2_rbf
from rayexpand.evaluation.moments import FittedGaussian, Moments, MomentsInOrder, frechet


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


# ------------------------------------------------------------------------------------------------------------------ FD


def test_fd_of_gaussians_that_do_not_commute() -> None:
    m1, m2 = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 2.0])
    a, b = normals(3, 3, 1), normals(3, 3, 2)
    s1, s2 = a @ a.T + np.eye(3), b @ b.T + 0.3 * np.eye(3)
    expected = gaussian_distance(m1, s1, m2, s2)

    assert fd(with_moments(50, m1, s1), with_moments(50, m2, s2, 1)) == pytest.approx(expected, rel=1e-9)
    assert fd(with_moments(50, m1, s1), with_moments(80, m1, s1, 1)) == pytest.approx(0, abs=1e-6)


def test_fd_by_hand_in_one_dimension() -> None:
    """N(0, 1) and N(3, 4): 3^2 + (1 - 2)^2 = 10."""
    x = with_moments(20, np.zeros(1), np.eye(1))

    assert fd(x, 3 + 2 * x) == pytest.approx(10, rel=1e-9)


def test_fd_does_not_lose_digits_far_from_zero() -> None:
    x, y = with_moments(50, np.zeros(2), np.eye(2)), with_moments(50, np.ones(2), np.eye(2), 1)

    assert fd(x + 1e7, y + 1e7) == pytest.approx(2, rel=1e-6)


@pytest.mark.parametrize(("x", "y", "expected"), [((0, 2), (3, 5), 9), ((0, 2), (3, 7), 18), ((0, 2), (0, 2), 0)])
def test_fd_by_hand(x: tuple[float, ...], y: tuple[float, ...], expected: float) -> None:
    assert fd(np.array(x)[:, None], np.array(y)[:, None]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("n", "m"), [(60, 80), (60, 300), (300, 60), (300, 250)])
def test_fd_is_that_of_the_root_of_a_matrix_whatever_the_rank(n: int, m: int) -> None:
    """Fewer rows than 200 features, or more. The root of a matrix loses digits at low rank."""
    from scipy.linalg import sqrtm

    x, y = normals(n, 200), 0.5 + 1.5 * normals(m, 200, 1)
    s1, s2 = np.cov(x.T), np.cov(y.T)
    expected = np.square(x.mean(axis=0) - y.mean(axis=0)).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)

    assert fd(x, y) == pytest.approx(expected, rel=1e-6)
    assert fd(x, x) == pytest.approx(0, abs=1e-9 * np.square(x).sum())
    assert fd(x[::-1], y) == pytest.approx(fd(x, y), rel=1e-10)


def test_fd_of_constant_features_and_of_equal_rows() -> None:
    x = np.concatenate([normals(30, 2), np.full((30, 1), 7.0), normals(30, 2)[:, :1]], axis=1)

    assert fd(x, x + 1) == pytest.approx(4, abs=1e-9)
    assert fd(np.ones((5, 2)), np.zeros((9, 2))) == pytest.approx(2)


def test_fd_between_halves_is_mostly_bias_and_its_limit_is_not() -> None:
    """Isotropic Gaussians of 32 features: about D^2 / 2N = 1.02 at 500 rows, 0 at infinitely many."""
    x, y = normals(500, 32), normals(500, 32, 1)
    limit, sizes = fd_infinity(x, y)

    assert fd(x, y) == pytest.approx(32 ** 2 / 1000, rel=0.25)
    assert abs(np.mean([limit, *(fd_infinity(x, y, seed)[0] for seed in range(1, 5))])) < 0.15
    assert (len(sizes), sizes[0], sizes[-1]) == (15, (250, 250), (500, 500))
    assert fd_infinity(x, y) == (limit, sizes)
    assert abs(fd_infinity(x + 0.5, y)[0] - 8) < 0.7
    with pytest.raises(UsageError, match="too few for a line"):
        fd_infinity(x[:29], y)


@pytest.mark.slow
def test_cutting_the_samples_alone_leaves_half_of_the_bias() -> None:
    """Means over 15 draws of 1,000 rows of 64 features, whose true distance is 0."""
    rng, found = generator(row_key(0, "test", "", 0, 0, "cut")), []
    for key in range(15):
        x, y = normals(1000, 64, 2 * key), normals(1000, 64, 2 * key + 1)
        sizes = np.linspace(500, 1000, 15).astype(int)
        alone = np.polyfit(1 / sizes, [fd(x[rng.permutation(1000)[:n]], y) for n in sizes], 1)[1]
        found.append((fd(x, y), alone, fd_infinity(x, y, key)[0]))

    value, alone, both = np.mean(found, axis=0)
    assert value == pytest.approx(2.20, abs=0.02)
    assert alone == pytest.approx(1.09, abs=0.05)
    assert abs(both) < 0.06


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 8, 11])
def test_sums_do_not_depend_on_the_order_in_which_parts_come(parts: int) -> None:
    x = 100 + normals(97, 5)
    cut = [Moments.of(part) for part in np.array_split(x, parts)]
    found = []
    for key in range(4):
        total = MomentsInOrder(parts)
        for number in generator(row_key(key, "test", "", 0, 0, "order")).permutation(parts):
            total.add(int(number), cut[number])
        found.append(total.total)

    assert all(np.array_equal(one.scatter_DD, found[0].scatter_DD) for one in found[1:])
    assert found[0].n == 97
    assert np.allclose(found[0].scatter_DD / 96, np.cov(x.T), rtol=1e-12)
    y = normals(80, 5, 1)
    assert frechet(FittedGaussian.of(found[0]), FittedGaussian.of_rows(y)) == pytest.approx(fd(x, y), rel=1e-10)


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
    whole = mmd2_rbf(x, y, 1.0), kd(x, y)
    monkeypatch.setattr(distance, "_BLOCK", 7)

    assert (mmd2_rbf(x, y, 1.0), kd(x, y)[0]) == (pytest.approx(whole[0]), pytest.approx(whole[1][0]))


def test_linear_mmd_is_that_of_real_fake() -> None:
    """Errors (1,2), (3,-2): their mean (2,0) gives 4 / D = 2; mean over all, then squared, would give 1."""
    assert mmd2_linear(np.array([[1.0, 2.0], [3.0, -2.0]]), np.zeros((2, 2))) == 2.0
    assert mmd2_linear(np.array([[1.0, 2], [3, -2], [-1, 0], [1, 4]]), np.zeros((4, 2))) == 1.0


def test_median_bandwidth() -> None:
    assert median_distance(np.array([[0.0], [1.0], [3.0]])) == 2.0
    assert median_distance(normals(3000, 2)) == pytest.approx(2 * np.log(2) ** 0.5, rel=0.03)  # |x - y|^2 / 2 ~ chi^2
    with pytest.raises(UsageError, match="no bandwidth"):
        median_distance(np.zeros((5, 2)))


# ------------------------------------------------------------------------------------------------------------------ KD


def test_kd_is_unbiased_at_any_number_of_rows() -> None:
    values = [kd(normals(30, 6, 2 * i), normals(30, 6, 2 * i + 1))[0] for i in range(200)]

    assert min(values) < 0 < max(values), "a biased estimate is never negative"
    assert abs(np.mean(values)) < 4 * np.std(values) / 200 ** 0.5


def test_kd_of_a_shift_in_closed_form() -> None:
    """One feature, x ~ N(0,1), y ~ N(1,1): (xy+1)^3 = sum of binom(3,j) (xy)^j, so the distance is
    sum of binom(3,j) (E x^j - E y^j)^2 = 3 * 1 + 3 * 1 + 1 * 4^2 = 22."""
    values = [kd(normals(400, 1, 2 * i), 1 + normals(400, 1, 2 * i + 1))[0] for i in range(40)]

    assert abs(np.mean(values) - 22) < 4 * np.std(values) / 40 ** 0.5


def test_kd_subsets_are_keyed_and_agree_with_torchmetrics() -> None:
    import torch
    from torchmetrics.image.kid import poly_mmd

    x, y = normals(60, 4), 0.5 + normals(80, 4, 1)
    value, std, subsets, rows = kd(x, y, seed=1, subsets=30, subset=20)

    assert (subsets, rows) == (30, 20)
    assert std is not None
    assert kd(x, y, seed=1, subsets=30, subset=20)[0] == value != kd(x, y, seed=2, subsets=30, subset=20)[0]
    assert value == pytest.approx(kd(x, y)[0], abs=4 * std / 30 ** 0.5)
    assert kd(x, y[:60])[0] == pytest.approx(float(poly_mmd(torch.from_numpy(y[:60]), torch.from_numpy(x))))


@pytest.mark.parametrize(("x", "y", "expected"), [((0, 1), (1, 2), 9.5), ((0, 0), (0, 0), 0)])
def test_kd_by_hand(x: tuple[float, ...], y: tuple[float, ...], expected: float) -> None:
    assert kd(np.array(x)[:, None], np.array(y)[:, None])[0] == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------------- CMMD


def test_cmmd_by_hand() -> None:
    e1, e2 = np.array([[1.0, 0], [1, 0]]), np.array([[0.0, 1], [0, 3]])

    assert cmmd(e1, e2) == pytest.approx(19.900332, abs=1e-6)
    assert cmmd(e1, -e1) == pytest.approx(39.602653, abs=1e-6)
    assert cmmd(e1, e1) == pytest.approx(0, abs=1e-9)
    x, y = normals(30, 4), normals(20, 4, 1)
    assert cmmd(np.repeat(x, 2, axis=0), y) == pytest.approx(cmmd(x, y), rel=1e-12)
    with pytest.raises(UsageError, match="all 0"):
        cmmd(np.zeros((2, 2)), e1)


def test_cmmd_is_nearly_a_distance_of_means() -> None:
    """Of unit vectors, 10 |m1 - m2|^2 to two per cent."""
    x, y = normals(400, 64) + 0.05, normals(400, 64, 1) - 0.05
    x, y = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (x, y))

    assert cmmd(x, y) == pytest.approx(10 * np.square(x.mean(axis=0) - y.mean(axis=0)).sum(), rel=0.02)


@pytest.mark.parametrize(("x", "y", "words"), [
    (normals(5, 3), normals(5, 4), "same extractor"),
    (normals(1, 3), normals(5, 3), "at least two"),
    (np.full((5, 3), np.nan), normals(5, 3), "not finite")])
def test_refuses_what_cannot_be_compared(x: np.ndarray, y: np.ndarray, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        fd(x, y)
