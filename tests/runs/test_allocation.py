"""Copies dealt by weights. The integers are those of the specification, computed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import rayexpand
from rayexpand import methods
from rayexpand.contract.errors import ConfigError, DigestMismatch, UsageError
from rayexpand.contract.rng import PlanRng
from rayexpand.contract.schema import SeedIndex
from rayexpand.methods._copies import MAX_COPIES
from rayexpand.runs import run as runs
from rayexpand.runs.allocation import Allocate, allocated, deal, weights_of
from rayexpand.runs.plan import make_plan, plan_digest, read_plan, write_plan
from rayexpand.runs.status import read_status
from rayexpand.runs.verify import verify
from rayexpand.storage.files import LocalFiles
from rayexpand.storage.tables import sealed
from tests.conftest import MakeConfig, complete, hashes
from tests.runs.test_plan import index_of

LOG = (2.302585, 0.105361, 0.693147)


@pytest.mark.parametrize(("weight", "total", "key", "floor", "cap", "wanted"), [
    ((5, 3, 2), 7, (0, 0, 0), None, None, (4, 2, 1)),
    ((1, 1, 1, 1), 10, (.4, .1, .3, .2), None, None, (2, 3, 2, 3)),
    ((5, 3, 2), 10, (0, 0, 0), (1, 1, 1), None, (5, 3, 2)),
    ((5, 3, 2), 10, (0, 0, 0), None, (3, 9, 9), (3, 4, 3)),
    ((0, 0, 0), 4, (.3, .2, .1), None, None, (1, 1, 2)),
    ((1e-9, 1, 1), 5, (.1, .2, .3), None, None, (0, 3, 2)),
    (LOG, 100, (0, 0, 0), (5, 5, 5), None, (68, 8, 24)),
    ((1, 1), 1, (.5, .5), None, None, (1, 0)),  # equal keys: the earlier seed
    ((1, 0, 0), 5, (0, .2, .1), None, (2, 9, 9), (2, 1, 2)),  # weight 0 gets what nobody else has room for
    ((1, 2), 0, (0, 0), None, None, (0, 0)),
])
def test_dealing_gives_exact_numbers(weight: tuple, total: int, key: tuple, floor: tuple | None, cap: tuple | None,
                                     wanted: tuple) -> None:
    limits = (None if one is None else np.array(one) for one in (floor, cap))
    assert tuple(deal(np.array(weight, float), total, np.array(key, float), *limits)) == wanted


@pytest.mark.parametrize("case", range(60))
def test_dealing_keeps_sum_floor_and_cap_and_does_not_see_order_or_scale(case: int) -> None:
    rng = np.random.Generator(np.random.Philox(key=case))
    n = int(rng.integers(1, 40))
    weight, key = rng.choice([0.0, 0.5, 1.0, 3.0, 7.0], n) * rng.random(n).round(1), rng.random(n)
    floor = rng.integers(0, 3, n)
    cap = floor + rng.integers(0, 30, n)
    total = int(rng.integers(floor.sum(), cap.sum() + 1))
    found, order = deal(weight, total, key, floor, cap), rng.permutation(n)

    assert found.sum() == total
    assert ((floor <= found) & (found <= cap)).all()
    assert (deal(weight[order], total, key[order], floor[order], cap[order]) == found[order]).all()
    assert (deal(2 * weight, total, key, floor, cap) == found).all()
    with pytest.raises(UsageError, match="leave room"):
        deal(weight, int(cap.sum()) + 1, key, floor, cap)


@pytest.mark.parametrize("case", range(100))
def test_equal_weights_give_back_what_was_planned(case: int) -> None:
    rng = np.random.Generator(np.random.Philox(key=1000 + case))
    base = rng.integers(0, rng.choice([3, 7, 1000, MAX_COPIES]), int(rng.integers(1, 300)), dtype=np.int64)
    assert (deal(base.astype(float), int(base.sum()), rng.random(len(base))) == base).all()


def plan_of(allocate: dict[str, Any], index: SeedIndex, base: list[int]) -> list[int]:
    """Copies of each seed."""
    section, rng, base_N = Allocate(**allocate), PlanRng(3, "m"), np.array(base, np.uint16)
    return allocated(section, index, base_N, weights_of(section, index, base_N, rng), rng).tolist()


Scores = Callable[[Mapping[str, Any]], str]


@pytest.fixture
def scores(tmp_path: Path) -> Scores:
    def write(columns: Mapping[str, Any]) -> str:
        count = len(next(iter(columns.values())))
        table = pa.table({"seed_id": [f"s{i}" for i in range(count)], **columns})
        pq.write_table(table, tmp_path / "scores.parquet")
        return str(tmp_path)

    return write


def test_rule_class_deals_by_the_smoothed_error_of_classes(scores: Scores) -> None:
    n, wrong = np.array((10, 10, 4, 2)), (1, 5, 4, 2)
    labels = np.repeat(np.arange(4), n)
    margin = [-0.5 if i < w else 0.5 for count, w in zip(n, wrong, strict=True) for i in range(count)]
    index, rng = index_of(labels.tolist(), 4), PlanRng(3, "m")
    section, base = Allocate(rule="class", scores=scores({"margin": margin}), floor=0.25), np.full(26, 2, np.uint16)
    weight = weights_of(section, index, base, rng)
    error = np.array([1 / 6, 1 / 2, 5 / 6, 3 / 4])
    np.testing.assert_allclose(weight, (error / n)[labels])

    class_of_60 = np.array([3, 3, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3], np.uint16)
    assert class_of_60.sum() == 62
    class_of_60[:2] -= 1
    copies = allocated(section, index, class_of_60, weights_of(section, index, class_of_60, rng), rng)
    assert np.bincount(labels, copies).tolist() == [6, 14, 21, 19]
    assert np.ptp(copies[-2:]) <= 1


@pytest.mark.parametrize(("rule", "columns", "wanted"), [
    ("loss", {"p_label": [0.1, 0.9, 0.5, 0.5]}, [12, 0, 4, 4]),  # -ln: 2.303, 0.105, 0.693, 0.693
    ("confidence", {"p_label": [0.0, 1.0, 0.5, 0.5]}, [10, 0, 5, 5]),
    ("entropy", {"entropy": [0.0, 1.0, 2.0, 2.0]}, [0, 4, 8, 8]),
    ("weight", {"weight": [1.0, 1.0, 0.0, 2.0]}, [5, 5, 0, 10]),
    ("loss", {"p_label": [1.0, 1.0, 1.0, 1.0]}, [5, 5, 5, 5]),  # no loss anywhere
])
def test_rules_of_scores(scores: Scores, rule: str, columns: dict[str, Any], wanted: list[int]) -> None:
    index = index_of([0, 0, 1, 1], 2)
    found = plan_of({"rule": rule, "scores": scores(columns)}, index, [5] * 4)
    assert sorted(found) == sorted(wanted)
    assert [found[i] for i in (0, 1)] == wanted[:2]


def test_a_share_is_taken_in_each_class_or_in_all(scores: Scores) -> None:
    index = index_of([0, 0, 0, 0, 1, 1, 1, 1], 2)
    at = scores({"margin": [-.4, -.3, -.2, -.1, .1, .2, .3, .4], "speed": [0, 0, 0, 0, 1, 1, 1, 1],
                 "p_label": [.4, .3, .2, .1, .9, .8, .7, .6]})
    rule = {"scores": at, "share": 0.5}
    assert plan_of({"rule": "margin", **rule}, index, [2] * 8) == [4, 4, 0, 0, 4, 4, 0, 0]
    assert plan_of({"rule": "margin", "per": "all", **rule}, index, [2] * 8) == [4, 4, 4, 4, 0, 0, 0, 0]
    assert plan_of({"rule": "slow", **rule}, index, [2] * 8) == [0, 0, 4, 4, 0, 0, 4, 4], "ties by loss"
    assert plan_of({"rule": "slow", "total": "scaled", **rule}, index, [2] * 8) == [0, 0, 2, 2, 0, 0, 2, 2]
    assert plan_of({"rule": "margin", "scores": at, "share": 0.01}, index, [2] * 8) == [8, 0, 0, 0, 8, 0, 0, 0]
    mixed = plan_of({"rule": "margin", "permuted": True, **rule}, index, [2] * 8)
    assert sorted(mixed[:4]) == sorted(mixed[4:]) == [0, 0, 4, 4]
    assert mixed != [4, 4, 0, 0, 4, 4, 0, 0]


def test_permuted_weights_of_classes_reach_single_seeds(scores: Scores) -> None:
    at = scores({"margin": [-.5] * 4 + [.5] * 4})
    index, rule = index_of([0] * 4 + [1] * 4, 2), {"rule": "class", "scores": at}
    assert plan_of(rule, index, [6] * 8) == [10] * 4 + [2] * 4
    mixed = plan_of({**rule, "permuted": True, "per": "all"}, index, [6] * 8)
    assert sorted(mixed) == [2] * 4 + [10] * 4
    assert mixed != [10] * 4 + [2] * 4


def test_a_faulty_seed_gets_nothing_from_floor_cap_or_permutation(scores: Scores) -> None:
    index = index_of([0, 0, 0, 1], 2)
    index = SeedIndex(index.table.set_column(6, "fault", pa.array(["", "", "", "missing"])), index.classes)
    for columns in ({"weight": [1.0, 2.0, 3.0]}, {"weight": [0.0] * 3}):
        for more in ({}, {"floor": 0.5}, {"cap": 4}, {"permuted": True, "per": "all"}):
            found = plan_of({"rule": "weight", "scores": scores(columns), **more}, index, [3] * 4)
            assert (found[3], sum(found)) == (0, 12)
    mixed = plan_of({"rule": "weight", "scores": scores({"weight": [1.0, 2.0, 3.0]}), "permuted": True, "per": "all"},
                    index, [3] * 4)
    assert sorted(mixed) == [0, 2, 4, 6]


def test_ids_of_digits_alone_are_text_in_a_csv_file(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("seed_id,weight\n007,1\n008,3\n")
    index = index_of([0, 0], 1)
    index = SeedIndex(index.table.set_column(0, "seed_id", pa.array(["007", "008"])), index.classes)
    assert plan_of({"rule": "weight", "scores": str(tmp_path / "s.csv")}, index, [4, 4]) == [2, 6]


def test_equal_gives_each_class_the_same_whatever_its_size() -> None:
    copies = plan_of({"rule": "equal"}, index_of([0] * 8 + [1] * 2, 2), [2] * 10)
    assert (sum(copies[:8]), sum(copies[8:])) == (10, 10)
    assert plan_of({"rule": "equal", "cap": 3}, index_of([0] * 8 + [1] * 2, 2), [2] * 10)[8:] == [3, 3]
    floored = plan_of({"rule": "uniform", "floor": 0.5}, index_of([0] * 8 + [1] * 2, 2), [2] * 10)
    assert sum(floored[8:]) == 5 + 2, "half of 20 evenly over classes, the rest by seeds"
    assert plan_of({"rule": "uniform", "floor": 1, "cap": 3}, index_of([0] * 8 + [1] * 2, 2), [2] * 10)[8:] == [3, 3]


def test_a_class_of_one_seed_gets_the_mean_and_a_faulty_seed_nothing(scores: Scores) -> None:
    index = index_of([0, 0, 1, 0], 2)
    fault = pa.array(["", "", "", "missing"])
    index = SeedIndex(index.table.set_column(6, "fault", fault), index.classes)
    assert plan_of({"rule": "weight", "scores": scores({"weight": [1.0, 3.0]})}, index, [2] * 4) == [1, 4, 3, 0]
    assert plan_of({"rule": "class", "scores": scores({"margin": [0.5, -0.5]})}, index_of([0, 0, 1], 2),
                   [2] * 3) in ([2, 1, 3], [1, 2, 3])


def test_a_seed_without_copies_stays_without(scores: Scores) -> None:
    at = scores({"weight": [9.0, 1.0, 1.0]})
    assert plan_of({"rule": "weight", "scores": at}, index_of([0, 0, 1], 2), [0, 3, 3]) == [0, 3, 3]


@pytest.mark.parametrize("name", methods.names())
def test_uniform_weights_give_every_method_its_own_copies(name: str) -> None:
    fields = {"lecf": {"prompts": {"*": ["a {name}"]}}, "vae": {"sample": True, "ratio": 3},
              "diffmix": {"prompt": "a {name}"}, "dafusion": {"prompt": "a {name}"}}.get(name, {})
    method, index = methods.load_method(name, fields), index_of([0, 1, 2, 0, 1, 0, 2] * 5)
    rng = PlanRng(5, name)
    base = method.copies(index, rng)
    section = Allocate(rule="uniform")
    assert (allocated(section, index, base, weights_of(section, index, base, rng), rng) == base).all()


@pytest.mark.parametrize(("name", "fields"), [("vae", {"sample": False, "ratio": 1}), ("diffmix", {"targets": "fill"})])
def test_methods_that_deal_already_refuse(make_config: MakeConfig, name: str, fields: dict[str, Any]) -> None:
    config = make_config(name, **fields, sections={"allocate": {"rule": "equal"}})
    assert any(f"allocate: {name} " in problem for problem in runs.preflight(config, with_classes=False))


@pytest.mark.parametrize(("section", "words"), [
    ({"rule": "loss"}, "scores: is missing; rule loss reads p_label"),
    ({"rule": "equal", "scores": "x"}, "scores: has no effect"),
    ({"rule": "uniform", "share": 0.5}, "share: has no effect"),
    ({"rule": "loss", "scores": "x", "total": "scaled"}, "total: has no effect"),
    ({"rule": "uniform", "permuted": True}, "permuted: has no effect"),
    ({"rule": "slow", "scores": "x"}, "share: is missing"),
    ({"rule": "class", "scores": "x", "permuted": True}, "weighs all seeds of a class alike; set per: all"),
    ({"rule": "loss", "scores": "x", "per": "all"}, "per: has no effect"),
    ({"rule": "lost"}, "rule"), ({"rule": "uniform", "cap": 0}, "cap")])
def test_sections_that_say_nothing_are_refused(make_config: MakeConfig, section: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match="allocate") as raised:
        make_config(sections={"allocate": section})
    assert words in str(raised.value)


@pytest.mark.parametrize(("columns", "words"), [
    ({"p_label": [0.5, float("nan"), 2.0]}, "p_label of 2 seeds is no number from 0 to 1 ('s1', 's2')"),
    ({"other": [1.0]}, "has no column p_label"),
    ({"p_label": ["many"]}, "has a column of another kind")])
def test_scores_that_cannot_be_dealt_by_are_refused_before_the_seeds_are_listed(
        make_config: MakeConfig, scores: Scores, columns: dict[str, Any], words: str) -> None:
    config = make_config(sections={"allocate": {"rule": "loss", "scores": scores(columns)}})
    (problem,) = runs.preflight(config, with_classes=False)
    assert words in problem


def test_weights_whose_sum_would_be_no_number_are_refused(scores: Scores) -> None:
    with pytest.raises(UsageError, match=r"weight of 1 seeds is no number from 0 to 1e\+100"):
        plan_of({"rule": "weight", "scores": scores({"weight": [1e308, 1.0]})}, index_of([0, 0]), [9, 9])


def test_every_mistake_of_scores_is_told_at_once(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("seed_id,speed,p_label\na,2,-1\na,0,0\n")
    config = make_config(sections={"allocate": {"rule": "slow", "share": 0.5, "scores": str(tmp_path / "s.csv")}})
    told = " ".join(runs.preflight(config, with_classes=False))
    assert all(words in told for words in ("seeds are there twice ('a')", "speed of 1 seeds", "p_label of 1 seeds"))
    gone = make_config(sections={"allocate": {"rule": "loss", "scores": str(tmp_path / "gone")}})
    assert "allocate.scores" in " ".join(runs.preflight(gone, with_classes=False))


def test_seeds_without_scores_are_named(make_config: MakeConfig, scores: Scores) -> None:
    config = make_config(sections={"allocate": {"rule": "loss", "scores": scores({"p_label": [0.5]})}})
    with pytest.raises(UsageError, match=r"says nothing of 2 of 3 seeds \('s1', 's2'\)"):
        make_plan(index_of([0, 0, 0], 1), config)


# A run that is dealt ------------------------------------------------------------------------------------------------


@pytest.fixture
def dealt(make_config: MakeConfig, tmp_path: Path) -> Any:
    """A run whose ants get most, and its scores."""
    seeds = [f"{name}/{i}.png" for name in ("ant", "bee", "cat", "dog") for i in range(5)]
    lines = [f"{seed},{5 if seed.startswith('ant') else 1}" for seed in seeds]
    (tmp_path / "s.csv").write_text("\n".join(["seed_id,weight", *lines]))
    config = make_config(ratio=2, sections={"allocate": {"rule": "weight", "scores": str(tmp_path / "s.csv")}})
    run, _ = complete(config)
    return run, tmp_path / "s.csv"


def test_a_dealt_run_is_whole_and_says_how_it_was_dealt(dealt: Any) -> None:
    run, _ = dealt
    assert run.plan.planned == len(hashes(run)) == 40
    assert np.bincount(run.plan.index.labels, run.plan.copies).tolist() == [25, 5, 5, 5]
    assert verify(run, pixels=True).problems == []
    words = "by rule weight: 1 to 5 copies of a seed; 5 to 25 of a class"
    assert dict(read_status(run.folder).table())["dealt"] == words


def test_plan_validate_page_and_card_say_how_it_was_dealt(dealt: Any) -> None:
    run, _ = dealt
    words = "by rule weight: 1 to 5 copies of a seed; 5 to 25 of a class"
    assert f"dealt {words}" in rayexpand.plan(run.config).estimate.notes["images"]
    assert any(words in note for note in rayexpand.validate(run.config).notes)
    folder = rayexpand.open(str(run.folder))
    assert words in Path(folder.report()).read_text()
    assert words in Path(folder.card()).read_text()


def test_a_dealt_run_goes_on_without_its_scores_and_refuses_others(dealt: Any) -> None:
    run, scores = dealt
    moved = scores.rename(scores.with_name("moved.csv"))
    assert runs.prepare(run.config).plan.planned == 40
    scores.write_text(moved.read_text().replace("ant/0.png,5", "ant/0.png,4"))
    with pytest.raises(DigestMismatch, match=r"allocate\.scores"):
        runs.prepare(run.config)


def test_verify_repeats_the_dealing(dealt: Any) -> None:
    run, _ = dealt
    folder, facts = Path(run.folder), run.facts
    copies = run.plan.copies.copy()
    copies[[0, 5]] += np.array([1, -1], np.int8).astype(np.uint16)  # as many in all
    from dataclasses import replace

    edited = replace(run.plan, copies=copies, grown=None)
    write_plan(edited, LocalFiles(folder), facts["plan"])
    text = verify(runs.open_run(str(folder))).problems[0]
    assert "is not the plan that run.json names" in text
    # the digests made to agree, too: only the dealing itself can tell
    lie = {**facts, "plan_digest": plan_digest(edited)}
    lie["run_digest"] = runs.digest({"plan": lie["plan_digest"], "config": runs.semantic(run.config),
                                     "models": facts["models"]})
    (folder / "run.json").write_bytes(sealed("run.json", lie))
    told = verify(runs.open_run(str(folder))).problems
    assert "the copies of 2 seeds are not those that their weights give (ant/0.png: 6 instead of 5)" in told[0]


def test_weights_and_first_are_in_the_plan_only_where_they_are_used(make_config: MakeConfig, tmp_path: Path) -> None:
    index, files = index_of([0, 1, 2] * 2), LocalFiles(tmp_path)
    files.probe()
    plain, config = make_plan(index, make_config(ratio=2)), make_config(ratio=2)
    shifted = make_plan(index, config, np.array([0, 1, 2, 3, 4, 5], np.uint16))
    assert plan_digest(make_plan(index, config, np.zeros(6, np.uint16))) == plan_digest(plain)
    assert plan_digest(shifted) != plan_digest(plain)
    for name, plan in (("plan/plain", plain), ("plan/shifted", shifted)):
        write_plan(plan, files, name)
        again = read_plan(config, files, name, plan_digest(plan))
        assert again is not None
        assert again.units(0) == plan.units(0)
        assert plan_digest(again) == plan_digest(plan)
    assert "first" not in pq.read_schema(tmp_path / "plan/plain/seeds.parquet").names
    assert "first" in pq.read_schema(tmp_path / "plan/shifted/seeds.parquet").names
    assert json.loads((tmp_path / "plan/plain/plan.json").read_text())["planned"] == 12


def test_three_uneven_rounds_are_one_run(make_config: MakeConfig) -> None:
    """Copies that begin where those of the rounds before end: the same samples, apart from the number of the row."""
    index = index_of([0, 1, 2, 1] * 2)
    whole = {draw.sample_id: draw for draw in make_plan(index, make_config(ratio=6)).draws_of(3)}
    first, found = np.zeros(8, np.uint16), {}
    for ratio in (1, 3, 2):
        plan = make_plan(index, make_config(ratio=ratio), first)
        found |= {draw.sample_id: draw for draw in plan.draws_of(3)}
        assert all(plan.find(draw.sample_id) == plan.shard[3] for draw in plan.draws_of(3))
        assert plan.first_copies(2).tolist() == [min(max(2 - int(first[0]), 0), ratio)] * 8
        first = (first + plan.copies).astype(np.uint16)
    assert found.keys() == whole.keys()
    assert {name: (draw.copy, draw.prompt, draw.label if hasattr(draw, "label") else draw.target_label)
            for name, draw in found.items()} == {name: (draw.copy, draw.prompt, draw.target_label)
                                                 for name, draw in whole.items()}
    with pytest.raises(UsageError, match="at most 65535"):
        make_plan(index, make_config(ratio=2), np.full(8, MAX_COPIES - 1, np.uint16))
