"""How far samples are from real images, by their features: Frechet distance and maximum mean discrepancies.

    here   meaning, unit
    x_ND   features of N samples, D numbers each, any extractor
    y_MD   features of M reference images, by the same extractor

Everything is computed in float64: sums over many rows lose the small differences of covariances in float32. Numbers
compare only at equal N and M, with one extractor.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rayexpand.contract.errors import UsageError
from rayexpand.contract.rng import generator, row_key
from rayexpand.evaluation.moments import FittedGaussian, frechet

KID_SUBSETS, KID_SUBSET = 100, 1000  # Binkowski et al. 2018, section 4
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # Jayasumana et al. 2024, section 5
INFINITY_SIZES = 15  # Chong and Forsyth 2020, section 4
LEAST_INFINITY = 2 * INFINITY_SIZES  # images of a side
MEDIAN_ROWS = 2000  # rows whose distances give the median bandwidth
_BLOCK, _HELD = 2048, 1 << 23  # rows of a kernel matrix, and numbers of it, held at once


def fd(x_ND: np.ndarray, y_MD: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians with the means and (n - 1) covariances of the rows (Heusel et al.
    2017). Raises UsageError for fewer than two rows."""
    x_ND, y_MD = checked(x_ND, y_MD)
    return frechet(FittedGaussian.of_rows(x_ND), FittedGaussian.of_rows(y_MD))


def fd_infinity(x_ND: np.ndarray, y_MD: np.ndarray, seed: int = 0) -> tuple[float, list[tuple[int, int]]]:
    """(distance expected of infinitely many rows, the (N, M) it was extrapolated from): the intercept of a
    least-squares line over 1/N through the distances of INFINITY_SIZES keyed subsets, from half the rows to all of
    both sides. Unlike Chong and Forsyth 2020, who cut the samples alone, both sides are cut in proportion, since both
    make the distance too large. Raises UsageError for fewer than LEAST_INFINITY rows."""
    x_ND, y_MD = checked(x_ND, y_MD)
    if min(len(x_ND), len(y_MD)) < LEAST_INFINITY:
        raise UsageError(f"fd_infinity: {len(x_ND)} and {len(y_MD)} images are too few for a line through "
                         f"{INFINITY_SIZES} sizes; take {LEAST_INFINITY} or more of both, or leave it out")
    rng = generator(row_key(seed, "distance", "", 0, 0, "infinity"))
    sizes = [(round(share * len(x_ND)), round(share * len(y_MD))) for share in np.linspace(0.5, 1, INFINITY_SIZES)]
    # Drawn anew for each size: subsets of one another share their errors, which the line then extrapolates.
    values = [frechet(*(FittedGaussian.of_rows(side[rng.permutation(len(side))[:rows]], ours=True)
                        for side, rows in zip((x_ND, y_MD), size, strict=True))) for size in sizes]
    return float(np.polyfit([1 / n for n, _ in sizes], values, 1)[1]), sizes


def mmd2_linear(x_ND: np.ndarray, y_MD: np.ndarray) -> float:
    """Biased squared MMD with kernel x.y / D: the squared distance of the means over D (Real-Fake, equation 7)."""
    return float(np.square(x_ND.mean(axis=0) - y_MD.mean(axis=0)).mean())


def mmd2_rbf(x_ND: np.ndarray, y_MD: np.ndarray, sigma: float, *, biased: bool = False) -> float:
    """Squared MMD with kernel exp(-|x - y|^2 / (2 sigma^2)) (Gretton et al. 2012): the unbiased U-statistic (equation
    3, may be below 0), or the `biased` V-statistic (equation 5)."""
    from sklearn.metrics.pairwise import rbf_kernel

    return _mmd2(x_ND, y_MD, lambda a, b: rbf_kernel(a, b, gamma=0.5 / sigma ** 2), biased)


def cmmd(x_ND: np.ndarray, y_MD: np.ndarray) -> float:
    """1000 times the biased squared MMD of rows of unit length with an RBF kernel of sigma 10 (Jayasumana et al. 2024).
    So wide a kernel sees little more than the means: it is nearly 10 |m1 - m2|^2. Raises UsageError for a row that is
    0."""
    return CMMD_SCALE * mmd2_rbf(unit(x_ND), unit(y_MD), CMMD_SIGMA, biased=True)


def unit(x_ND: np.ndarray) -> np.ndarray:
    """Rows of length 1. Raises UsageError for a row that is 0."""
    length_N1 = np.linalg.norm(x_ND, axis=1, keepdims=True)
    if not length_N1.all():
        raise UsageError("the features of an image are all 0, so they have no direction; choose another extractor")
    return x_ND / length_N1


def median_distance(y_MD: np.ndarray, seed: int = 0) -> float:
    """Median distance of two rows, over a keyed choice of MEDIAN_ROWS. Raises UsageError where it is 0."""
    from sklearn.metrics import pairwise_distances

    rows = generator(row_key(seed, "distance", "", 0, 0, "median")).permutation(len(y_MD))[:MEDIAN_ROWS]
    found = float(np.median(pairwise_distances(y_MD[rows])[np.triu_indices(len(rows), 1)]))
    if not found > 0:
        raise UsageError("most reference images have the same features, so there is no bandwidth; give a reference "
                         "with different images")
    return found


def kd(x_ND: np.ndarray, y_MD: np.ndarray, seed: int = 0, subsets: int = KID_SUBSETS,
       subset: int = KID_SUBSET) -> tuple[float, float | None, int, int]:
    """(mean, standard deviation over subsets, subsets, rows of one) of the unbiased squared MMD with kernel
    (x.y / D + 1)^3 (Binkowski et al. 2018). Subsets of `subset` rows of both sides are drawn with a key; where a side
    has fewer rows than that, everything is used once, which is unbiased too, and there is no deviation."""
    from sklearn.metrics.pairwise import polynomial_kernel

    def one(x: np.ndarray, y: np.ndarray) -> float:
        return _mmd2(x, y, lambda a, b: polynomial_kernel(a, b, degree=3, coef0=1), biased=False)

    rows = min(len(x_ND), len(y_MD))
    if rows < subset:
        return one(x_ND, y_MD), None, 1, rows
    values = []
    for number in range(subsets):
        rng = generator(row_key(seed, "distance", "", number, 0, "kid"))
        values.append(one(x_ND[rng.permutation(len(x_ND))[:subset]], y_MD[rng.permutation(len(y_MD))[:subset]]))
    return float(np.mean(values)), float(np.std(values)), subsets, subset


def checked(x_ND: np.ndarray, y_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64. Raises UsageError for features that are not finite, differ in width, or are fewer than two."""
    x_ND, y_MD = np.asarray(x_ND, np.float64), np.asarray(y_MD, np.float64)
    if x_ND.ndim != 2 or y_MD.ndim != 2 or x_ND.shape[1] != y_MD.shape[1]:
        raise UsageError(f"features of shape {x_ND.shape} and {y_MD.shape} cannot be compared; both sides need one row "
                         "per image from the same extractor")
    for name, rows in (("sample", x_ND), ("reference image", y_MD)):
        if len(rows) < 2:
            raise UsageError(f"there is {len(rows)} {name} to compare; at least two of both are needed")
        if bad := int((~np.isfinite(rows)).any(axis=1).sum()):
            raise UsageError(f"the features of {bad} of {len(rows)} {name}s are not finite; choose an extractor that "
                             "takes these images")
    return x_ND, y_MD


def _mmd2(x_ND: np.ndarray, y_MD: np.ndarray, kernel: Callable[[np.ndarray, np.ndarray], np.ndarray],
          biased: bool) -> float:
    x_ND, y_MD = checked(x_ND, y_MD)
    xx, yy = (_mean_within(one, kernel, biased) for one in (x_ND, y_MD))
    block = _block(len(y_MD))
    xy = sum(float(kernel(x_ND[i:i + block], y_MD).sum()) for i in range(0, len(x_ND), block))
    return xx + yy - 2 * xy / (len(x_ND) * len(y_MD))


def _mean_within(x_ND: np.ndarray, kernel: Callable[[np.ndarray, np.ndarray], np.ndarray], biased: bool) -> float:
    """Mean of the kernel over pairs of rows, those of a row with itself left out unless `biased`."""
    n, total, block = len(x_ND), 0.0, _block(len(x_ND))
    for i in range(0, n, block):
        k_BN = kernel(x_ND[i:i + block], x_ND)
        total += float(k_BN.sum()) - (0.0 if biased else float(np.trace(k_BN, offset=i)))
    return total / (n ** 2 if biased else n * (n - 1))


def _block(columns: int) -> int:
    """Rows of a kernel matrix of so many columns that are computed at once."""
    return max(1, min(_BLOCK, _HELD // columns))
