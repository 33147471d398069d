"""Do two numbers of the same trials rise together? Rank correlations with intervals by bootstrap.

    paper     here                meaning, unit
    x, y      x_N, y_N            two numbers of each of N trials
    rho       spearman            Pearson's correlation of mid-ranks
    tau_b     kendall             concordant minus discordant pairs, over the root of the pairs untied in x and in y
    g         group_N             trials with the same samples are one group: drawn together (cluster bootstrap)
    w         w_BN                how often each trial stands in a resample
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayexpand.contract.rng import generator, row_key

RESAMPLES = 2_000
FEWEST = 5  # groups of an interval
LEVEL = 0.95

Interval = tuple[float, float]


@dataclass(frozen=True)
class RankCorrelation:
    """None where a side has one value only; no intervals for fewer than FEWEST groups. `loses_best`: whether the trial
    with the highest y is not among the `kept` with the highest x; `loses_best_share`: the same over resamples."""

    n: int
    groups: int
    spearman: float | None
    kendall: float | None
    spearman_interval: Interval | None
    kendall_interval: Interval | None
    kept: int
    loses_best: bool
    loses_best_share: float | None


def rank_correlation(x_N: Sequence[float], y_N: Sequence[float], groups: Sequence[str], keep: float = 0.5,
                     seed: int = 0) -> RankCorrelation:
    """Of one trial or more. `keep`: share of trials that a choice by x would train. Resamples draw groups, keyed by
    `seed`."""
    x, y = np.asarray(x_N, np.float64), np.asarray(y_N, np.float64)
    names, group_N = np.unique(np.asarray(groups, object).astype(str), return_inverse=True)
    once_1N = np.ones((1, len(x)))
    rho, tau = (_one(found) for found in (_spearman(x, y, once_1N), _kendall(x, y, once_1N)))
    kept = max(1, int(np.ceil(keep * len(x))))
    between: list[Interval | None] = [None, None]
    share = None
    if len(names) >= FEWEST and rho is not None:
        rng = generator(row_key(seed, "rank correlation", "", 0, 0, "bootstrap"))
        w_BN = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)[:, group_N].astype(float)
        between = [_interval(_spearman(x, y, w_BN)), _interval(_kendall(x, y, w_BN))]
        share = float(_loses(x, y, w_BN, keep).mean())
    return RankCorrelation(len(x), len(names), rho, tau, between[0], between[1], kept,
                           bool(_loses(x, y, once_1N, keep)[0]), share)


def _spearman(x_N: np.ndarray, y_N: np.ndarray, w_BN: np.ndarray) -> np.ndarray:
    """(B,), NaN where all values of a side are equal."""
    rx_BN, ry_BN = (w_BN @ (0.5 * (v[:, None] == v) + (v[:, None] < v)) for v in (x_N, y_N))  # mid-ranks
    total_B1 = w_BN.sum(axis=1, keepdims=True)
    dx_BN, dy_BN = (r - (w_BN * r).sum(axis=1, keepdims=True) / total_B1 for r in (rx_BN, ry_BN))
    return _over((w_BN * dx_BN * dy_BN).sum(axis=1), (w_BN * dx_BN ** 2).sum(axis=1), (w_BN * dy_BN ** 2).sum(axis=1))


def _kendall(x_N: np.ndarray, y_N: np.ndarray, w_BN: np.ndarray) -> np.ndarray:
    """(B,), tau-b: copies of a trial are ties with each other."""
    sx_NN, sy_NN = (np.sign(v[:, None] - v) for v in (x_N, y_N))
    return _over(*(((w_BN @ s) * w_BN).sum(axis=1) for s in (sx_NN * sy_NN, sx_NN ** 2, sy_NN ** 2)))


def _over(top_B: np.ndarray, x_B: np.ndarray, y_B: np.ndarray) -> np.ndarray:
    below_B = np.sqrt(x_B * y_B)
    return np.divide(top_B, below_B, out=np.full(len(top_B), np.nan), where=below_B > 1e-9)


def _loses(x_N: np.ndarray, y_N: np.ndarray, w_BN: np.ndarray, keep: float) -> np.ndarray:
    """(B,): whether as many trials as are kept have a higher x than the best by y."""
    best_B = np.where(w_BN > 0, y_N, -np.inf).argmax(axis=1)
    higher_B = (w_BN * (x_N > x_N[best_B][:, None])).sum(axis=1)
    return higher_B >= np.maximum(1, np.ceil(keep * w_BN.sum(axis=1)))


def _one(found_1: np.ndarray) -> float | None:
    return None if np.isnan(found_1[0]) else float(found_1[0])


def _interval(found_B: np.ndarray) -> Interval | None:
    low, high = np.nanquantile(found_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
