"""What a study will cost, against what it then makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayexpand import api
from rayexpand.contract.errors import ConfigError
from rayexpand.runs.fleet_hours import PROCESS
from rayexpand.storage.tables import replace_json
from rayexpand.studies.config import parse_study
from rayexpand.studies.plan import StudyPlan, listed_for, plan_study
from rayexpand.studies.trainings import results_of, trainings_of
from rayexpand.studies.trial import open_work, run_trials
from rayexpand.studies.trials import arms_of, make_trials
from tests.studies.test_study import expanded, raw_study


def plan(raw: dict[str, Any]) -> StudyPlan:
    return plan_study(parse_study(raw))


def stage(found: StudyPlan, name: str) -> dict[str, Any]:
    return next(one for one in found.to_json()["stages"] if one["name"] == name)


def test_the_plan_is_what_is_then_trained(tmp_path: Path) -> None:
    """Names, rows, steps and controls of every trial, before anything is there and after."""
    raw = raw_study(tmp_path, recipe={"epochs": 3, "updates": None, "batch": 8, "backbone_args": {"width": 4}})
    raw["arms"] += [{"name": "half", "use": "flips", "real": 0.5, "weight": 2, "recipe": {"lr": 0.02}},
                    {"name": "in place", "use": "flips", "replace": 0.3}, {"name": "twice", "real": 2}]
    config = parse_study(raw)
    listed = listed_for(config)
    said = trainings_of(config, arms_of(config), listed.sizes.images, {"flips": 3.0}, [])
    assert not isinstance(said, str)
    assert not any(tmp_path.iterdir())

    study = expanded(raw)
    trials = make_trials(study)
    made = sorted((one.arm if not one.control_of else one.control_of, bool(one.control_of), work.feed.total_steps,
                   work.feed.batch) for one in trials if one.seed == 0
                  for work in [open_work(study.files, one, config.training)])
    assert sorted((one.arm, one.is_control, one.steps, one.batch) for one in said) == made
    found = plan(raw)
    assert found.trainings + found.controls == len(trials)
    assert stage(found, "train")["what"].startswith(f"{len(trials)} trainings")


def test_what_is_there_is_not_counted_again(tmp_path: Path) -> None:
    raw = raw_study(tmp_path)
    before = plan(raw)
    study = expanded(raw)
    trials = make_trials(study)
    done = [one for one in trials if one.seed == 0]
    assert not [problem for _, problem in run_trials(study.files, done, study.config.training) if problem]
    after = plan(raw)

    assert (before.done, after.done) == (0, len(done))
    assert stage(before, "expand flips")["what"] == "120 images in 2 runs"
    assert stage(after, "expand flips")["what"] == "120 images are there"
    assert stage(after, "expand flips")["bytes"] == 0
    left = stage(after, "train")
    assert left["what"].startswith(f"{len(trials) - len(done)} trainings")
    assert left["source"].startswith("measured by 1 finished trainings")
    seconds = sum(one["seconds"] for one in results_of(study.files))
    assert left["gpu_hours"] == [pytest.approx(seconds / 3600, rel=0.3)] * 2
    assert left["unit"] == PROCESS
    changed = plan({**raw, "recipe": {**raw["recipe"], "lr": 0.5}})
    assert changed.done == 0, "another recipe is another training"


def test_what_bench_measured_is_an_interval(tmp_path: Path) -> None:
    raw = raw_study(tmp_path)
    study = expanded(raw)
    replace_json(study.files, "bench-4.json", {"device": "cpu", "arms": [
        {"arm": "original", "batch": 4, "loader_seconds": 2.0, "step_seconds": 7.0}]})
    raw["recipe"] = {**raw["recipe"], "batch": 4, "updates": 100}
    found = stage(plan(raw), "train")

    assert found["gpu_hours"] == pytest.approx([10 * 100 * 7 / 3600, 10 * 100 * 9 / 3600])
    assert "`rayexpand bench`" in found["source"]


def test_sizes_that_are_told_need_no_data(tmp_path: Path) -> None:
    """As ImageNet: two per class of a thousand, each expanded and fine-tuned for."""
    data = {"source": "imagefolder", "path": str(tmp_path / "none")}
    raw = raw_study(tmp_path, data=data, test=data, recipe={"preset": "realfake/in1k"}, estimate={
        "seeds": 1_000_000, "classes": 1000, "tests": 50_000, "gpus": 8, "gpu_hour_usd": 2})
    raw["expansions"] = {"flips": {
        "method": {"name": "img2img", "ratio": 3, "prompt": "a {name}"}, "image": {"size": 512},
        "prior": {"weights": "stable-diffusion-v1-5/stable-diffusion-v1-5@main", "dtype": "bfloat16"},
        "fit": {"adapter": {"recipe": {"preset": "realfake", "prompt": "a {name}", "visual_token": "none"}}}}}
    found = plan(raw)

    assert stage(found, "expand flips")["what"] == "12,000 images in 2 runs"
    assert stage(found, "fit adapter of flips")["times"] == 2
    assert found.costs.unknown == []
    low, high = found.costs.total("cost_usd") or (0, 0)
    assert 0 < low < high
    assert all("estimate." in one["source"] for one in found.to_json()["stages"])


def test_everything_that_is_not_known_is_said_at_once(tmp_path: Path) -> None:
    data = {"source": "imagefolder", "path": str(tmp_path / "none")}
    with pytest.raises(ConfigError) as caught:
        plan(raw_study(tmp_path, data=data, test=data))
    assert [line.partition(":")[0].partition(".")[0] for line in caught.value.problems] == ["data", "test"]
    assert all("estimate." in line for line in caught.value.problems)


def test_a_run_that_is_not_there_is_named(tmp_path: Path) -> None:
    raw = raw_study(tmp_path, expansions={"flips": {"run": str(tmp_path / "later")}})
    raw["arms"][1]["ratio"] = 2
    found = plan(raw)
    assert found.costs.unknown[0] == "expand flips"
    assert "is not there yet" in stage(found, "expand flips")["source"]
    del raw["arms"][1]["ratio"]
    assert "give its arms a ratio" in stage(plan(raw), "train")["source"]


def test_the_verb_shows_stages_and_prices(tmp_path: Path) -> None:
    method = {"name": "classical", "policy": "randaugment", "ratio": 3}
    raw = raw_study(tmp_path, expansions={"flips": {"method": method, "estimate": {"images_per_second": 10}}})
    found = api.plan(raw, machine={"estimate": {"cpu_hour_usd": 0.5, "gpus": 2}})
    lines = {row[0]: row for row in found.table()[1]}

    assert lines["expand flips"][2] == "0.00333 CPU process h"
    assert lines["expand flips"][6] == "given by estimate.images_per_second"
    assert lines["train"][2] == "unknown"
    assert "without train: hours unknown" in lines["in all"][6]
    assert "trainings: 6, and 4 of controls" in found.below()
