"""Maps of the classifiers of a study: the same images under every arm, from the weights that were kept."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rayexpand.contract.errors import UsageError
from rayexpand.data.seeds import DataConfig, build_index
from rayexpand.evaluation.gradcam import grad_cam
from rayexpand.reports.saliency import overlay, write_saliency_page
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import read_table
from rayexpand.studies import saliency
from rayexpand.studies.kept import load_classifier, read_trial
from rayexpand.studies.results import read_study
from rayexpand.studies.saliency import chosen_images
from tests.reports.test_run import visible
from tests.studies.test_weights import kept, study_of  # noqa: F401  (a fixture)


def test_maps_are_those_of_the_kept_classifier(kept: tuple) -> None:  # noqa: F811
    folder = str(kept[0].files.root)
    page = Path(write_saliency_page(folder, images=4))
    rows = read_table(open_files(folder), "figures/saliency.parquet").to_pylist()
    mine = [row for row in rows if row["arm"] == "original"]
    found = load_classifier(kept[0].files, read_trial(kept[0].files, mine[0]["trial"]))
    assert found.module is not None

    index = chosen_images(build_index(DataConfig(**read_trial(kept[0].files, mine[0]["trial"]).test)), 4)
    assert [row["image_id"] for row in mine] == index.seed_ids
    assert len({row["class"] for row in mine}) == 4, "classes in turn"
    from rayexpand.loader.loader import TestSet

    (batch,) = TestSet(index, DataConfig(**found.trial.test), found.view, 0, 1, 16).batches()
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in (found.view.mean, found.view.std))
    x_BCHW = (torch.from_numpy(batch.x_BHWC).permute(0, 3, 1, 2).float() / 255 - mean) / std
    maps = grad_cam(found.module, mine[0]["layer"], x_BCHW, torch.from_numpy(batch.labels).long()).map_Bhw
    assert np.allclose([row["map"] for row in mine], maps.flatten(1).numpy(), atol=1e-5)

    told = {row["arm"]: row["why"] for row in rows if row["why"]}
    assert "no network is trained" in told["clip_zero_shot"]
    assert "attention" in told["clip_finetune"]
    words = visible(page.read_text())
    assert "What the classifiers look at" in words
    assert told["clip_finetune"] in words


def test_what_a_page_has_no_room_for_is_said(kept: tuple, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(saliency, "MOST_ARMS", 1)
    table = saliency.write_saliency(str(kept[0].files.root), images=1, name="short").to_pylist()
    assert table[0]["why"] is None
    assert {row["why"] for row in table[1:]} == {"a page has room for 1 arms"}
    with pytest.raises(UsageError, match="--images 65 are more than the 64 of a page"):
        saliency.write_saliency(str(kept[0].files.root), images=65)


def test_an_arm_without_the_first_repetition_is_said(kept: tuple, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    folder = str(kept[0].files.root)
    view = read_study(folder)
    late = next(arm for arm in view.arms if arm != view.baseline)
    arms = {**view.arms, late: [{**one, "seed": 1} for one in view.arms[late]]}
    monkeypatch.setattr(saliency, "read_study", lambda _: replace(view, arms=arms))
    rows = saliency.write_saliency(folder, images=1, name="late").to_pylist()

    assert {row["why"] for row in rows if row["arm"] == late} == {"its trial of repetition 0 is not finished"}


def test_a_study_whose_weights_are_gone_has_no_page(kept: tuple, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(str(kept[0].files.root), folder := tmp_path / "study")
    shutil.rmtree(folder / "weights")
    with pytest.raises(UsageError, match=r"no arm of .* has a map:\n  .*: the weights of trial .* were not kept"):
        write_saliency_page(str(folder))


def test_a_study_without_weights_is_told_what_to_set(tmp_path: Path) -> None:
    study, _ = study_of(tmp_path, None)
    with pytest.raises(UsageError, match=r"training\.keep: weights"):
        write_saliency_page(str(study.files.root))


def test_an_overlay_is_brighter_where_the_map_is_and_encloses_its_upper_half() -> None:
    map_hw = np.zeros((4, 4), np.float32)
    map_hw[1, 1] = 2.0
    drawn = overlay(np.full((8, 8), 128, np.uint8), map_hw)
    centre, corner = drawn[60, 60].sum(), drawn[150, 150].sum()

    assert drawn.shape == (160, 160, 3)
    assert centre > corner + 100
    assert (drawn == 255).all(axis=2).any()
    assert not (overlay(np.full((8, 8), 128, np.uint8), np.zeros((4, 4), np.float32)) == 255).all(axis=2).any()
