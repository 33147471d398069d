from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from rayexpand.contract.errors import UsageError
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


KEYS = PlanRng(3, "m")


def dealt(rounds: dict[str, object], scores: dict[str, list[float]], labels: list[int], *, first: list[int],
          rows: int) -> list[int]:
    """Copies in round 2 by scores written by hand; four copies of each seed are planned in all."""
    config, index = RoundsConfig(count=2, **rounds), index_of(labels, max(labels) + 1)
    table = pa.table({"seed_id": index.seed_ids[:len(next(iter(scores.values())))], **scores})
    base, had = np.full(len(index), 4, np.uint16), np.array(first, np.uint16)
    weight = weigh(config, index, base, had, KEYS, table)
    return deal_round(config, index, base, had, weight, rows, KEYS, scored=True).tolist()


def test_scores_written_by_hand_are_dealt_by_in_whole_numbers() -> None:
    loss = {"p_label": [0.1, 0.9, 0.5, 0.5]}  # 2.303, 0.105, 0.693, 0.693
    plain = {"labels": [0, 0, 1, 1], "first": [2] * 4, "rows": 8}
    found = dealt({"rule": "loss"}, loss, **plain)  # 4.86, 0.22, 1.46, 1.46: the last two tie, and one has 2
    assert (found[:2], sorted(found[2:])) == ([5, 0], [1, 2])
    assert dealt({"rule": "loss", "cap": 4}, loss, **plain) == [2, 2, 2, 2], "cap counts the copies of round 1 too"
    assert dealt({"rule": "loss", "floor": 0.5}, loss, **plain)[1] == 1, "two for each class, one for each seed, first"
    assert dealt({"rule": "loss"}, {"p_label": [1.0] * 4}, **plain) == [2, 2, 2, 2], "no loss anywhere"
    margin = {"margin": [-0.5, 0.5, 0.2, 0.4]}
    assert dealt({"rule": "margin", "share": 0.5}, margin, **plain) == [4, 0, 4, 0]
    assert dealt({"rule": "class"}, margin, **{**plain, "rows": 12}) == [4, 4, 2, 2], "e is 2/4 and 1/4"


def test_the_only_seed_of_a_class_is_dealt_to_by_the_mean() -> None:
    assert dealt({"rule": "confidence"}, {"p_label": [0.2, 0.4]}, [0, 0, 1], first=[2, 2, 2], rows=21) == [8, 6, 7]


@pytest.mark.parametrize("p_label", [float("nan"), float("inf"), -0.1])
def test_scores_that_are_no_numbers_are_refused(p_label: float) -> None:
    with pytest.raises(UsageError, match="p_label of 1 seeds is no number from 0 to 1"):
        dealt({"rule": "loss"}, {"p_label": [0.5, p_label]}, [0, 0], first=[2, 2], rows=4)
