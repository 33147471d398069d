"""What one sample is worth in real images: a curve of real-only accuracy, read backwards.

    paper         here               meaning, unit
    n             sizes_P            real images, ascending
    A(n)          accuracy_DP        accuracy with n real images, share; D resamples of it (the first may be the data)
    a             accuracy_D         of an arm with n0 real images and m samples
    n_eq          equivalent()       A^-1(a): real images that reach the same accuracy
    k             worth()            (n_eq - n0) / m: new real images that one sample is worth
    a - b n^-c    PowerLaw           the law that is drawn beside a curve, and never read backwards for k
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

EXPONENTS = (0.01, 3.0)  # of power laws


def isotonic(accuracy_DP: np.ndarray) -> np.ndarray:
    """The nearest curves that never fall, in least squares: the largest mean that begins at or before a point over the
    smallest that ends at or after it."""
    y_DP = np.atleast_2d(np.asarray(accuracy_DP, np.float64))
    sums_DP = np.concatenate([np.zeros((len(y_DP), 1)), np.cumsum(y_DP, axis=1)], axis=1)
    places = range(y_DP.shape[1])
    return np.stack([np.max([np.min([(sums_DP[:, end + 1] - sums_DP[:, start]) / (end + 1 - start)
                                     for end in places[at:]], axis=0) for start in places[:at + 1]], axis=0)
                     for at in places], axis=1)


def equivalent(sizes_P: Sequence[float], rising_DP: np.ndarray, accuracy_D: np.ndarray, near: float) -> np.ndarray:
    """n_eq of each resample, linear in log n between measured sizes; inf above the curve, -inf below it. On a level
    stretch the size nearest to `near`."""
    sizes = np.asarray(sizes_P, np.float64)
    curve_DP, a_D1 = np.atleast_2d(rising_DP), np.atleast_1d(accuracy_D)[:, None]
    last_D, first_D = (curve_DP <= a_D1).sum(axis=1) - 1, (curve_DP < a_D1).sum(axis=1)
    low_D, high_D = np.clip(last_D, 0, len(sizes) - 1), np.clip(first_D, 0, len(sizes) - 1)
    rows = np.arange(len(curve_DP))
    rise_D = curve_DP[rows, high_D] - curve_DP[rows, low_D]
    part_D = np.divide(a_D1[:, 0] - curve_DP[rows, low_D], rise_D, out=np.zeros(len(rows)), where=rise_D > 0)
    between_D = np.exp(np.log(sizes[low_D]) + part_D * (np.log(sizes[high_D]) - np.log(sizes[low_D])))
    level_D = np.clip(near, sizes[high_D], sizes[low_D])
    found_D = np.where(last_D < first_D, between_D, level_D)
    return np.where(last_D < 0, -np.inf, np.where(first_D == len(sizes), np.inf, found_D))


def worth(n_eq_D: np.ndarray, n0: float, m: float) -> np.ndarray:
    return (n_eq_D - n0) / m


def bounds(values_D: np.ndarray, level: float = 0.95,
           ends: tuple[float, float] | None = None) -> tuple[float | None, float | None]:
    """Percentile interval over resamples. A side is None, open, where the percentile itself lies beyond the curve on
    that side, or is not known (NaN); where it lies beyond the curve on the other side, the end of the curve bounds it:
    `ends`, what the smallest and the largest size are worth."""
    low = np.quantile(np.where(np.isnan(values_D), -np.inf, values_D), (1 - level) / 2, method="lower")
    high = np.quantile(np.where(np.isnan(values_D), np.inf, values_D), (1 + level) / 2, method="higher")
    least, most = ends or (None, None)
    return (float(low) if np.isfinite(low) else most if low > 0 else None,
            float(high) if np.isfinite(high) else least if high < 0 else None)


def holds(interval: tuple[float | None, float | None], value: float) -> bool:
    low, high = interval
    return (low is None or low <= value) and (high is None or value <= high)


# Laws ----------------------------------------------------------------------------------------------------------------


class PowerLaw(NamedTuple):
    """a - b n^-c, shares; `residual`: the sum of squares, of percentage points."""

    a: float
    b: float
    c: float
    residual: float

    def __call__(self, n: np.ndarray) -> np.ndarray:
        return self.a - self.b * np.asarray(n, np.float64) ** -self.c

    def reaches(self, target: float) -> float | None:
        """The size at which it reaches a share; None: never."""
        if self.a <= target or self.b <= 0:
            return None
        return float((self.b / (self.a - target)) ** (1 / self.c))


class Fit(NamedTuple):
    """What one law says of where a curve reaches the target. `asymptote`: share, None for a line in log n."""

    law: str
    asymptote: float | None
    crossover: float | None
    residual: float


def power_law(sizes_P: Sequence[float], accuracy_P: Sequence[float], asymptote: float | None = None) -> PowerLaw:
    """Least squares over b and c, and a where it is not given; for a given c the others are linear."""
    n, y = np.asarray(sizes_P, np.float64), np.asarray(accuracy_P, np.float64)

    def solved(c: float) -> PowerLaw:
        fall = n ** -c
        if asymptote is None:
            a, b = np.linalg.lstsq(np.stack([np.ones_like(fall), -fall], axis=1), y, rcond=None)[0].tolist()
        else:
            a, b = asymptote, float(((asymptote - y) * fall).sum() / (fall ** 2).sum())
        return PowerLaw(a, b, c, float((1e4 * (a - b * fall - y) ** 2).sum()))

    grid = np.geomspace(*EXPONENTS, 60)
    at = int(np.argmin([solved(float(c)).residual for c in grid]))
    low, high = grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)]
    best = minimize_scalar(lambda c: solved(c).residual, bounds=(low, high), method="bounded",
                           options={"xatol": 1e-9})
    return solved(float(best.x))


def range_of_fits(sizes_P: Sequence[float], accuracy_P: Sequence[float], target: float) -> list[Fit]:
    """Where laws that the data do not tell apart reach a target: a line in log n, a power law with its own asymptote,
    and with asymptotes at the whole percent below the target, at the one above and ten points higher."""
    n, y = np.asarray(sizes_P, np.float64), np.asarray(accuracy_P, np.float64)
    slope, start = np.polyfit(np.log10(n), y, 1).tolist()
    reached = float(10 ** ((target - start) / slope)) if slope > 0 else None
    found = [Fit("line in log n", None, reached, float((1e4 * (start + slope * np.log10(n) - y) ** 2).sum()))]
    above = math.ceil(100 * target + 1e-9) / 100
    for name, a in (("power law", None), *((f"power law to {100 * one:.0f} %", one) for one in (
            above - 0.01, above, above + 0.10) if max(y) < one <= 1)):
        law = power_law(n.tolist(), y.tolist(), a)
        found.append(Fit(name, law.a, law.reaches(target), law.residual))
    return found
