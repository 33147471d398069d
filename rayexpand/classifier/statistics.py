"""How sure a difference between classifiers is: intervals over test images and repetitions, families, what can be seen.

    paper         here              meaning, unit
    S, N          seeds, images     repetitions of a trial and test images, crossed: every one answers every image
    D             difference_SN     answers of one arm minus those of another, each -1, 0 or 1
    v_s, v_n      seed, image       variance of the mean from seeds alone and from images alone; both hold v_e
    v_e           residual          variance of the mean from what seeds and images do not explain
    v, df         se ** 2, df       variance of the mean and its degrees of freedom (Satterthwaite)
    q             Noise.disagree    share of test images on which two trials differ
    rho           Noise.repeats     part of that which is the same in all seeds
    sd            Noise.seed_sd     standard deviation of the difference over seeds
    A, C          arms, comparisons

Differences, standard errors and intervals are shares of images in [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr
from scipy.stats import t as student

from rayexpand.contract.errors import UsageError
from rayexpand.contract.rng import generator, row_key

LEVEL = 0.95  # of every interval, unless one says otherwise
RESAMPLES = 10_000
FOR_CORRELATIONS = 2_000  # resamples that correlations are taken from: each to about 0.02
NORMALS = 20_000  # draws that a family is adjusted by: 5 % to 0.15
_CHUNK = 1 << 22  # numbers held at once while resampling


@dataclass(frozen=True)
class MeanError:
    """A mean with its standard error and degrees of freedom."""

    mean: float
    se: float
    df: float

    @property
    def p(self) -> float:
        """Two-sided, of no difference. Answers that never vary are certain."""
        if not self.se:
            return float(self.mean == 0)
        return float(2 * student.sf(abs(self.mean) / self.se, self.df))

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        reach = float(student.isf((1 - level) / 2, self.df)) * self.se if self.se else 0.0
        return self.mean - reach, self.mean + reach


# Seeds crossed with images -------------------------------------------------------------------------------------------


def crossed(difference_SN: np.ndarray) -> MeanError:
    """The mean difference over seeds and images, both of them samples; (N,) is one seed, whose interval is over images
    alone. v = max(v_s + v_n - v_e, v_s, v_n). Raises UsageError for fewer than two numbers."""
    d_SN = np.atleast_2d(np.asarray(difference_SN, np.float64))
    seeds, images = d_SN.shape
    if d_SN.size < 2:
        raise UsageError("one answer of one seed has no interval; test on more images or with more seeds")
    mean = float(d_SN.mean())
    if min(seeds, images) == 1:
        return MeanError(mean, float(d_SN.std(ddof=1) / d_SN.size ** 0.5), d_SN.size - 1)
    seed, image, residual = _variances(d_SN)
    v = max(seed + image - residual, seed, image)
    if not v:
        return MeanError(mean, 0.0, seeds - 1)
    df = v ** 2 / (seed ** 2 / (seeds - 1) + image ** 2 / (images - 1)
                   + residual ** 2 / ((seeds - 1) * (images - 1)))
    return MeanError(mean, math.sqrt(v), df)


def _variances(d_SN: np.ndarray) -> tuple[float, float, float]:
    """v_s, v_n, v_e."""
    seeds, images = d_SN.shape
    of_seed_S, of_image_N = d_SN.mean(axis=1), d_SN.mean(axis=0)
    rest_SN = d_SN - of_seed_S[:, None] - of_image_N + d_SN.mean()
    residual = (rest_SN ** 2).sum() / ((seeds - 1) * (images - 1)) / (seeds * images)
    return float(of_seed_S.var(ddof=1) / seeds), float(of_image_N.var(ddof=1) / images), float(residual)


# Many arms -----------------------------------------------------------------------------------------------------------


def resampled(correct_ASN: np.ndarray, draws: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """float64 (draws, A): accuracy of every arm in joint resamples of images and seeds. Each takes N images and S seeds
    with replacement, an image with the answers of all arms and seeds, a seed with its trials in all arms (the
    pigeonhole bootstrap, Owen 2007)."""
    arms, seeds, images = correct_ASN.shape
    rng = generator(row_key(seed, "bootstrap", "", 0, 0, "joint"))
    answers_NK = correct_ASN.reshape(arms * seeds, images).T.astype(np.float32)  # sums of whole numbers: exact
    found_DA, step = np.empty((draws, arms)), max(1, _CHUNK // images)
    for start in range(0, draws, step):
        size = min(step, draws - start)
        drawn_Dn = rng.integers(images, size=(size, images)) + images * np.arange(size)[:, None]
        times_DN = np.bincount(drawn_Dn.ravel(), minlength=size * images).reshape(size, images).astype(np.float32)
        seeds_DS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size)
        right_DAS = (times_DN @ answers_NK).reshape(size, arms, seeds)
        found_DA[start:start + size] = np.einsum("das,ds->da", right_DAS, seeds_DS) / (seeds * images)
    return found_DA


def correlations(resampled_DC: np.ndarray) -> np.ndarray:
    """(C, C): of comparisons over joint resamples. One that never varies goes with no other."""
    centred_DC = resampled_DC - resampled_DC.mean(axis=0)
    scale_C = np.sqrt((centred_DC ** 2).sum(axis=0))
    unit_DC = np.divide(centred_DC, scale_C, out=np.zeros_like(centred_DC), where=scale_C > 1e-12)
    found_CC = unit_DC.T @ unit_DC
    np.fill_diagonal(found_CC, 1.0)
    return found_CC


def max_t(p_C: Sequence[float], correlation_CC: np.ndarray, seed: int = 0) -> tuple[list[float], float]:
    """(adjusted p by step-down max-t, level of each comparison at which all intervals together hold 95 %).

    With three seeds joint resamples take few distinct values, so they give the correlations of the comparisons, and the
    tails are normal with these correlations; the margins stay those of each comparison's own t. Westfall and Young
    1993, algorithm 2.8, with p in place of t, since degrees of freedom differ. Never less than p, never more than Holm.
    """
    p, lowest, adjusted = np.asarray(p_C, np.float64), 0.0, np.empty(len(p_C))
    values_C, vectors_CC = np.linalg.eigh(correlation_CC)
    rng = generator(row_key(seed, "max-t", "", 0, 0, "normals"))
    z_DC = rng.standard_normal((NORMALS, len(p))) @ (vectors_CC * np.sqrt(np.maximum(values_C, 0))).T
    tails_DC = 2 * ndtr(-np.abs(z_DC))
    order = np.argsort(p, kind="stable")
    for place, (one, bound) in enumerate(zip(order, holm(p[order].tolist()), strict=True)):
        reached = float((tails_DC[:, order[place:]].min(axis=1) <= p[one]).mean())
        adjusted[one] = lowest = max(lowest, min(max(reached, p[one]), bound))
    each = float(np.quantile(tails_DC.min(axis=1), 1 - LEVEL))
    return adjusted.tolist(), 1 - min(max(each, (1 - LEVEL) / len(p)), 1 - LEVEL)


def holm(p_C: Sequence[float]) -> list[float]:
    """Adjusted p that hold whatever the comparisons have in common."""
    p = np.asarray(p_C, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))))
    return adjusted.tolist()


def expected_maximum(count: int) -> float:
    """Mean of the largest of `count` independent standard normals: by how many standard errors the best of equal ones
    looks better than it is."""
    x = np.linspace(0.0, 12.0, 12_001)
    return float(np.trapezoid(1 - ndtr(x) ** count - ndtr(-x) ** count, x))


# What a study can see ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """What a difference between two arms varies by. The defaults are ours, for want of data."""

    disagree: float = 0.2
    repeats: float = 0.5
    seed_sd: float = 0.003


def noise_of(differences: Sequence[np.ndarray]) -> Noise:
    """The parts of 6.1, means over comparisons of (S, N) answers with two seeds and two images or more."""
    parts = np.zeros(3)
    for d_SN in differences:
        seeds, images = d_SN.shape
        seed, image, residual = _variances(np.asarray(d_SN, np.float64))
        parts += [max(0.0, (seed - residual) * seeds), max(0.0, (image - residual) * images),
                  residual * seeds * images]
    seed, image, residual = (parts / len(differences)).tolist()
    varies = image + residual
    return Noise(varies, image / varies if varies else 0.0, math.sqrt(seed))


def detectable(noise: Noise, images: int, seeds: int, of: int = 1) -> float:
    """The smallest true difference, a share, that is shown with probability 0.8 at the 5 % level, as one `of` so many
    comparisons that are adjusted together (by Bonferroni, so at most). One seed: what the images alone would show."""
    image = noise.repeats * noise.disagree / images
    residual = (1 - noise.repeats) * noise.disagree / (images * seeds)
    if seeds == 1:
        v, df = image + residual, float(images - 1)
    else:
        of_seeds = noise.seed_sd ** 2 / seeds + residual
        v = image + of_seeds
        df = v ** 2 / (of_seeds ** 2 / (seeds - 1) + (image + residual) ** 2 / (images - 1)
                       + residual ** 2 / ((seeds - 1) * (images - 1))) if v else 1.0
    return float(student.isf(0.025 / of, df) + student.ppf(0.8, df)) * math.sqrt(v)


def seeds_for(difference: float, noise: Noise, images: int, most: int = 20) -> int | None:
    """The fewest seeds, at most `most`, with which these images show a difference; None where none do."""
    return next((n for n in range(2, most + 1) if detectable(noise, images, n) <= difference), None)


def images_for(difference: float, noise: Noise, seeds: int, most: int = 10 ** 8) -> int | None:
    """The fewest test images, to three digits, with which so many seeds show a difference; None beyond `most`."""
    low, high = 2, most
    if detectable(noise, high, seeds) > difference:
        return None
    while high - low > max(1, high // 1000):
        middle = (low + high) // 2
        low, high = (low, middle) if detectable(noise, middle, seeds) <= difference else (middle, high)
    return high
