"""The first batch of an arm on the page is what its network is shown, image by image and label by label."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rayexpand.classifier.recipe import Recipe
from rayexpand.contract.errors import UsageError
from rayexpand.data.seeds import DataConfig, build_index
from rayexpand.loader.loader import Loader
from rayexpand.loader.training_set import TrainingSet
from rayexpand.reports.batch import arms_of, write_batch_page
from rayexpand.studies import batches
from rayexpand.studies.batches import write_batches
from rayexpand.studies.parts import Trial
from rayexpand.studies.trial import make_classifier, open_work
from rayexpand.studies.trials import make_trials
from tests.reports.test_run import visible
from tests.studies.test_study import SMALL, expanded, raw_study

ARMS: list[dict[str, Any]] = [
    {"name": "plain"}, {"name": "blended", "recipe": {"mixup": 1.0}}, {"name": "cut", "recipe": {"cutmix": 1.0}},
    {"name": "each", "recipe": {"mixup": 1.0, "cutmix": 1.0, "mix_per": "image"}},
    {"name": "rare", "recipe": {"cmo": 1.0, "cmo_span": [0, 1]}},
    {"name": "with its seed", "use": "flips", "ratio": 1, "mix": {}}]
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Trial], Any]:
    study = expanded(raw_study(tmp_path_factory.mktemp("batches"), seeds=[3], arms=ARMS, subset={"kind": "full"},
                               data={"source": "digits", "per_class": 2}, recipe={**SMALL, "smoothing": 0.0}))
    return str(study.files.root), {one.arm: one for one in make_trials(study)}, study


class Seen(nn.Module):
    """A network that keeps what it is shown."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.shown = module, list[torch.Tensor]()

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        self.shown.append(x_BCHW.detach().clone())
        return self.module(x_BCHW)


@pytest.mark.parametrize("arm", [one["name"] for one in ARMS])
@pytest.mark.parametrize("images", [4, 100])
def test_it_is_what_the_network_is_shown(trials: tuple[str, dict[str, Trial], Any], arm: str, images: int,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    folder, named, study = trials
    name = named[f"{arm} 1x" if f"{arm} 1x" in named else arm].arm
    rows = [row for row in write_batches(folder, images=images).to_pylist() if row["arm"] == name]

    work = open_work(study.files, named[name], study.config.training)
    labels: list[torch.Tensor] = []
    monkeypatch.setattr("rayexpand.classifier.classifier.smooth", lambda y_BK, *_: labels.append(y_BK) or y_BK)
    classifier = make_classifier(work, "cpu", wrap=Seen)
    classifier.update(next(work.feed.batches(0, 1)))
    shown = classifier._wrapped.shown[0] * classifier._std + classifier._mean  # type: ignore[union-attr,operator]
    at = [0, 1, 6, 7] if images == 4 else list(range(8))

    assert [row["batch"] for row in rows] == [8] * len(at)
    for row, i in zip(rows, at, strict=True):
        with Image.open(io.BytesIO(row["image"])) as image:
            pixels = np.asarray(image)
        assert np.abs(shown[i].permute(1, 2, 0).numpy() * 255 - pixels).max() < 0.51
        said = {one["name"]: one["share"] for one in row["label"]}
        assert np.allclose([said.get(one, 0.0) for one in CLASSES], labels[0][i].numpy(), atol=1e-6)
    is_mixed = [bool(row["mixing"]) for row in rows]
    assert is_mixed == [arm in ("blended", "cut") or row["own_share"] < 1 for row in rows]
    if arm == "with its seed":
        assert is_mixed == [not row["is_real"] for row in rows]


def test_part_of_a_step_is_part_of_its_batch_also_in_windows() -> None:
    data = DataConfig(source="digits", per_class=12)
    rows = TrainingSet.of_seeds(build_index(data), data)
    recipe = Recipe(size=16, batch=16, cmo=1.0, cmo_span=(0, 1))
    loader = Loader(rows, recipe, 5, shuffle_rows=50, streams=4)

    assert loader.is_windowed
    for batch in loader.batches(0, 9):
        part, slots, _ = loader.part(batch.step, 6)
        at = [0, 1, 2, 13, 14, 15]
        assert np.array_equal(part.x_BHWC, batch.x_BHWC[at])
        assert np.array_equal(part.y_BK, batch.y_BK[at])
        assert len(slots.items) == 6


def test_the_page_says_labels_shares_and_why_an_arm_has_none(trials: tuple[str, dict[str, Trial], Any]) -> None:
    folder, named, _ = trials
    page = Path(write_batch_page(folder, images=4)).read_text()
    lists = Path(folder, named["plain"].rows)
    hidden = lists.rename(f"{lists}.gone")
    try:
        without = arms_of(write_batches(folder, images=4))
    finally:
        hidden.rename(lists)

    assert page.count("<img") == 4 * (len(ARMS) + page.count("original repeated"))
    assert "4 of 8 images" in visible(page)
    assert "% own" in visible(page)
    assert "no training set" in {one.arm: one.why for one in without}["plain"]
    assert {one.arm: len(one.pictures) for one in without}["cut"] == (0 if named["cut"].rows == named["plain"].rows
                                                                      else 4)


def test_arms_for_which_there_is_no_room_are_named(trials: tuple[str, dict[str, Trial], Any],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MOST_ARMS", 1)
    shown, *others = arms_of(write_batches(trials[0], images=1, name="short"))

    assert shown.pictures
    assert {one.why for one in others} == {"a page has room for 1 arms"}
    assert {shown.arm, *(one.arm for one in others)} == trials[1].keys()


def test_a_study_without_a_trial_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text('{"config": {}, "trials": []}')
    with pytest.raises(UsageError, match="no trial yet"):
        write_batches(str(tmp_path))
