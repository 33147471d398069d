"""When a loop ends early, on made-up answers whose intervals are computed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rayexpand.studies.rounds.config import StopConfig
from rayexpand.studies.rounds.stop import gain_of, stops


def answers(*right: int, images: int = 100) -> list[np.ndarray]:
    """After each round the first so many of the images are named right."""
    return [np.arange(images) < one for one in right]


def after(stop: StopConfig, *right: int) -> list[dict[str, Any]]:
    """What each round brought, one after the other."""
    found: list[dict[str, Any]] = []
    for number in range(1, len(right) + 1):
        found.append(gain_of(stop, answers(*right[:number]), found[-1] if found else {}))
    return found


def test_the_interval_is_that_of_a_paired_difference() -> None:
    """60 then 68 of 100 right, nested: the difference is 1 on 8 images and 0 on 92. Mean 8 points, variance of an image
    0.08 * 0.92 * 100/99, standard error 2.7266 points, Student's t with 99 degrees of freedom 1.98422."""
    found = after(StopConfig(), 60, 68)[1]
    reach = 1.98422 * 2.7266
    assert found == {"on": "folds", "images": 100, "accuracy": 68.0, "against": 1, "mean": 8.0, "below": 0,
                     "low": pytest.approx(8 - reach, abs=1e-3), "high": pytest.approx(8 + reach, abs=1e-3)}


def test_pairs_count_and_not_only_means() -> None:
    """As many right, but other ones: the interval is wide, and no loop ends by it."""
    swapped = [np.arange(100) < 50, np.arange(100) >= 50]
    found = gain_of(StopConfig(min_gain=0.5), swapped, {})
    assert (found["mean"], found["below"]) == (0.0, 0)
    assert found["high"] == pytest.approx(1.98422 * 100 * np.sqrt(100 / 99) / 10, abs=1e-2)
    same = gain_of(StopConfig(min_gain=0.5), answers(50, 50), {})
    assert (same["low"], same["high"], same["below"]) == (0.0, 0.0, 1), "answers that never vary are certain"


def test_it_is_compared_with_the_best_earlier_round() -> None:
    found = after(StopConfig(), 50, 70, 60, 72)
    assert [one.get("against") for one in found] == [None, 1, 2, 2]
    assert [one.get("mean") for one in found] == [None, 20.0, -10.0, 2.0]


@pytest.mark.parametrize(("right", "patience", "wanted"), [
    ((50, 70, 90), 1, [0, 0, 0]),  # gains
    ((50, 70, 60), 1, [0, 0, 1]),  # a loss: high is about -4
    ((50, 70, 60, 60), 2, [0, 0, 1, 2]), ((50, 70, 60, 95), 2, [0, 0, 1, 0]),  # a gain in between begins again
    ((70, 70, 70), 1, [0, 1, 2])])
def test_rounds_without_a_gain_are_counted_one_after_the_other(right: tuple[int, ...], patience: int,
                                                               wanted: list[int]) -> None:
    stop = StopConfig(min_gain=0.5, patience=patience)
    found = after(stop, *right)
    assert [one["below"] for one in found] == wanted
    assert [bool(stops(stop, one)) for one in found] == [one >= patience for one in wanted]


def test_the_reason_says_what_was_seen() -> None:
    stop = StopConfig(on="validation", min_gain=1.0)
    assert stops(stop, after(stop, 70, 60)[1]) == (
        "no gain: 60.0 % of 100 validation images are named right, -10.0 points [-16.0, -4.0] against round 1, below "
        "min_gain 1 for 1 round")


def test_a_threshold_below_all_intervals_never_ends_a_loop() -> None:
    stop = StopConfig(min_gain=-100.0)
    assert [one["below"] for one in after(stop, 90, 10, 5, 0)] == [0, 0, 0, 0]
