"""What a loop costs before it starts, and what would keep it from starting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayexpand import api
from rayexpand.runs.run import open_run
from rayexpand.studies.rounds.plan import plan_loop
from tests.studies.rounds.conftest import finished
from tests.studies.rounds.test_learning import SCORES, digits_loop

RAW: dict[str, Any] = {
    "run": {"name": "x", "data": {"source": "digits", "per_class": 2},
            "method": {"name": "practice", "ratio": 9, "omega": 4.0}, "estimate": {"images_per_second": 2.0}},
    "rounds": {"count": 3, "rule": "loss", "guided_from": 2, "shares": [1, 2, 2, 1],
               "scores": {"folds": 2, "recipe": {"updates": 10, "batch": 8}}}}


def test_the_plan_of_a_loop_says_what_each_round_makes_and_takes(tmp_path: Path) -> None:
    found = api.plan(RAW, set={"run.out": str(tmp_path)}, machine={"estimate": {"gpu_hour_usd": 3, "gpus": 2}})
    stages = found.to_dict()["stages"]
    assert [one["name"] for one in stages] == [
        "expand round 1", "score seeds for round 2", "guide of round 2", "expand round 2, guided",
        "score seeds for round 3", "guide of round 3", "expand round 3, guided"]
    assert found.to_dict()["rounds"] == [30, 60, 60]
    assert found.plan.unspent == 30
    assert [stages[i]["gpu_hours"] for i in (0, 3)] == [pytest.approx([one / 2 / 3600] * 2) for one in (30, 60)]
    assert "2 trainings of 10 steps" in found.table()[1][1][1]
    assert found.below()[0] == ("loop: 180 samples of 20 seeds in 3 rounds of 30, 60, 60; guided from round 2; 30 are "
                                "left unspent")


def test_what_is_there_is_not_planned_again(tmp_path: Path) -> None:
    config = digits_loop(tmp_path, rounds={"count": 2, "rule": "loss", "scores": SCORES})
    before = {one.stage.name: one.stage.what for one in plan_loop(config).costs.stages}
    assert before["expand round 2"] == "60 images"
    loop, _ = finished(config)
    second = open_run(f"{config.folder}/rounds/0002")
    loop.files.delete("rounds/0002/data/train-000001.parquet")
    after = {one.stage.name: one.stage for one in plan_loop(config).costs.stages}
    assert [after[name].what for name in ("expand round 1", "expand round 2")] == [
        "0 images", f"{second.plan.shard_rows(1)} images"]
    assert after["score seeds for round 2"].what.endswith("done")
    assert after["expand round 2"].hours is not None, "at the rate of what is there"


def test_without_its_data_a_loop_is_planned_by_what_is_told() -> None:
    raw = {**RAW, "run": {**RAW["run"], "data": {"source": "imagefolder", "path": "/nowhere"},
                          "estimate": {"seeds": 1_281_167, "classes": 1000}}}
    assert sum(api.plan(raw).plan.rounds) == pytest.approx(1_281_167 * 9 * 5 / 6, abs=1)


@pytest.mark.parametrize(("rounds", "says"), [
    ({"cap": 5}, "rounds.cap: 20 seeds with at most 5 samples each leave no room for 180"),
    ({"count": 200, "shares": None}, "rounds.count: round 181 would have no sample"),
    ({"rule": "uniform", "scores": {}, "guide": {"updates": 5}, "stop": {"on": "validation"},
      "validation": {"source": "digits", "per_class": 4}}, "rounds.validation: 20 of its images are those of")])
def test_validate_says_what_cannot_be_dealt_or_compared(rounds: dict[str, Any], says: str) -> None:
    found = api.validate({**RAW, "rounds": {**RAW["rounds"], **rounds}})
    assert any(says in one for one in found.problems), found.problems


def test_validate_says_how_a_sound_loop_is_sampled() -> None:
    found = api.validate(RAW)
    assert (found.kind, found.problems) == ("loop", [])
    assert found.dataset is not None
    assert any("30 of 30 steps" in one for one in found.notes), found.notes
