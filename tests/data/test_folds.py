"""Folds: stratified, keyed, and whole groups at once."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayexpand.contract.errors import SeedDataError, UsageError
from rayexpand.contract.schema import SEED_INDEX, ClassTable, SeedIndex
from rayexpand.data.folds import NEVER, folds_of
from rayexpand.data.seeds import DataConfig, build_index
from rayexpand.data.seeds.digits import digit_of

FOLDER = DataConfig(source="imagefolder", path="nowhere")


def index_of(labels: list[int], faults: dict[int, str] | None = None) -> SeedIndex:
    n = len(labels)
    columns = {"seed_id": [f"{label}/{row}.png" for row, label in enumerate(labels)], "label": labels, "file": [0] * n,
               "member": [""] * n, "group": [-1] * n, "offset": [-1] * n,
               "fault": [(faults or {}).get(row, "") for row in range(n)]}
    return SeedIndex(pa.table(columns, SEED_INDEX), ClassTable.of([str(one) for one in range(max(labels) + 1)]))


def test_every_class_and_the_whole_are_cut_into_equal_parts() -> None:
    labels = np.repeat([0, 1, 2], [11, 7, 4])
    fold = folds_of(index_of(labels.tolist()), FOLDER, 5, 0)

    assert np.ptp(np.bincount(fold)) <= 1
    assert all(np.ptp(np.bincount(fold[labels == label], minlength=5)) <= 1 for label in range(3))
    assert not np.array_equal(fold, folds_of(index_of(labels.tolist()), FOLDER, 5, 1))


def test_a_fold_follows_from_the_ids_and_not_from_their_order() -> None:
    index = index_of([0] * 6 + [1] * 5)
    order = np.random.Generator(np.random.Philox(key=1)).permutation(11)
    shuffled = SeedIndex(index.table.take(pa.array(order)), index.classes)

    np.testing.assert_array_equal(folds_of(index, FOLDER, 3, 0)[order], folds_of(shuffled, FOLDER, 3, 0))


def test_seeds_that_are_held_out_of_nothing() -> None:
    fold = folds_of(index_of([0, 0, 1, 2, 2, 2], {3: "missing"}), FOLDER, 2, 0)

    assert (fold == NEVER).tolist() == [False, False, True, True, False, False]
    assert sorted(fold[:2].tolist()) == sorted(fold[4:].tolist()) == [0, 1]
    assert set(folds_of(index_of([0, 0, 1]), FOLDER, 1, 0).tolist()) == {NEVER}


@pytest.mark.parametrize(("labels", "faults"), [([0, 1, 2], {}), ([0, 0], {1: "missing"})])
def test_seeds_of_which_none_can_be_held_out_are_refused(labels: list[int], faults: dict[int, str]) -> None:
    with pytest.raises(UsageError, match="no class has two images that can be used"):
        folds_of(index_of(labels, faults), FOLDER, 2, 0)


def test_a_digit_behind_two_ids_is_held_out_whole() -> None:
    data = DataConfig(source="digits", digits_background="all", per_class=8)
    index = build_index(data)
    fold = folds_of(index, data, 4, 0)
    of_image: dict[str, set[int]] = {}
    for one, number in zip(index.seed_ids, fold.tolist(), strict=True):
        of_image.setdefault(digit_of(one), set()).add(number)

    assert len(of_image) < len(index)
    assert all(len(found) == 1 for found in of_image.values())


def test_an_image_that_is_listed_again_is_held_out_with_itself(image_folder: Path) -> None:
    data = DataConfig(source="imagefolder", path=str(image_folder), repeats={"ant/1.png": 3})
    fold = dict(zip((index := build_index(data)).seed_ids, folds_of(index, data, 5, 0).tolist(), strict=True))

    assert fold["ant/1.png"] == fold["ant/1.png~2"] == fold["ant/1.png~3"]


def test_groups_of_a_file_are_held_out_whole(tmp_path: Path) -> None:
    index = index_of([0] * 6 + [1] * 6)
    groups = [row // 2 for row in range(12)]
    lines = [f"{one},video {group}\n" for one, group in zip(index.seed_ids, groups, strict=True)]
    (tmp_path / "groups.csv").write_text("seed_id,group\n" + "".join(lines))

    fold = folds_of(index, FOLDER, 3, 0, str(tmp_path / "groups.csv"))

    assert fold[::2].tolist() == fold[1::2].tolist()
    assert sorted(fold[:6:2].tolist()) == sorted(fold[6::2].tolist()) == [0, 1, 2]
    (tmp_path / "groups.csv").write_text("seed_id,group\n" + "".join(lines[:-1]))
    with pytest.raises(UsageError, match=r"group: 1 of 12 seeds are in no group .* \('1/11.png'\)"):
        folds_of(index, FOLDER, 3, 0, str(tmp_path / "groups.csv"))


def test_the_only_seed_of_a_class_is_held_out_with_its_group(tmp_path: Path) -> None:
    index = index_of([0, 1, 1, 1, 2])
    (tmp_path / "groups.csv").write_text("seed_id,group\n" + "".join(
        f"{one},{name}\n" for one, name in zip(index.seed_ids, "aabcd", strict=True)))

    fold = folds_of(index, FOLDER, 3, 0, str(tmp_path / "groups.csv"))

    assert fold[0] == fold[1] != NEVER
    assert (sorted(fold[1:4].tolist()), fold[4]) == ([0, 1, 2], NEVER)


def test_groups_may_be_a_column_of_the_dataset(image_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(image_folder, tmp_path / "images")
    files = sorted((tmp_path / "images").rglob("*.png"))
    lines = [f"{one.relative_to(tmp_path)},{one.parent.name},{number // 2}" for number, one in enumerate(files)]
    (tmp_path / "birds.csv").write_text("\n".join(["path,label,video", *lines]))
    data = DataConfig(source="manifest", path=str(tmp_path / "birds.csv"))

    fold = folds_of(build_index(data), data, 2, 0, "video")

    assert fold[::2].tolist() == fold[1::2].tolist()
    assert set(fold.tolist()) == {0, 1}
    with pytest.raises(SeedDataError, match="no column 'film'"):
        folds_of(build_index(data), data, 2, 0, "film")


def test_a_class_of_one_group_is_refused(tmp_path: Path) -> None:
    index = index_of([0, 0, 0, 1, 1])
    (tmp_path / "groups.csv").write_text("path,group\n" + "".join(
        f"{one},{'a' if row < 3 else row}\n" for row, one in enumerate(index.seed_ids)))

    with pytest.raises(UsageError, match=r"all seeds of 1 classes fall into one fold \('0'\)"):
        folds_of(index, FOLDER, 2, 0, str(tmp_path / "groups.csv"))
