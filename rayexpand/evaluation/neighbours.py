"""Nearest neighbours between samples and real images: what is covered, what is credible, what is new.

    here          meaning, unit
    points_ND     features of the images that are counted
    centres_MD    features of the images whose balls count them
    k             how many neighbours make the radius of a ball; an image is none of its own
    s_SD, e_ED    features of held-out real images, and of the images that should cover them (GIF, theorem 4.1)

Balls are closed: a point at the very radius is inside. In sets with copies, radii are often 0, and the copies are what
such a ball holds; open balls (as in the package prdc) would say that a set does not cover itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rayexpand.contract.errors import UsageError

PRECISION_K = 3  # Kynkaanniemi et al. 2019, section 3
COVERAGE_K = 5  # Naeem et al. 2020, section 4
CLOSED = "closed balls: an image at the very radius counts"
_MEBIBYTES = 64  # of distances held at once
_ROUNDING = 1e-7  # of the largest norm: error of a distance that is computed from inner products


def precision_recall(x_ND: np.ndarray, y_MD: np.ndarray, k: int = PRECISION_K) -> tuple[float, float]:
    """(precision, recall) of Kynkaanniemi et al. 2019: share of samples inside a ball around some reference image, and
    of reference images inside a ball around some sample; a ball reaches to, and includes, the k-th nearest neighbour
    of its centre in its own set. Raises UsageError for k or fewer rows."""
    return float((balls_holding(x_ND, y_MD, k)[0] > 0).mean()), float((balls_holding(y_MD, x_ND, k)[0] > 0).mean())


def density_coverage(x_ND: np.ndarray, y_MD: np.ndarray, k: int = COVERAGE_K) -> tuple[float, float]:
    """(density, coverage) of Naeem et al. 2020 over the balls around reference images: how many hold a sample, over k
    (may exceed 1), and the share of balls with at least one sample. Raises UsageError for k or fewer rows."""
    balls_N, samples_M = balls_holding(x_ND, y_MD, k)
    return float(balls_N.mean() / k), float((samples_M > 0).mean())


def authenticity(x_ND: np.ndarray, y_MD: np.ndarray) -> float:
    """Share of samples that are farther from their nearest reference image than that image is from its own nearest
    other one (Alaa et al. 2022, section 3.3). Copies of outliers pass. Raises UsageError for one reference image."""
    from sklearn.neighbors import NearestNeighbors

    middle_D = y_MD.mean(axis=0)
    slack = _rounding(x_ND, y_MD, middle_D)
    real, new = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(y_MD - middle_D), 0
    own_M = real.kneighbors()[0][:, 0]
    for block in _blocks(len(x_ND), 8 * x_ND.shape[1]):
        distance_B1, nearest_B1 = real.kneighbors(x_ND[block] - middle_D)
        new += int((distance_B1[:, 0] > own_M[nearest_B1[:, 0]] + slack).sum())
    return new / len(x_ND)


def cover(s_SD: np.ndarray, e_ED: np.ndarray) -> dict[str, float | None]:
    """How far held-out images are from their nearest in `e_ED`: the largest distance `delta` and `div` = 1 / delta
    (None where delta is 0), of which one image decides, quantiles `q50` and `q95`, and the `mean`; `same`: how
    many have the very features of one there."""
    from sklearn.neighbors import NearestNeighbors

    e_ED, s_SD, slack = _centred(e_ED, s_SD)
    distance_S = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(e_ED).kneighbors(s_SD)[0][:, 0]
    distance_S[distance_S <= slack] = 0
    delta = float(distance_S.max())
    q50, q95 = np.quantile(distance_S, (0.5, 0.95))
    return {"delta": delta, "div": 1 / delta if delta else None, "q50": float(q50), "q95": float(q95),
            "mean": float(distance_S.mean()), "same": int((distance_S == 0).sum())}


def balls_holding(points_ND: np.ndarray, centres_MD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(N,) how many balls around `centres_MD` hold each point, and (M,) how many points each ball holds."""
    from sklearn.metrics.pairwise import euclidean_distances
    from sklearn.neighbors import NearestNeighbors

    if len(centres_MD) <= k:
        raise UsageError(f"precision, recall, density and coverage: {len(centres_MD)} images are too few for balls "
                         f"that reach to the nearest neighbour number {k}; take more than {k} of both")
    middle_D = centres_MD.mean(axis=0)
    slack = _rounding(points_ND, centres_MD, middle_D)
    centres_MD = centres_MD - middle_D
    radius_M = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(centres_MD).kneighbors()[0][:, -1] + slack
    balls, held_M = list[np.ndarray](), np.zeros(len(centres_MD), np.int64)
    for block in _blocks(len(points_ND), 8 * len(centres_MD)):
        inside_BM = euclidean_distances(points_ND[block] - middle_D, centres_MD) <= radius_M
        balls.append(inside_BM.sum(axis=1))
        held_M += inside_BM.sum(axis=0)
    return np.concatenate(balls), held_M


def _blocks(rows: int, row_bytes: int) -> Iterator[slice]:
    """Rows of which so many bytes each are held at once."""
    step = max(1, (_MEBIBYTES << 20) // max(1, row_bytes))
    return (slice(start, start + step) for start in range(0, rows, step))


def _centred(x_ND: np.ndarray, y_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Both about the mean of `y_MD`, and the error of their distances."""
    middle_D = y_MD.mean(axis=0)
    return x_ND - middle_D, y_MD - middle_D, _rounding(x_ND, y_MD, middle_D)


def _rounding(x_ND: np.ndarray, y_MD: np.ndarray, middle_D: np.ndarray) -> float:
    """Error of distances about a middle: copies are at distance 0 of each other, but not once inner products have been
    rounded."""
    return _ROUNDING * max(float(np.linalg.norm(side[block] - middle_D, axis=1).max()) for side in (x_ND, y_MD)
                           for block in _blocks(len(side), 8 * side.shape[1]))
