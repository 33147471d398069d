"""jobs/digits/study-compose.yaml in miniature: what each part of the five papers does where all are together, and that
a study which is killed at every kind of place ends as if it had not been."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rayexpand.classifier.recipe import make_recipe
from rayexpand.contract.device import torch_threads
from rayexpand.contract.errors import RayexpandError
from rayexpand.loader.loader import Loader
from rayexpand.loader.training_set import TrainingSet
from rayexpand.runs import run as runs
from rayexpand.runs.accept import SCORE
from rayexpand.runs.driving import Here
from rayexpand.studies.config import parse_study
from rayexpand.studies.expansions import pending_runs
from rayexpand.studies.parts import Study, read_result
from rayexpand.studies.study import prepare_study
from rayexpand.studies.trial import run_trials
from rayexpand.studies.trials import make_trials, pending_trials
from tests.chaos.test_kill import exit_code, in_child
from tests.commands import ROOT
from tests.conftest import attempts, hashes, refused

PARTS = ("distdiff", "gif", "diffmix", "diffcoremix")
Change = Callable[[dict[str, Any]], None]


def small(out: Path, change: Change = lambda raw: None) -> dict[str, Any]:
    """The arm of the job with all five parts, on one copy of each of twenty digits, tuned for three steps."""
    raw = yaml.safe_load((ROOT / "jobs/digits/study-compose.yaml").read_text())
    raw |= {"name": "compose", "out": str(out), "seeds": [0], "test": {**raw["test"], "per_class": 3},
            "recipe": {"preset": "digits", "updates": 6, "epochs": 2, "batch": 8, "backbone_args": {"width": 4}},
            "expansions": {name: copy.deepcopy(raw["expansions"][name]) for name in PARTS},
            "arms": [{**copy.deepcopy(raw["arms"][1]), "control": False}]}
    for name, one in raw["expansions"].items():
        one["method"]["ratio"] = 2 if name == "gif" else 1
        one["fit"]["adapter"] |= {"tensorboard": False}
        one["fit"]["adapter"]["recipe"] |= {"steps": 3, "batch": 8}
        one["sampler"] = {"batch": 10, "shard_images": 10}
    change(raw)
    return raw


def expand(raw: Mapping[str, Any]) -> Study:
    study, drive = prepare_study(parse_study(raw)), Here()
    with torch_threads(1):
        for run in pending_runs(study):
            drive(run, lambda *said, **more: None)
    return study


def train(raw: Mapping[str, Any]) -> Study:
    study = expand(raw)
    with torch_threads(1):
        todo = pending_trials(study.trial_folder, make_trials(study))
        for trial, problem in run_trials(study.files, todo, study.config.training):
            assert not problem, f"{trial.name}: {problem}"
    return study


def made(study: Study) -> dict[str, runs.Run]:
    return {name: runs.open_run(f"{study.config.folder}/runs/{name}-0") for name in study.config.expansions}


def scores(run: runs.Run) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for receipt in run.store.receipts():
        for row in run.store.data(receipt, ["scores"]).to_pylist():
            for one in row["scores"] or ():
                found.setdefault(one["name"], []).append(one["value"])
    return found


def feed(study: Study) -> Loader:
    (trial,) = make_trials(study)
    rows = TrainingSet.load(Path(study.config.folder) / trial.rows)
    return Loader(rows, make_recipe(trial.recipe), 0)


def off_target(study: Study) -> float:
    """Share of the label mass of all rows that lies on another class than the row's own."""
    loader = feed(study)
    y_NK = loader.targets(np.arange(len(loader.rows)))
    return 1 - float(y_NK[np.arange(len(y_NK)), loader.rows.column("label")].mean())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return train(small(tmp_path_factory.mktemp("whole")))


def untuned(raw: dict[str, Any]) -> None:
    del raw["expansions"]["distdiff"]["fit"]["adapter"]


def unguided(raw: dict[str, Any]) -> None:
    raw["expansions"]["distdiff"]["method"] |= {"guidance": "random", "measure": True}


def unjudged(raw: dict[str, Any]) -> None:
    del raw["expansions"]["distdiff"]["accept"]


def hard(raw: dict[str, Any]) -> None:
    raw["arms"][0]["soft_label"] = {"gamma": 0}


def unmixed(raw: dict[str, Any]) -> None:
    del raw["arms"][0]["mix"]


@pytest.mark.study
def test_each_part_does_what_it_is_for(whole: Study) -> None:
    by_name = made(whole)
    adapters = {run.facts["models"]["adapter"] for run in by_name.values()}
    assert len(adapters) == 1, "one fine-tuning serves all"
    energies = scores(by_name["distdiff"])
    assert np.mean(energies["energy_after"]) < np.mean(energies["energy_random"])
    for name in ("distdiff", "diffmix", "diffcoremix"):
        assert set(attempts(by_name[name]).values()) > {0}, name
        assert len(scores(by_name[name])[SCORE]) == 20, "each row is kept, by its best try"
    assert set(attempts(by_name["gif"]).values()) == {0}
    assert len(hashes(by_name["gif"])) + len(refused(by_name["gif"])) == 40
    assert 0.02 < off_target(whole) < 0.3
    mixing = feed(whole).mixing()
    assert mixing is not None
    assert mixing["mixed"] == pytest.approx(5 / 6, abs=0.1), "all samples and no real row"
    assert 0.2 < mixing["real_pixels"] < 0.8
    (trial,) = make_trials(whole)
    result = read_result(whole.files, trial.name)
    assert result is not None
    assert (result["real_rows"], result["group"]) == (20, "distdiff + gif + diffmix + diffcoremix")


@pytest.mark.study
@pytest.mark.parametrize("change", [untuned, unguided, unjudged])
def test_without_a_part_of_its_expansion_samples_and_its_statistic_change(whole: Study, tmp_path: Path,
                                                                          change: Change) -> None:
    before = made(whole)
    after = made(expand(small(tmp_path, change)))
    assert {name for name in PARTS if hashes(after[name]) != hashes(before[name])} == {"distdiff"}
    one, other = before["distdiff"], after["distdiff"]
    same = {name for name, value in hashes(other).items() if hashes(one).get(name) == value}
    if change is unjudged:
        assert same == {name for name, attempt in attempts(one).items() if attempt == 0 and name in hashes(one)}
        assert SCORE not in scores(other)
        assert set(attempts(other).values()) == {0}
        return
    assert not same
    if change is untuned:
        assert ("adapter" in one.facts["models"], "adapter" in other.facts["models"]) == (True, False)
    else:
        assert "energy_before" not in scores(other)
        assert np.mean(scores(other)["energy_after"]) > np.mean(scores(one)["energy_after"])


@pytest.mark.study
@pytest.mark.parametrize("change", [hard, unmixed, *PARTS])
def test_without_a_part_of_its_arm_the_training_set_and_its_statistic_change(whole: Study, tmp_path: Path,
                                                                             change: Change | str) -> None:
    def without(raw: dict[str, Any]) -> None:
        if isinstance(change, str):
            raw["arms"][0]["use"].remove(change)
            if change == "diffmix":
                del raw["arms"][0]["soft_label"]
        else:
            change(raw)
        raw["expansions"] = {name: {"run": f"{whole.config.folder}/runs/{name}-0"} for name in raw["expansions"]}
        raw["resample"] = False

    study = prepare_study(parse_study(small(tmp_path, without)))
    (before,), (after,) = make_trials(whole), make_trials(study)
    assert before.digest != after.digest
    if change in (hard, "diffmix"):
        assert off_target(study) == 0 < off_target(whole)
    else:
        assert off_target(study) > 0
    assert (feed(study).mixing() is None) is (change is unmixed)
    lost = 0 if callable(change) else len(hashes(made(whole)[change]))
    assert len(feed(study).rows) == len(feed(whole).rows) - lost


def _train(raw: Mapping[str, Any]) -> None:
    try:
        train(raw)
    except RayexpandError as error:
        os._exit(error.exit_code)
    os._exit(0)


@pytest.mark.chaos
def test_the_composed_study_is_killed_and_goes_on(whole: Study, tmp_path: Path) -> None:
    raw, codes = small(tmp_path), []
    for number, point in enumerate(("before_call@shard=0", "after_call@shard=1", "before_side", "after_data@shard=0",
                                    "before_receipt@shard=1", "after_call@shard=0", "before_rollup")):
        codes.append(exit_code(in_child(_train, raw, failpoint=f"{point}:kill")))
        assert codes[-1] == -signal.SIGKILL, (number, point, codes)
    assert exit_code(in_child(_train, raw)) == 0

    study = prepare_study(parse_study(raw))
    for name, run in made(study).items():
        other = made(whole)[name]
        assert (hashes(run), refused(run), attempts(run)) == (hashes(other), refused(other), attempts(other)), name
    (trial,), (wanted,) = make_trials(study), make_trials(whole)
    assert trial.list_sha256 == wanted.list_sha256
    found, expected = (read_result(one.files, trial.name) for one in (study, whole))
    assert found is not None
    assert expected is not None
    assert (found["last"], found["history"]) == (expected["last"], expected["history"])
