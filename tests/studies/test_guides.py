"""The accuracy of a trained guide on the test images of a study."""

from __future__ import annotations

import json
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayexpand.classifier.backbones import build_backbone
from rayexpand.classifier.recipe import make_recipe
from rayexpand.data.seeds import DataConfig, build_index
from rayexpand.models.guide_files import save_classifier
from rayexpand.models.guides import ClassifierGuide, guide_hash
from rayexpand.storage.files import LocalFiles
from rayexpand.studies import guides
from rayexpand.studies.guides import guide_scores
from rayexpand.studies.measures import measure
from rayexpand.studies.parts import Trial
from rayexpand.studies.records import Record
from tests.runfolder import Builder

SIDE, SHOWN = 16, [0, 0, 1, 2, 2, 2]  # class of each test image


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    """Of a run with a classifier of random weights as its guide, and six test images."""
    for number, label in enumerate(SHOWN):
        file = tmp_path / f"test/{'abc'[label]}/{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(file)
    guide, recipe = tmp_path / "guide", make_recipe({"preset": "digits", "size": SIDE})
    guide.mkdir()
    save_classifier(guide, build_backbone(recipe, 3, seed=5), recipe, ("a", "b", "c"))
    run = Builder(tmp_path / "run", names=("a", "b", "c")).start(models={"guide": guide_hash(str(guide), None)})
    facts = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").unlink()
    config = {**facts["config"], "guide": {"weights": str(guide), "checkpoint": None}}
    (run.folder / "run.json").write_text(json.dumps({**{k: v for k, v in facts.items() if k != "seal"},
                                                     "config": config}))
    given: dict[str, Any] = {"name": "made-s0", "run": str(run.folder), "test_sha256": "0" * 64,
                             "test": DataConfig(source="imagefolder", path=str(tmp_path / "test")).model_dump()}
    empty = {"str": "", "int": 0, "float": 0.0, "dict[str, Any]": {}, "list[int]": [], "dict[str, dict[str, Any]]": {}}
    return Trial(**{one.name: given.get(one.name, empty.get(str(one.type))) for one in fields(Trial)})


def test_a_trained_guide_answers_the_test_images_once(trial: Trial, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    index, files = build_index(DataConfig(**trial.test)), LocalFiles(tmp_path / "study")
    (tmp_path / "study/.tmp").mkdir(parents=True)
    found = guide_scores(files, trial, index.classes, "cpu")
    images = np.stack([np.asarray(Image.open(tmp_path / "test" / f"{'abc'[label]}/{number}.png"))
                       for number, label in enumerate(SHOWN)])
    seen = ClassifierGuide.load(tmp_path / "guide", "cpu").zero_shot(images)
    right = float((seen == SHOWN).mean())
    assert 0 < right < 1, "or a constant would pass"
    assert found is not None
    assert (found["kind"], found["images"], found["top1"]) == ("classifier", len(SHOWN), pytest.approx(right))
    assert measure("guide").of(Record("s", "made", 0, {"guide": found})) == pytest.approx(100 * right)
    monkeypatch.setattr(guides, "load_guide", None)
    assert guide_scores(files, trial, index.classes, "cpu") == found, "other arms of the run read what is stored"


def test_a_guide_that_changed_is_said_and_has_no_accuracy(trial: Trial, tmp_path: Path,
                                                          caplog: pytest.LogCaptureFixture) -> None:
    recipe = make_recipe({"preset": "digits", "size": SIDE})
    save_classifier(tmp_path / "guide", build_backbone(recipe, 3, seed=6), recipe, ("a", "b", "c"))
    classes = build_index(DataConfig(**trial.test)).classes
    with caplog.at_level(logging.WARNING):
        assert guide_scores(LocalFiles(tmp_path / "study"), trial, classes, "cpu") is None
    assert "is not the guide that" in caplog.text
