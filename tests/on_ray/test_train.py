"""Trials on Ray: two workers train what one process trains, and a killed worker or driver changes no number."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from torch import nn

from rayexpand.contract.errors import UsageError
from rayexpand.on_ray.pool import connected
from rayexpand.on_ray.train import train_trials
from rayexpand.runs.config import ClusterConfig
from rayexpand.storage.tables import read_table
from rayexpand.studies import trial as training
from rayexpand.studies.config import parse_study
from rayexpand.studies.kept import load_classifier
from rayexpand.studies.parts import Study, Trial, read_result
from rayexpand.studies.study import prepare_study
from rayexpand.studies.trials import make_trials, pending_trials
from tests.commands import ROOT
from tests.studies.test_study import SMALL, raw_study
from tests.studies.test_trial import curve

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]
GROUP = {"width": 8, "norm": "group"}


def study_of(out: Path, workers: int, arms: list[dict[str, Any]], cpus: float = 1.0,
             changes: dict[str, Any] | None = None, **recipe: Any) -> tuple[Study, list[Trial]]:
    raw = raw_study(out, **{"arms": arms, "seeds": [0], "training": {"workers": workers, "cpus_per_worker": cpus},
                            "recipe": {**SMALL, **recipe}, **(changes or {})})
    study = prepare_study(parse_study(raw))
    return study, make_trials(study)


def results(study: Study, trials: list[Trial]) -> dict[str, dict[str, Any]]:
    return {one.arm: read_result(study.files, one.name) or {} for one in trials}


class TwoWorkers(nn.Module):
    """What two DDP workers are to BatchNorm: statistics per slice, running statistics those of the first worker."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.second = module, copy.deepcopy(module)
        for name, parameter in module.named_parameters():
            owner, _, leaf = name.rpartition(".")
            setattr(self.second.get_submodule(owner), leaf, parameter)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        for mine, of_first in zip(self.second.buffers(), self.module.buffers(), strict=True):
            mine.copy_(of_first)
        first, second = x_BCHW.chunk(2)
        return torch.cat([self.module(first), self.second(second)])


def two_slices(study: Study, trial: Trial) -> list[dict[str, float]]:
    """The history of a trial in one process that gives each half of a batch its own BatchNorm statistics."""
    work = training.open_work(study.files, trial, study.config.training)
    classifier, found = training.make_classifier(work, "cpu", TwoWorkers), training.TrainingCurve()

    def batches() -> Any:
        for one, other in zip(work.feed.batches(0, work.feed.total_steps, 0, 2),
                              work.feed.batches(0, work.feed.total_steps, 1, 2), strict=True):
            yield type(one)(np.concatenate([one.x_BHWC, other.x_BHWC]), np.concatenate([one.y_BK, other.y_BK]),
                            one.step)

    training.fit(work, classifier, found, batches(), save=lambda: None,
                 evaluate=lambda: training.answers_of(work, classifier))
    return found.history


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One cluster of our own for the studies that this process drives."""
    with connected(ClusterConfig()):
        yield


@pytest.mark.usefixtures("cluster")
def test_two_workers_train_what_one_process_trains(tmp_path: Path) -> None:
    """Loss curve to 1e-5: GroupNorm against one process, BatchNorm against one process with per-worker statistics. The
    first arm pastes boxes of a tail-weighted batch and weighs classes, and is tested on a second set in groups."""
    tail = {"cmo": 0.7, "cmo_span": [0, 1], "drw": 0.99, "drw_from": 1}
    arms = [{"name": "group", "recipe": {"backbone_args": GROUP, **tail}}, {"name": "batch"}]
    recipe: dict[str, Any] = {"updates": 12, "epochs": 3, "changes": {
        "subset": {"kind": "counts", "counts": [6, 4, 2, 2, 1, 1, 1, 1, 1, 1]}, "also": {"backgrounds": {
            "data": {"source": "digits", "split": "test", "digits_background": "all", "per_class": 3},
            "group_of": "/([a-z-]+)$"}}}}
    spread, trials = study_of(tmp_path / "spread", 2, arms, **recipe)
    assert train_trials(spread.trial_folder, trials) == []
    alone, same = study_of(tmp_path / "alone", 0, arms[:1], **recipe)
    training.run_trial(alone.files, same[0], alone.config.training)
    found, expected = results(spread, trials), results(alone, same)

    assert found["group"]["workers"] == 2
    assert found["group"]["cpu_seconds"] > 0
    assert found["group"]["list_sha256"] == expected["group"]["list_sha256"]
    assert found["group"]["digest"] != expected["group"]["digest"], "numbers depend on the workers"
    np.testing.assert_allclose([point["loss"] for point in found["group"]["history"]],
                               [point["loss"] for point in expected["group"]["history"]], rtol=1e-5)
    assert [point["top1"] for point in found["group"]["history"]] == [
        point["top1"] for point in expected["group"]["history"]]
    elsewhere, same_elsewhere = (one["group"]["also"]["backgrounds"] for one in (found, expected))
    assert elsewhere["images"] == 30
    assert {**elsewhere, "ece": pytest.approx(elsewhere["ece"], abs=1e-4)} == same_elsewhere
    batch = next(one for one in trials if one.arm == "batch")
    reference = two_slices(spread, batch)
    np.testing.assert_allclose([point["loss"] for point in found["batch"]["history"]],
                               [point["loss"] for point in reference], rtol=1e-5)
    assert [point["top1"] for point in found["batch"]["history"]] == [point["top1"] for point in reference]
    whole = training.run_trial(alone.files, batch, alone.config.training)
    assert abs(whole["history"][-1]["loss"] - reference[-1]["loss"]) > 1e-3, "statistics per worker make a difference"


@pytest.mark.usefixtures("cluster")
def test_two_workers_mix_and_compare_views_as_one_process_does(tmp_path: Path) -> None:
    """What belongs to a row comes through the loaders with it: mixes with real images and partners, views of AugMix."""
    group = {"backbone_args": GROUP}
    arms = [{"name": "mixed", "mix": {"partner": "class"}, "recipe": {**group, "cutmix": 1.0, "mix_per": "image"}},
            {"name": "views", "recipe": {**group, "augment": "augmix", "jsd": 12, "gridmask": 0.8}}]
    spread, trials = study_of(tmp_path / "spread", 2, arms, updates=6, epochs=2)
    assert train_trials(spread.trial_folder, trials) == []
    alone, same = study_of(tmp_path / "alone", 0, arms, updates=6, epochs=2)
    for trial in same:
        training.run_trial(alone.files, trial, alone.config.training)
    found, expected = results(spread, trials), results(alone, same)
    for arm in expected:
        np.testing.assert_allclose([one["loss"] for one in found[arm]["history"]],
                                   [one["loss"] for one in expected[arm]["history"]], rtol=1e-5)
    assert found["mixed"]["mixing"] == expected["mixed"]["mixing"]


@pytest.mark.usefixtures("cluster")
def test_the_first_of_two_workers_keeps_the_weights(tmp_path: Path) -> None:
    study, trials = study_of(tmp_path, 2, [{"name": "batch"}], changes={
        "training": {"workers": 2, "cpus_per_worker": 1.0, "keep": "weights"}})
    assert train_trials(study.trial_folder, trials) == []
    found = load_classifier(study.files, trials[0])
    work = training.open_work(study.files, trials[0], study.config.training)
    order = np.argsort((again := training.answers_of(work, found.answering)).item)
    said = read_table(study.files, f"predictions/{trials[0].name}.parquet")

    assert np.array_equal(again.predicted[order], said["predicted"].to_numpy())
    np.testing.assert_allclose(again.confidence[order], said["confidence"].to_numpy(), rtol=1e-5)


@pytest.mark.usefixtures("cluster")
def test_small_trials_are_tasks_with_the_same_numbers(tmp_path: Path) -> None:
    arms = [{"name": "original"}, {"name": "faster", "recipe": {"lr": 0.02}}]
    tasks, trials = study_of(tmp_path / "tasks", 0, arms)
    assert train_trials(tasks.trial_folder, trials) == []
    assert pending_trials(tasks.trial_folder, trials) == []
    here, same = study_of(tmp_path / "here", 0, arms)
    for trial in same:
        training.run_trial(here.files, trial, here.config.training)

    assert {arm: curve(found) for arm, found in results(tasks, trials).items()} == {
        arm: curve(found) for arm, found in results(here, same).items()}


@pytest.mark.usefixtures("cluster")
def test_what_cannot_work_is_said_before_training(tmp_path: Path) -> None:
    odd, trials = study_of(tmp_path, 3, [{"name": "original"}])
    large, others = study_of(tmp_path / "large", 1, [{"name": "original"}], cpus=4096)
    with pytest.raises(UsageError, match=r"recipe\.batch|training\.workers"):
        train_trials(odd.trial_folder, trials)
    with pytest.raises(UsageError, match=r"training\.workers: one trial wants"):
        train_trials(large.trial_folder, others)


@pytest.mark.usefixtures("cluster")
def test_a_trial_that_diverges_fails_alone(tmp_path: Path) -> None:
    arms = [{"name": "original"}, {"name": "wild", "recipe": {"lr": 1e30, "optimiser": "sgd", "schedule": "constant"}}]
    study, trials = study_of(tmp_path, 0, arms)
    failed = train_trials(study.trial_folder, trials)

    assert len(failed) == 1
    assert failed[0].startswith("wild-s0: training diverged")
    assert [one.arm for one in pending_trials(study.trial_folder, trials)] == ["wild"]


LONG = {"updates": 240, "epochs": 4, "backbone_args": GROUP}


def driver(out: Path) -> subprocess.Popen[bytes]:
    """`rayexpand train` with two workers and a checkpoint every 20 steps, in a process of its own."""
    raw = raw_study(out, arms=[{"name": "original"}], seeds=[0], recipe={**SMALL, **LONG},
                    training={"workers": 2, "checkpoint_steps": 20})
    path = out / "study.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(raw))
    return subprocess.Popen([sys.executable, "-m", "rayexpand", "train", str(path)], cwd=ROOT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def kept_step(out: Path) -> int:
    saved = (out / "small/checkpoints/original-s0.pt").read_bytes()[64:]  # its hash comes first
    return int(torch.load(io.BytesIO(saved), weights_only=True)["classifier"]["step"])


def wait_for(found: Callable[[], Any], process: subprocess.Popen[bytes]) -> Any:
    while not (value := found()):
        assert process.poll() is None, "the driver ended before what was waited for"
        time.sleep(0.01)
    return value


def train_workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Ray Train workers of the cluster that a driver started."""
    found = []
    for one in psutil.Process(process.pid).children(recursive=True):
        try:
            found += [one] if "RayTrainWorker" in " ".join(one.cmdline()) else []
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("undisturbed")
    assert driver(out).wait() == 0
    return result_of(out)


def result_of(out: Path) -> dict[str, Any]:
    study, trials = study_of(out, 2, [{"name": "original"}], **LONG)
    return results(study, trials)["original"]


def test_a_signal_ends_resumably(tmp_path: Path) -> None:
    process = driver(tmp_path)
    wait_for((tmp_path / "small/checkpoints/original-s0.pt").exists, process)
    process.send_signal(signal.SIGTERM)

    assert process.wait() == 75


def test_a_killed_worker_costs_at_most_one_interval(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    process = driver(tmp_path)
    kept = tmp_path / "small/checkpoints/original-s0.pt"
    wait_for(kept.exists, process)
    victim = wait_for(lambda: train_workers(process), process)[-1]
    os.kill(victim.pid, signal.SIGKILL)
    assert process.wait() == 0
    result = result_of(tmp_path)

    assert curve(result) == curve(undisturbed)
    assert len(result["starts"]) == 2
    assert result["starts"][1] % 20 == 0
    assert 0 < result["starts"][1] < LONG["updates"]


def test_a_killed_driver_costs_at_most_one_interval(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    process = driver(tmp_path)
    kept = tmp_path / "small/checkpoints/original-s0.pt"
    wait_for(kept.exists, process)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for left in started:  # the machine is gone, and Ray's daemons with it
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    psutil.wait_procs(started, timeout=30)
    reached = kept_step(tmp_path)
    assert driver(tmp_path).wait() == 0
    result = result_of(tmp_path)

    assert curve(result) == curve(undisturbed)
    assert result["starts"] == [0, reached]
    assert 0 < reached < LONG["updates"]
