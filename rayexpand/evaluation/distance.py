"""How far samples are from real images, by their features.

    here   meaning, unit
    x_ND   features of N samples, D numbers each, any extractor
    y_MD   features of M reference images, by the same extractor
    k      how many neighbours make the radius of a ball

Everything is computed in float64: sums over many rows lose the small differences of covariances in float32. Numbers
compare only at equal N and M, with one extractor. `measure` returns each value with what it depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rayexpand.contract.errors import UsageError
from rayexpand.contract.rng import generator, row_key

KID_SUBSETS, KID_SUBSET = 100, 1000  # Binkowski et al. 2018, section 4
PRECISION_K = 3  # Kynkaanniemi et al. 2019, section 3
COVERAGE_K = 5  # Naeem et al. 2020, section 4
MEDIAN_ROWS = 2000  # rows whose distances give the median bandwidth
_BLOCK = 2048  # rows of a kernel matrix held at once
_ROUNDING = 1e-7  # of the largest norm: error of a distance that is computed from inner products

Result = dict[str, Any]


def measure(metrics: Sequence[str], samples_ND: np.ndarray, reference_MD: np.ndarray, seed: int = 0) -> Result:
    """Name -> {"value", what it depends on} of each of `metrics` (keys of METRICS); one may give several names, and a
    name states kernel, bandwidth rule or k. `warnings` lists why a value is not to be trusted or compared.

    Raises UsageError for features that are not finite, differ in width, or are fewer than the metric needs.
    """
    x_ND, y_MD = _checked(samples_ND, reference_MD)
    found: Result = {}
    for metric in metrics:
        found |= METRICS[metric](x_ND, y_MD, seed)
    warnings = []
    if len(x_ND) != len(y_MD):
        warnings.append(f"{len(x_ND)} samples against {len(y_MD)} reference images: these values, FID above all, "
                        "compare only with values at the same two numbers; set `images` to take as many of both")
    width = x_ND.shape[1]
    if "fid" in found and min(len(x_ND), len(y_MD)) <= width:
        warnings.append(f"fid: {min(len(x_ND), len(y_MD))} images are too few for {width} features, a covariance is "
                        f"not of full rank; take more than {width} images of both, or read kid instead")
    return {"scores": found, "warnings": warnings, "n_samples": len(x_ND), "n_reference": len(y_MD), "features": width}


def fid(x_ND: np.ndarray, y_MD: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians with the means and (n - 1) covariances of the rows (Heusel et al.
    2017), by torchmetrics with an identity extractor in float64. Raises UsageError for fewer than two rows."""
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    x_ND, y_MD = _checked(x_ND, y_MD)
    identity = torch.nn.Identity()
    identity.num_features = x_ND.shape[1]  # else it is asked for the features of a random image
    metric = FrechetInceptionDistance(feature=identity).set_dtype(torch.float64)
    centre = y_MD.mean(axis=0)  # cancels in exact arithmetic; torchmetrics subtracts squares of means
    metric.update(torch.from_numpy(y_MD - centre), real=True)
    metric.update(torch.from_numpy(x_ND - centre), real=False)
    return float(metric.compute())


def mmd2_linear(x_ND: np.ndarray, y_MD: np.ndarray) -> float:
    """Biased squared MMD with kernel x.y / D: the squared distance of the means over D (Real-Fake, equation 7)."""
    return float(np.square(x_ND.mean(axis=0) - y_MD.mean(axis=0)).mean())


def mmd2_rbf(x_ND: np.ndarray, y_MD: np.ndarray, sigma: float, *, biased: bool = False) -> float:
    """Squared MMD with kernel exp(-|x - y|^2 / (2 sigma^2)) (Gretton et al. 2012): the unbiased U-statistic (equation
    3, may be below 0), or the `biased` V-statistic (equation 5)."""
    from sklearn.metrics.pairwise import rbf_kernel

    return _mmd2(x_ND, y_MD, lambda a, b: rbf_kernel(a, b, gamma=0.5 / sigma ** 2), biased)


def median_distance(y_MD: np.ndarray, seed: int = 0) -> float:
    """Median distance of two rows, over a keyed choice of MEDIAN_ROWS. Raises UsageError where it is 0."""
    from sklearn.metrics import pairwise_distances

    rows = generator(row_key(seed, "distance", "", 0, 0, "median")).permutation(len(y_MD))[:MEDIAN_ROWS]
    found = float(np.median(pairwise_distances(y_MD[rows])[np.triu_indices(len(rows), 1)]))
    if not found > 0:
        raise UsageError("most reference images have the same features, so there is no bandwidth; give a reference "
                         "with different images")
    return found


def kid(x_ND: np.ndarray, y_MD: np.ndarray, seed: int = 0, subsets: int = KID_SUBSETS,
        subset: int = KID_SUBSET) -> tuple[float, float | None, int, int]:
    """(mean, standard deviation over subsets, subsets, rows of one) of the unbiased squared MMD with kernel
    (x.y / D + 1)^3 (Binkowski et al. 2018). Subsets of `subset` rows of both sides are drawn with a key; where a side
    has no more rows than that, everything is used once, which is unbiased too, and there is no deviation."""
    from sklearn.metrics.pairwise import polynomial_kernel

    def one(x: np.ndarray, y: np.ndarray) -> float:
        return _mmd2(x, y, lambda a, b: polynomial_kernel(a, b, degree=3, coef0=1), biased=False)

    rows = min(len(x_ND), len(y_MD))
    if rows <= subset:
        return one(x_ND, y_MD), None, 1, rows
    values = []
    for number in range(subsets):
        rng = generator(row_key(seed, "distance", "", number, 0, "kid"))
        values.append(one(x_ND[rng.permutation(len(x_ND))[:subset]], y_MD[rng.permutation(len(y_MD))[:subset]]))
    return float(np.mean(values)), float(np.std(values)), subsets, subset


def precision_recall(x_ND: np.ndarray, y_MD: np.ndarray, k: int = PRECISION_K) -> tuple[float, float]:
    """(precision, recall) of Kynkaanniemi et al. 2019: share of samples inside a ball around some reference image, and
    of reference images inside a ball around some sample; a ball reaches to, and includes, the k-th nearest neighbour
    of its centre in its own set. Raises UsageError for k or fewer rows."""
    return float((_balls_holding(x_ND, y_MD, k)[0] > 0).mean()), float((_balls_holding(y_MD, x_ND, k)[0] > 0).mean())


def density_coverage(x_ND: np.ndarray, y_MD: np.ndarray, k: int = COVERAGE_K) -> tuple[float, float]:
    """(density, coverage) of Naeem et al. 2020 over the balls around reference images: how many hold a sample, over k
    (may exceed 1), and the share of balls with at least one sample. Raises UsageError for k or fewer rows."""
    balls_N, samples_M = _balls_holding(x_ND, y_MD, k)
    return float(balls_N.mean() / k), float((samples_M > 0).mean())


# -------------------------------------------------------------------------------------------------------- named results


def _fid(x_ND: np.ndarray, y_MD: np.ndarray, seed: int) -> Result:
    return {"fid": {"value": fid(x_ND, y_MD)}}


def _kid(x_ND: np.ndarray, y_MD: np.ndarray, seed: int) -> Result:
    value, std, subsets, rows = kid(x_ND, y_MD, seed)
    return {"kid_poly3_unbiased": {"value": value, "std": std, "subsets": subsets, "subset_rows": rows,
                                   "kernel": "(x.y / D + 1)^3"}}


def _mmd2_linear(x_ND: np.ndarray, y_MD: np.ndarray, seed: int) -> Result:
    return {"mmd2_linear_biased": {"value": mmd2_linear(x_ND, y_MD), "kernel": "x.y / D"}}


def _mmd2_rbf(x_ND: np.ndarray, y_MD: np.ndarray, seed: int) -> Result:
    sigma = median_distance(y_MD, seed)
    return {"mmd2_rbf_median_unbiased": {
        "value": mmd2_rbf(x_ND, y_MD, sigma), "kernel": "exp(-|x - y|^2 / (2 sigma^2))", "sigma": sigma,
        "bandwidth": f"median distance within the reference (at most {MEDIAN_ROWS} rows)"}}


def _precision_recall(x_ND: np.ndarray, y_MD: np.ndarray, seed: int) -> Result:
    precision, recall = precision_recall(x_ND, y_MD)
    return {f"precision_k{PRECISION_K}": {"value": precision, "k": PRECISION_K},
            f"recall_k{PRECISION_K}": {"value": recall, "k": PRECISION_K}}


def _density_coverage(x_ND: np.ndarray, y_MD: np.ndarray, seed: int) -> Result:
    density, coverage = density_coverage(x_ND, y_MD)
    return {f"density_k{COVERAGE_K}": {"value": density, "k": COVERAGE_K},
            f"coverage_k{COVERAGE_K}": {"value": coverage, "k": COVERAGE_K}}


METRICS: dict[str, Callable[[np.ndarray, np.ndarray, int], Result]] = {
    "fid": _fid, "kid": _kid, "mmd2_linear": _mmd2_linear, "mmd2_rbf": _mmd2_rbf,
    "precision_recall": _precision_recall, "density_coverage": _density_coverage}


# -------------------------------------------------------------------------------------------------------------- helpers


def _mmd2(x_ND: np.ndarray, y_MD: np.ndarray, kernel: Callable[[np.ndarray, np.ndarray], np.ndarray],
          biased: bool) -> float:
    x_ND, y_MD = _checked(x_ND, y_MD)
    xx, yy = (_mean_within(one, kernel, biased) for one in (x_ND, y_MD))
    xy = sum(float(kernel(x_ND[i:i + _BLOCK], y_MD).sum()) for i in range(0, len(x_ND), _BLOCK))
    return xx + yy - 2 * xy / (len(x_ND) * len(y_MD))


def _mean_within(x_ND: np.ndarray, kernel: Callable[[np.ndarray, np.ndarray], np.ndarray], biased: bool) -> float:
    """Mean of the kernel over pairs of rows, those of a row with itself left out unless `biased`."""
    n, total = len(x_ND), 0.0
    for i in range(0, n, _BLOCK):
        k_BN = kernel(x_ND[i:i + _BLOCK], x_ND)
        total += float(k_BN.sum()) - (0.0 if biased else float(np.trace(k_BN, offset=i)))
    return total / (n ** 2 if biased else n * (n - 1))


def _balls_holding(points_ND: np.ndarray, centres_MD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(N,) how many balls around `centres_MD` hold each point, and (M,) how many points each ball holds."""
    from sklearn.metrics import pairwise_distances_chunked
    from sklearn.neighbors import NearestNeighbors

    points_ND, centres_MD = _checked(points_ND, centres_MD)
    if len(centres_MD) <= k:
        raise UsageError(f"{len(centres_MD)} images have no {k}-th nearest neighbour; take more than {k} of both")
    middle = centres_MD.mean(axis=0)
    points_ND, centres_MD = points_ND - middle, centres_MD - middle
    # Copies are at distance 0 of each other, but not once inner products have been rounded.
    slack = _ROUNDING * float(max(np.linalg.norm(points_ND, axis=1).max(), np.linalg.norm(centres_MD, axis=1).max()))
    radius_M = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(centres_MD).kneighbors()[0][:, -1] + slack
    balls: list[np.ndarray] = []
    held_M = np.zeros(len(centres_MD), np.int64)
    for distances_BM in pairwise_distances_chunked(points_ND, centres_MD):
        inside_BM = distances_BM <= radius_M
        balls.append(inside_BM.sum(axis=1))
        held_M += inside_BM.sum(axis=0)
    return np.concatenate(balls), held_M


def _checked(x_ND: np.ndarray, y_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
