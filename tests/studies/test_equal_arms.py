"""Ten studies of equal arms on digits: what they call a gain is wrong.

    python -m pytest -m study -s tests/studies/test_equal_arms.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from rayexpand import api

STUDIES, ARMS = 10, 6


@pytest.mark.study
@pytest.mark.timeout(7200)
def test_equal_arms_are_not_told_apart(tmp_path: Path) -> None:
    raw = wrong = 0
    for number in range(STUDIES):
        seeds = [3 * number + n for n in range(3)]
        found = api.train("jobs/digits/study-equal.yaml", set={"out": str(tmp_path / str(number)), "seeds": seeds})
        comparisons = found.summary()["comparisons"]
        alone, together = (min(p) for p in zip(*((one["p"], one["adjusted"]["p"]) for one in comparisons), strict=True))
        raw, wrong = raw + (alone < 0.05), wrong + (together < 0.05)
        print(f"seeds {seeds}: differences {[round(100 * one['mean'], 1) for one in comparisons]} points, smallest p "
              f"{alone:.3f} alone, {together:.3f} together")
        assert len(comparisons) == ARMS
    print(f"some p < 5 % in {raw} of {STUDIES} studies alone, in {wrong} together")
    assert wrong <= 2, "of ten, three and more have a probability of 1.2 % where one of twenty is wrong"
