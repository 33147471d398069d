"""When a loop ends early: classifiers that were trained on more rounds are right no more often.

    symbol   here      meaning
    D_N      gain      answers after this round minus those after the best earlier one, each -1, 0 or 1, by image
    g        mean      mean of D_N; low, high: its 95 % interval over images (Student's t), all in points

The interval is that of a comparison with one repetition: it says nothing of how another training would have ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rayexpand.classifier.statistics import crossed
from rayexpand.studies.rounds.config import StopConfig

DIGITS = 4  # of what a decision keeps, so that it does not depend on the last bit


def gain_of(stop: StopConfig, right_RN: Sequence[np.ndarray], before: Mapping[str, Any]) -> dict[str, Any]:
    """What the last of these rounds brought. `right_RN`: bool (N,), whether image i was named right after each round;
    `before`: what this gave after the round before, {} after the first.

    accuracy (points) after the round, and from the second on: against (number of the best earlier round), mean, low,
    high (points), and below: for how many rounds one after the other `high` was below min_gain.
    """
    accuracy = [100 * float(np.mean(one)) for one in right_RN]
    found: dict[str, Any] = {"on": stop.on, "images": len(right_RN[-1]), "accuracy": round(accuracy[-1], DIGITS)}
    if len(right_RN) == 1:
        return {**found, "below": 0}
    best = int(np.argmax(accuracy[:-1]))
    gain = crossed(100 * (right_RN[-1].astype(np.int8) - right_RN[best].astype(np.int8)))
    low, high = (round(one, DIGITS) for one in gain.interval())
    below = before.get("below", 0) + 1 if high < stop.min_gain else 0
    return {**found, "against": best + 1, "mean": round(gain.mean, DIGITS), "low": low, "high": high, "below": below}


def stops(stop: StopConfig, gain: Mapping[str, Any]) -> str:
    """Why no further round is made, "" where one is."""
    if gain["below"] < stop.patience:
        return ""
    return (f"no gain: {gain['accuracy']:.1f} % of {gain['images']:,} {WORDS[stop.on]} are named right, "
            f"{gain['mean']:+.1f} points [{gain['low']:+.1f}, {gain['high']:+.1f}] against round {gain['against']}, "
            f"below min_gain {stop.min_gain:g} for {gain['below']} round{'s' if gain['below'] > 1 else ''}")


WORDS = {"folds": "seeds", "in_sample": "seeds, in sample,", "validation": "validation images"}
