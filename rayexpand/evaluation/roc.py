"""Scores of members and non-members: curve, rates at small errors, area, and intervals.

    paper        here            meaning, unit
    TPR, FPR     tpr, fpr        shares of the members, and of the non-members, above a threshold
    n            n_non           non-members; at most floor(f n) of them may lie above the threshold of "TPR at FPR f"
    epsilon      epsilon         ln(TPR / FPR): what a mechanism with (epsilon, 0) must at least have, a point estimate
    epsilon_low  epsilon["low"]  the same of the lower bound of TPR and the upper bound of FPR

Every rate is read at a threshold between two different scores, so equal scores are never split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest

from rayexpand.contract.rng import PlanRng

FPRS = {"tpr_at_fpr_001": 0.001, "tpr_at_fpr_01": 0.01}  # key in results -> FPR
POINTS = 200  # of a stored curve


@dataclass(frozen=True)
class Roc:
    """A curve by falling threshold: `hits` members and `alarms` non-members above it; the first entry is 0, 0."""

    hits: np.ndarray
    alarms: np.ndarray

    @property
    def tpr(self) -> np.ndarray:
        return self.hits / self.hits[-1]

    @property
    def fpr(self) -> np.ndarray:
        return self.alarms / self.alarms[-1]

    def at(self, fpr: float) -> int:
        """The last point at which at most floor(fpr n) non-members lie above the threshold."""
        allowed = math.floor(fpr * self.alarms[-1] + 1e-9)  # 0.29 * 100 is 28.999999999999996
        return int(np.searchsorted(self.alarms, allowed, side="right")) - 1

    def auc(self) -> float:
        """Area under the curve; a tie of a member with a non-member counts half."""
        return float(np.trapezoid(self.tpr, self.fpr))

    def balanced_accuracy(self) -> float:
        """The largest mean of TPR and 1 - FPR over all thresholds."""
        return float(np.max(self.tpr - self.fpr) + 1) / 2

    def points(self) -> list[tuple[float, float]]:
        """(FPR, TPR), the highest TPR of each FPR, of many only some that lie evenly on a logarithmic axis."""
        last = np.flatnonzero(np.diff(self.alarms, append=np.inf) > 0)
        if len(last) > POINTS:
            wanted = np.geomspace(1, self.alarms[-1], POINTS)
            last = np.unique(np.r_[last[0], last[np.searchsorted(self.alarms[last], wanted)]])
        return [(float(self.fpr[i]), float(self.tpr[i])) for i in last]


class Ranked(NamedTuple):
    """Scores in falling order, sorted once for the many weightings of a bootstrap."""

    member: np.ndarray  # bool, in that order
    example: np.ndarray  # which example a score belongs to
    ends: np.ndarray  # last place of each value

    def curve(self, weights: np.ndarray | None = None) -> Roc:
        """The curve, with a weight for each example."""
        w = np.ones(len(self.member)) if weights is None else weights[self.example]
        hits, alarms = (np.r_[0, np.cumsum(w * side)[self.ends]] for side in (self.member, ~self.member))
        return Roc(hits, alarms)


def ranked(scores: np.ndarray, member: np.ndarray, example: np.ndarray | None = None) -> Ranked:
    """`scores`, float (M,), larger for members; `member`, bool (M,); `example`, int (M,), its number; None: its own."""
    order = np.argsort(-scores, kind="stable")
    falling = scores[order]
    ends = np.flatnonzero(np.append(falling[1:] != falling[:-1], True))
    return Ranked(member[order], (np.arange(len(scores)) if example is None else example)[order], ends)


def measured(scores: np.ndarray, member: np.ndarray, example: np.ndarray, seed: int, draws: int = 1000
             ) -> dict[str, Any]:
    """Rates and area with 95 % intervals, and the curve.

    `low` and `high` resample examples, because scores of one example depend on each other; `exact` is the binomial
    interval, which takes scores for independent.
    """
    found = ranked(scores, member, example)
    curve = found.curve()
    value = _rates(curve)
    n, rng = int(example.max()) + 1, PlanRng(seed, "membership").dataset("bootstrap")
    again = [_rates(found.curve(rng.multinomial(n, np.full(n, 1 / n)).astype(float))) for _ in range(draws)]
    bounds = {key: np.nanquantile([one[key] for one in again], (0.025, 0.975)) for key in value}
    result: dict[str, Any] = {key: {"value": value[key], "low": float(low), "high": float(high)}
                              for key, (low, high) in bounds.items()}
    for key, fpr in FPRS.items():
        result[key] |= counted(curve, curve.at(fpr))
    return {**result, "members": int(curve.hits[-1]), "non_members": int(curve.alarms[-1]), "roc": curve.points()}


def _rates(curve: Roc) -> dict[str, float]:
    if not curve.hits[-1] or not curve.alarms[-1]:  # of a bootstrap draw of few examples
        return dict.fromkeys((*FPRS, "auc", "balanced_accuracy"), math.nan)
    return {**{key: float(curve.tpr[curve.at(fpr)]) for key, fpr in FPRS.items()},
            "auc": curve.auc(), "balanced_accuracy": curve.balanced_accuracy()}


def counted(curve: Roc, point: int) -> dict[str, Any]:
    """What a rate is of: counts, realised FPR, exact interval, epsilon."""
    hits, alarms = int(curve.hits[point]), int(curve.alarms[point])
    members, non_members = int(curve.hits[-1]), int(curve.alarms[-1])
    return {"hits": hits, "fpr": alarms / non_members, "exact": exact_interval(hits, members),
            "epsilon": epsilon(hits, members, alarms, non_members)}


def exact_interval(hits: int, of: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval of a share."""
    found = binomtest(hits, of).proportion_ci(level, method="exact")
    return float(found.low), float(found.high)


def epsilon(hits: int, members: int, alarms: int, non_members: int) -> dict[str, float | None]:
    """ln(TPR / FPR), None where it is infinite or nothing was hit, and its lower bound by two exact intervals."""
    low, high = exact_interval(hits, members)[0], exact_interval(alarms, non_members)[1]
    return {"value": math.log(hits / members / (alarms / non_members)) if hits and alarms else None,
            "low": math.log(low / high) if low else None}
