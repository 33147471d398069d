"""Which trials go on: asynchronous successive halving (ASHA, Li et al. 2020), with Ray and without.

    paper    here              meaning, unit
    r        grace             epochs that every trial gets
    eta      reduction_factor  about one in so many goes on beyond a rung
    R        epochs            of a trial that is never stopped
    rung k   r eta^k           epochs after which it is asked; from 1 to R
"""

from __future__ import annotations

import math

import numpy as np

from rayexpand.studies.sweep.config import AshaConfig


class Halving:
    """A trial that comes to a rung is stopped where its score is below the quantile 1 - 1 / eta of the scores that came
    there before it; it is asked once at each rung."""

    def __init__(self, asha: AshaConfig, epochs: int) -> None:
        self._eta = asha.reduction_factor
        rungs = int(math.log(epochs / asha.grace) / math.log(self._eta) + 1) if epochs >= asha.grace else 0
        self._rungs: list[tuple[float, dict[str, float]]] = [  # the highest first
            (asha.grace * self._eta ** k, {}) for k in reversed(range(rungs))]

    @property
    def epochs(self) -> list[int]:
        """After which it stops trials."""
        return sorted({math.ceil(rung) for rung, _ in self._rungs})

    def goes_on(self, key: str, epoch: int, score: float) -> bool:
        """Whether a trial is trained beyond this epoch."""
        there = next((scores for rung, scores in self._rungs if epoch >= rung and key not in scores), None)
        if there is None:
            return True
        goes = not there or score >= np.percentile([*there.values()], 100 * (1 - 1 / self._eta))
        there[key] = score
        return bool(goes)
