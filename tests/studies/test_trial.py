"""One trial in this process: the same curve after any stop, and results that cannot be taken for another's."""

from __future__ import annotations

import io
import multiprocessing
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rayexpand.classifier.classifier import Classifier
from rayexpand.contract.errors import Interrupted
from rayexpand.data.seeds import DataConfig, build_index
from rayexpand.loader.config import TrainingConfig
from rayexpand.storage.tables import read_table
from rayexpand.studies.config import parse_study
from rayexpand.studies.parts import Study, Trial, read_result
from rayexpand.studies.study import prepare_study
from rayexpand.studies.trial import (
    TrainingCurve,
    answers_of,
    checkpoint,
    fit,
    make_classifier,
    open_work,
    restore,
    run_trial,
    run_trials,
)
from rayexpand.studies.trials import make_trials, pending_trials
from tests.studies.test_study import SMALL, raw_study

if TYPE_CHECKING:
    from tests.s3server import Server

CURVE = ("step", "loss", "top1", "ece")


def one_trial(out: Path, **recipe: Any) -> tuple[Study, Trial]:
    study = prepare_study(parse_study(raw_study(out, arms=[{"name": "original"}], seeds=[0],
                                                recipe={**SMALL, **recipe})))
    return study, make_trials(study)[0]


def curve(result: dict[str, Any]) -> list[tuple[float, ...]]:
    return [tuple(point[name] for name in CURVE) for point in result["history"]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    study, trial = one_trial(tmp_path_factory.mktemp("whole"))
    return run_trial(study.files, trial, study.config.training)


def test_a_trial_is_a_function_of_its_description(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    study, trial = one_trial(tmp_path)
    again = run_trial(study.files, trial, study.config.training)
    other_study, other = one_trial(tmp_path / "other", lr=0.02)

    assert curve(again) == curve(undisturbed)
    assert other.digest != trial.digest
    assert curve(run_trial(other_study.files, other, study.config.training)) != curve(undisturbed)


@pytest.mark.parametrize("at", [1, 3, 5])
def test_stopped_at_any_step_the_curve_is_the_same(undisturbed: dict[str, Any], tmp_path: Path, at: int,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    study, trial = one_trial(tmp_path)
    training = study.config.training.model_copy(update={"checkpoint_steps": 2})
    update = Classifier.update

    def stop(self: Classifier, batch: Any) -> float:
        if self.step == at:
            raise Interrupted("stopped")
        return update(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "update", stop)
        with pytest.raises(Interrupted):
            run_trial(study.files, trial, training)
    assert read_result(study.files, trial.name) is None
    result = run_trial(study.files, trial, training)

    assert curve(result) == curve(undisturbed)
    assert result["starts"] == ([0, at // 2 * 2] if at >= 2 else [0])
    assert study.files.list("checkpoints") == []


def test_a_checkpoint_of_another_trial_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, trial = one_trial(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("rayexpand.studies.trial.write_result",
                      lambda *_, **__: (_ for _ in ()).throw(Interrupted("stop")))
        with pytest.raises(Interrupted):
            run_trial(study.files, trial, study.config.training)
    assert study.files.list("checkpoints")
    changed_study, changed = one_trial(tmp_path, lr=0.02)

    assert changed.name == trial.name
    assert run_trial(changed_study.files, changed, study.config.training)["starts"] == [0]


def test_a_damaged_checkpoint_counts_as_none(undisturbed: dict[str, Any], tmp_path: Path,
                                             caplog: pytest.LogCaptureFixture) -> None:
    study, trial = one_trial(tmp_path)
    work = open_work(study.files, trial, study.config.training)
    classifier = make_classifier(work, "cpu")
    whole = checkpoint(trial, classifier, TrainingCurve())
    assert restore(whole, trial, classifier) is not None
    assert restore(whole[64:], trial, classifier) is not None, "one of an older version"
    for place in range(0, len(whole), len(whole) // 60):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        assert restore(bytes(damaged), trial, classifier) is None, place
    assert "checkpoint of trial original-s0 is damaged" in caplog.text
    study.files.replace(f"checkpoints/{trial.name}.pt", whole[:1000])

    assert curve(run_trial(study.files, trial, study.config.training)) == curve(undisturbed)


def test_a_damaged_result_is_trained_again(undisturbed: dict[str, Any], tmp_path: Path,
                                           caplog: pytest.LogCaptureFixture) -> None:
    study, trial = one_trial(tmp_path)
    run_trial(study.files, trial, study.config.training)
    assert pending_trials(study.trial_folder, [trial]) == []
    file = Path(study.files.root, f"results/{trial.name}.json")
    file.write_bytes(file.read_bytes().replace(b'"seed": 0', b'"seed": 1'))

    assert pending_trials(study.trial_folder, [trial]) == [trial]
    assert f"results/{trial.name}.json: is damaged" in caplog.text


def test_damaged_predictions_are_said_and_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    study, trial = one_trial(tmp_path)
    run_trial(study.files, trial, study.config.training)
    file = Path(study.files.root, f"predictions/{trial.name}.parquet")
    file.write_bytes(file.read_bytes()[:-100])

    assert pending_trials(study.trial_folder, [trial]) == [trial]
    assert f"predictions/{trial.name}.parquet: is damaged" in caplog.text
    run_trial(study.files, trial, study.config.training)
    assert pending_trials(study.trial_folder, [trial]) == []
    file.unlink()
    assert pending_trials(study.trial_folder, [trial]) == [trial]
    assert f"predictions/{trial.name}.parquet: no such file" in caplog.text


def test_what_decides_a_result_decides_its_digest(tmp_path: Path) -> None:
    """Other images under the same ids, other test labels, other weights in the same file: nothing old is used."""
    rng = np.random.Generator(np.random.Philox(key=3))
    images, labels = rng.integers(0, 256, (4, 12, 16, 16, 3), dtype=np.uint8), np.arange(12) % 3
    weights = tmp_path / "start.safetensors"

    def trial(train: int = 0, test: int = 2, order: int = 1, start: float = 0.0, **training: int) -> Trial:
        np.savez(tmp_path / "data.npz", train_images=images[train], train_labels=labels, test_images=255 - images[test],
                 test_labels=labels[::order])
        save_file({"bias": torch.full((3,), start)}, weights)
        source = {"source": "npz", "path": str(tmp_path / "data.npz")}
        raw = raw_study(tmp_path, data={**source, "split": "train"}, test={**source, "split": "test"}, seeds=[0],
                        subset={"kind": "full"}, expansions={}, arms=[{"name": "original"}], training=training,
                        recipe={**SMALL, "checkpoint": str(weights)})
        return make_trials(prepare_study(parse_study(raw)))[0]

    same = trial().digest
    others = [trial(train=1), trial(test=3), trial(order=-1), trial(start=1.0), trial(workers=2),
              trial(shuffle_rows=4), trial(shuffle_rows=4, streams=2)]

    assert trial().digest == same
    assert len({same, *(one.digest for one in others)}) == len(others) + 1


def test_with_fewer_steps_than_epochs_some_end_together(tmp_path: Path) -> None:
    study, trial = one_trial(tmp_path, updates=2, epochs=5)
    assert [point["step"] for point in run_trial(study.files, trial, study.config.training)["history"]] == [1, 2]


def test_a_backbone_that_breaks_ends_its_own_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = prepare_study(parse_study(raw_study(tmp_path, arms=[{"name": "a"}, {"name": "b"}], seeds=[0])))
    monkeypatch.setattr("rayexpand.studies.trial.make_classifier", lambda work, device: 1 / 0 if work.trial.arm == "a"
                        else make_classifier(work, device))
    with pytest.raises(ZeroDivisionError):
        list(run_trials(study.files, make_trials(study), study.config.training))
    monkeypatch.setattr("rayexpand.studies.trial.make_classifier",
                        lambda work, device: _broken() if work.trial.arm == "a" else make_classifier(work, device))
    found = {trial.arm: problem for trial, problem in run_trials(study.files, make_trials(study),
                                                                 study.config.training)}

    assert found == {"a": "RuntimeError: out of memory", "b": ""}


def _broken() -> None:
    raise RuntimeError("out of memory")


def test_a_study_in_an_object_store_reads_its_own_lists(object_stores: Server, tmp_path: Path) -> None:
    """Two studies whose lists have one digest and name different places."""
    found = []
    for name in ("a", "b"):
        data = tmp_path / name
        shutil.copytree(image_folder_of(tmp_path), data)
        raw = raw_study("s3://runs/studies", name=name, data={"source": "imagefolder", "path": str(data)},
                        test={"source": "imagefolder", "path": str(tmp_path / f"{name}-test")}, seeds=[0],
                        subset={"kind": "full"}, expansions={}, arms=[{"name": "original"}])
        shutil.copytree(image_folder_of(tmp_path, 1), tmp_path / f"{name}-test")
        study = prepare_study(parse_study(raw))
        trial = make_trials(study)[0]
        found.append((trial, run_trial(study.files, trial, study.config.training)))
        shutil.rmtree(data)

    assert found[0][0].rows == found[1][0].rows
    assert curve(found[0][1]) == curve(found[1][1])


def image_folder_of(tmp_path: Path, key: int = 0) -> Path:
    root = tmp_path / f"images-{key}"
    rng = np.random.Generator(np.random.Philox(key=key))
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / name / f"{key}-{i}.png")
    return root


def killed_at_step_15(out: Path) -> None:
    """Trains up to there and says so, and is never done with that step."""
    study, trial = one_trial(out, updates=30, epochs=3)
    update = Classifier.update

    def stop(self: Classifier, batch: Any) -> float:
        if self.step == 15:
            (out / "there").touch()
            signal.pause()
        return update(self, batch)

    Classifier.update = stop  # type: ignore[method-assign]
    run_trial(study.files, trial, interval_of_10(study))


def test_a_process_killed_in_the_middle_costs_one_interval(tmp_path: Path) -> None:
    """SIGKILL, then the same trial; the curve equals the undisturbed one bit for bit."""
    (tmp_path / "killed").mkdir()
    killed = multiprocessing.get_context("fork").Process(target=killed_at_step_15, args=(tmp_path / "killed",))
    killed.start()
    while not (tmp_path / "killed/there").exists():
        assert killed.is_alive()
        time.sleep(0.005)
    killed.kill()
    killed.join()
    saved = (tmp_path / "killed/small/checkpoints/original-s0.pt").read_bytes()[64:]  # its hash comes first
    reached = torch.load(io.BytesIO(saved), weights_only=True)["classifier"]["step"]
    results = []
    for name in ("killed", "whole"):
        study, trial = one_trial(tmp_path / name, updates=30, epochs=3)
        results.append(run_trial(study.files, trial, interval_of_10(study)))

    assert results[0]["starts"] == [0, reached]
    assert reached == 10
    assert curve(results[0]) == curve(results[1])


def test_a_warning_saves_a_checkpoint(tmp_path: Path) -> None:
    study, trial = one_trial(tmp_path, updates=6, epochs=1)
    work = open_work(study.files, trial, study.config.training)
    classifier, saved = make_classifier(work, "cpu"), list[int]()
    fit(work, classifier, TrainingCurve(), work.feed.batches(0, 6), evaluate=lambda: answers_of(work, classifier),
        save=lambda: saved.append(classifier.step), warned=lambda: classifier.step == 4)

    assert saved == [4]


def interval_of_10(study: Study) -> TrainingConfig:
    return study.config.training.model_copy(update={"checkpoint_steps": 10})


def test_predictions_are_one_row_for_each_test_image(tmp_path: Path) -> None:
    study, trial = one_trial(tmp_path)
    result = run_trial(study.files, trial, study.config.training)
    table = read_table(study.files, f"predictions/{trial.name}.parquet")

    assert table["item"].to_pylist() == list(range(30))
    correct = table["label"].to_numpy() == table["predicted"].to_numpy()
    assert correct.mean() == pytest.approx(result["last"]["top1"])
    assert np.bincount(table["label"].to_numpy()).tolist() == [3] * 10


def test_a_finished_classifier_is_also_tested_elsewhere(tmp_path: Path) -> None:
    """On digits with both backgrounds among all ten classes, and on four classes among these four and among all."""
    index = build_index(DataConfig(source="digits", split="test"))
    rows = np.flatnonzero(np.isin(index.labels, [1, 4, 6, 9]))[:40]
    (tmp_path / "four.txt").write_text("\n".join(np.array(index.seed_ids)[rows]) + "\n")
    four = {"data": {"source": "digits", "split": "test", "ids": str(tmp_path / "four.txt")}}
    also = {"backgrounds": {"data": {"source": "digits", "split": "test", "digits_background": "all", "per_class": 4},
                            "group_of": "/([a-z-]+)$"}, "four": {**four, "restrict": True}, "among-ten": four}
    recipe = {**SMALL, "updates": 20, "cmo": 0.5, "cmo_span": [0, 1], "drw": 0.99}
    study = prepare_study(parse_study(raw_study(tmp_path, arms=[{"name": "original"}], seeds=[0], extra_tests=also,
                                                recipe=recipe, frequency=[3, 5], subset={
                                                    "kind": "counts", "counts": [8, 8, 8, 4, 4, 4, 2, 2, 2, 2]})))
    trial = make_trials(study)[0]
    result = run_trial(study.files, trial, study.config.training)
    found = result["also"]

    assert list(found) == ["backgrounds", "four", "among-ten"]
    assert all(result["by_frequency"][name] is not None for name in ("many", "medium", "few"))
    groups = found["backgrounds"]["by_group"]
    assert sum(groups["counts"].values()) == found["backgrounds"]["images"] == 40
    assert set(groups["counts"]) == {"low-dark", "low-grey", "high-dark", "high-grey"}
    assert groups["average"] == pytest.approx(found["backgrounds"]["top1"])
    assert groups["worst"] == min(groups["groups"].values())
    said = {name: read_table(study.files, f"predictions/{trial.name}.{name}.parquet") for name in found}
    assert said["four"]["label"].to_pylist() == said["among-ten"]["label"].to_pylist() == index.labels[rows].tolist()
    assert set(said["four"]["predicted"].to_pylist()) <= {1, 4, 6, 9}
    assert not set(said["among-ten"]["predicted"].to_pylist()) <= {1, 4, 6, 9}
    assert found["four"]["top1"] > found["among-ten"]["top1"]
    assert (found["four"]["restricted"], found["four"]["classes"]) == (True, 4)
    assert read_result(study.files, trial.name) == result


def test_an_epoch_of_the_schedule_is_a_share_of_the_updates(tmp_path: Path) -> None:
    study, trial = one_trial(tmp_path, updates=7, epochs=3)
    work = open_work(study.files, trial, study.config.training)

    assert work.ends == [2, 5, 7]
    assert [step for step in range(1, 8) if work.is_saved_after(step, None)] == [2, 5]
    assert [step for step in range(1, 8) if work.is_saved_after(step, 3)] == [3, 6]
