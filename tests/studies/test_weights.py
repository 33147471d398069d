"""Weights of finished classifiers: kept with a hash, loaded again, and answering as they did."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayexpand.contract.errors import DamagedFile, UsageError
from rayexpand.studies.config import parse_study
from rayexpand.studies.kept import load_classifier, read_trial
from rayexpand.studies.parts import Study, Trial, read_result
from rayexpand.studies.results import Predicted, read_study
from rayexpand.studies.study import prepare_study
from rayexpand.studies.trial import answers_of, open_work, run_trials
from rayexpand.studies.trials import make_trials, pending_trials
from tests.studies.test_study import raw_study

BASELINES = ["clip_zero_shot", "clip_finetune"]


def study_of(out: Path, keep: str | None, **changes: Any) -> tuple[Study, list[Trial]]:
    training = {} if keep is None else {"training": {"keep": keep}}
    study = prepare_study(parse_study(raw_study(out, **{
        "arms": [{"name": "original"}], "expansions": {}, "seeds": [0], **training, **changes})))
    return study, make_trials(study)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, list[Trial]]:
    study, trials = study_of(tmp_path_factory.mktemp("kept"), "weights", baselines=BASELINES)
    assert [why for _, why in run_trials(study.files, trials, study.config.training) if why] == []
    return study, trials


def predicted_of(study: Study, trial: Trial) -> np.ndarray:
    found = read_study(str(study.files.root)).predicted(trial.name)
    assert isinstance(found, Predicted)
    return found.predicted


@pytest.mark.parametrize("arm", ["original", *BASELINES])
def test_a_classifier_that_was_kept_answers_as_it_did(kept: tuple[Study, list[Trial]], arm: str) -> None:
    study, trials = kept
    trial = read_trial(study.files, next(one.name for one in trials if one.arm == arm))
    found, work = load_classifier(study.files, trial), open_work(study.files, trial, study.config.training)
    work.recipe = found.view
    again = answers_of(work, found.answering)
    said = (read_result(study.files, trial.name) or {}).get("weights")

    assert np.array_equal(again.predicted, predicted_of(study, trial))
    assert (found.module is None) == (said is None) == (arm == "clip_zero_shot")
    if said is not None and found.module is not None:
        content = Path(study.files.root, said["file"]).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (said["sha256"], said["bytes"])
        assert not found.module.training
        x_BCHW = torch.zeros(2, 3, found.view.size, found.view.size)
        assert found.module(x_BCHW).shape == (2, said["classes"])


def test_keeping_weights_moves_no_digest_and_no_number(kept: tuple[Study, list[Trial]], tmp_path: Path,
                                                       caplog: pytest.LogCaptureFixture) -> None:
    study, (trial, *_) = study_of(tmp_path, None)
    assert [why for _, why in run_trials(study.files, [trial], study.config.training) if why] == []
    plain, beside = (read_result(one.files, trial.name) or {} for one in (study, kept[0]))

    assert "keep" not in study.config.model_dump(mode="json")["training"]
    assert "weights" not in plain
    assert (plain["digest"], plain["history"]) == (beside["digest"], beside["history"])
    asked, same = study_of(tmp_path, "weights")
    with caplog.at_level(logging.WARNING):
        assert pending_trials(asked.trial_folder, same) == same
    assert "weights of 1 finished trials were not kept" in caplog.text
    with pytest.raises(UsageError, match=r"not kept; set training\.keep: weights"):
        load_classifier(asked.files, trial)


def test_weights_that_are_gone_or_damaged_are_said(tmp_path: Path) -> None:
    study, trials = study_of(tmp_path, "weights")
    assert [why for _, why in run_trials(study.files, trials, study.config.training) if why] == []
    file = Path(study.files.root, f"weights/{trials[0].name}.safetensors")
    whole = file.read_bytes()
    assert pending_trials(study.trial_folder, trials) == []
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DamagedFile, match="delete it and run `rayexpand train` again"):
        load_classifier(study.files, trials[0])
    file.unlink()
    assert pending_trials(study.trial_folder, trials) == trials
    assert [why for _, why in run_trials(study.files, trials, study.config.training) if why] == []
    assert file.read_bytes() == whole
    with pytest.raises(UsageError, match="no trial is called 'other'; known: original-s0"):
        read_trial(study.files, "other")
