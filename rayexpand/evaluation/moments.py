"""Count, mean and scatter of rows that no one process holds, and the Frechet distance of two Gaussians by them.

    paper       here         meaning, unit
    n           n            rows
    m           mean_D       their mean
    S           scatter_DD / (n - 1)   their covariance; `scatter` is the sum of (x - m)(x - m)^T
    S^(1/2)     factor_KD    any F with F^T F = S; K is the rows or the features, whichever are fewer

Parts are merged by means and scatters (Chan, Golub and LeVeque 1983), which keeps the digits that sums of squares lose.
Floating point is not associative, so parts are merged in one order, that of their numbers, whenever they come.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy.linalg import LinAlgError, cholesky, eigh, svdvals


class Moments(NamedTuple):
    """float64, of rows of D features; D = 0 where there are none."""

    n: int
    mean_D: np.ndarray
    scatter_DD: np.ndarray

    @classmethod
    def of(cls, x_ND: np.ndarray, *, ours: bool = False) -> Moments:
        """`ours`: the rows are nobody else's, and are centred where they lie."""
        x_ND = np.asarray(x_ND, np.float64)
        if not len(x_ND):
            return NONE
        mean_D = x_ND.mean(axis=0)
        centred_ND = np.subtract(x_ND, mean_D, out=x_ND if ours else None)
        return cls(len(x_ND), mean_D, centred_ND.T @ centred_ND)

    def merged(self, other: Moments) -> Moments:
        if not (self.n and other.n):
            return other if other.n else self
        n, apart_D = self.n + other.n, other.mean_D - self.mean_D
        scatter_DD = self.scatter_DD + other.scatter_DD + np.outer(apart_D, apart_D) * (self.n * other.n / n)
        return Moments(n, self.mean_D + apart_D * (other.n / n), scatter_DD)


NONE = Moments(0, np.empty(0), np.empty((0, 0)))


@dataclass
class MomentsInOrder:
    """Merges parts by their numbers 0, 1, ... in a fixed binary tree, in whatever order they come. Neighbours are
    merged at once, so that few parts wait."""

    parts: int
    _waiting: dict[tuple[int, int], Moments] = field(default_factory=dict)  # level, number

    def add(self, number: int, part: Moments) -> None:
        level, width = 0, self.parts
        while width > 1:
            if (beside := number ^ 1) < width:
                if (level, beside) not in self._waiting:
                    break
                other = self._waiting.pop((level, beside))
                part = part.merged(other) if number < beside else other.merged(part)
            number, level, width = number // 2, level + 1, (width + 1) // 2
        self._waiting[level, number] = part

    @property
    def total(self) -> Moments:
        """Of all parts; each must have come."""
        (found,) = self._waiting.values() if self.parts else [NONE]
        return found


class FittedGaussian(NamedTuple):
    mean_D: np.ndarray
    factor_KD: np.ndarray
    trace: float  # of the covariance

    @classmethod
    def of_rows(cls, x_ND: np.ndarray, *, ours: bool = False) -> FittedGaussian:
        """With the (n - 1) covariance of at least two rows; `ours` as in Moments. Few rows are a factor by
        themselves."""
        x_ND = np.asarray(x_ND, np.float64)
        if len(x_ND) > x_ND.shape[1]:
            return cls.of(Moments.of(x_ND, ours=ours))
        mean_D = x_ND.mean(axis=0)
        factor_ND = (x_ND - mean_D) / np.sqrt(len(x_ND) - 1)
        return cls(mean_D, factor_ND, float(np.square(factor_ND).sum()))

    @classmethod
    def of(cls, moments: Moments) -> FittedGaussian:
        covariance_DD = moments.scatter_DD / (moments.n - 1)
        trace = float(np.trace(covariance_DD))
        try:
            return cls(moments.mean_D, cholesky(covariance_DD), trace)
        except LinAlgError:  # a feature is constant, or a sum of others
            values_D, vectors_DD = eigh(covariance_DD)
            kept = values_D > len(values_D) * np.finfo(np.float64).eps * values_D[-1]
            return cls(moments.mean_D, (vectors_DD[:, kept] * np.sqrt(values_D[kept])).T, trace)


def frechet(x: FittedGaussian, y: FittedGaussian) -> float:
    """Squared Frechet distance (Dowson and Landau 1982): |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2). With
    F^T F = S the last trace is the sum of the singular values of F1 F2^T, whatever the rank."""
    crossed = x.factor_KD @ y.factor_KD.T
    root = float(svdvals(crossed).sum()) if crossed.size else 0.0  # none where all rows of a side are equal
    return float(np.square(x.mean_D - y.mean_D).sum()) + x.trace + y.trace - 2 * root
