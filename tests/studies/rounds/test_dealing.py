from __future__ import annotations

import numpy as np
import pytest

from rayexpand.contract.rng import PlanRng
from rayexpand.runs.allocation import allocated, weights_of
from rayexpand.studies.rounds.config import RoundsConfig
from rayexpand.studies.rounds.dealing import deal_round, parts_of, weigh
from tests.runs.test_plan import index_of


@pytest.mark.parametrize(("shares", "planned", "wanted"), [
    ([1, 1, 1], 10, [4, 3, 3]), ([1, 2, 4], 7, [1, 2, 4]), ([0.5, 0.3, 0.2], 200_000, [100_000, 60_000, 40_000]),
    ([2, 1], 1, [1, 0])])
def test_shares_become_whole_rows_by_largest_remainder(shares: list[float], planned: int, wanted: list[int]) -> None:
    assert parts_of(RoundsConfig(count=1, shares=shares), planned) == wanted


@pytest.mark.parametrize("rule", ["uniform", "equal"])
@pytest.mark.parametrize("case", range(40))
def test_rounds_without_scores_end_where_one_go_does(case: int, rule: str) -> None:
    rng = np.random.Generator(np.random.Philox(key=case))
    n = int(rng.integers(4, 60))
    index = index_of([*rng.integers(0, 4, n).tolist(), 0, 1, 2, 3], 4)
    base = rng.integers(0, rng.choice([2, 5, 90]), len(index)).astype(np.uint16)
    base[-4:] += 1
    rounds = RoundsConfig(count=3, shares=rng.random(3).tolist(), rule=rule, floor=float(rng.choice([0, 0.3])),
                          cap=int(rng.choice([300, 3 * base.max()])))
    keys, first = PlanRng(case, "m"), np.zeros(len(index), np.uint16)
    for rows in parts_of(rounds, int(base.sum())):
        weight = weigh(rounds, index, base, first, keys, None)
        copies = deal_round(rounds, index, base, first, weight, rows, keys, scored=False)
        assert copies.sum() == rows
        first = first + copies

    one_go = allocated(rounds.allocate, index, base, weights_of(rounds.allocate, index, base, keys), keys)
    assert first.tolist() == one_go.tolist()
