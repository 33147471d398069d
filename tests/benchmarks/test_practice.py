"""Whether entropy guidance teaches more than as many samples without it, on the embedded default."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.practice import RANDOM, RENEWED, SUBSETS, UNGUIDED, compare, difference, lines


@pytest.mark.study
@pytest.mark.timeout(3600)  # six minutes of CPU
def test_a_guide_renewed_between_rounds_teaches_more_than_as_many_unguided_samples(tmp_path: Path) -> None:
    """Seen before, in points over ten subsets each: +1.4 +- 0.4 over unguided samples, as much over random ones."""
    right = compare(range(SUBSETS), tmp_path)
    print("\n".join(lines(right)))
    for other in (UNGUIDED, RANDOM):
        assert (right[RENEWED].mean(1) - right[other].mean(1)).mean() > 0


def test_a_difference_is_paired_and_has_its_intervals() -> None:
    """Two of three subsets are better by one of four images, one is equal."""
    other = np.zeros((3, 4), bool)
    other[:, 0] = True
    better = other.copy()
    better[:2, 1] = True
    said = difference({"a": better, "b": other}, "a", "b")
    assert said.startswith("+16.7 +- 8.3 [")
    assert said.endswith("], better in 2 of 3, worse in 0")
