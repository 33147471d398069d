"""Further test sets: classes by key, choice among some of them, and accuracy in groups, with the papers' numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayexpand.classifier.accuracy import Answers
from rayexpand.classifier.recipe import Recipe
from rayexpand.contract.errors import SeedDataError, UsageError
from rayexpand.contract.schema import ClassTable
from rayexpand.data.seeds import DataConfig, build_index
from rayexpand.loader.loader import TestSet
from rayexpand.studies.extra_tests import ExtraTest, answer_among, classes_among, groups_of, open_test, problems, scores

WATERBIRD = {"water on water": (642, 410), "water on land": (642, 406), "land on land": (2255, 1706),
             "land on water": (2255, 1677)}  # images, right: 63.86 63.24 75.65 74.37 %, as Diff-Mix to a hundredth


def digits(**fields: Any) -> ExtraTest:
    return ExtraTest(data=DataConfig(source="digits", split="test", **fields.pop("data", {})), **fields)


def test_the_choice_is_among_the_classes_of_the_set() -> None:
    """Real-Fake: logits (5, 1, 4, 3), classes (1, 2, 3), label 2: wrong among four, right among three."""
    z_NK, y_N, item = np.array([[5.0, 1.0, 4.0, 3.0]]), np.array([2]), np.array([7])
    among_all, among_some = (answer_among(item, z_NK, y_N, classes) for classes in (None, np.array([1, 2, 3])))

    assert (among_all.rank.tolist(), among_all.predicted.tolist()) == ([1], [0])
    assert (among_some.rank.tolist(), among_some.predicted.tolist(), among_some.label.tolist()) == ([0], [2], [2])
    assert among_some.confidence[0] == pytest.approx(np.exp(4) / (np.exp(1) + np.exp(4) + np.exp(3)))
    with pytest.raises(UsageError, match="label 2 is not among"):
        answer_among(item, z_NK, y_N, np.array([1, 3]))


def test_the_average_over_waterbird_groups_is_by_images() -> None:
    right = np.concatenate([np.arange(images) < hits for images, hits in WATERBIRD.values()])
    groups = np.repeat(list(WATERBIRD), [images for images, _ in WATERBIRD.values()])
    order = np.random.Generator(np.random.Philox(key=1)).permutation(len(right))  # items come in any order
    said = Answers(order, np.zeros(len(right), int), (~right[order]).astype(int), np.zeros(len(right), int),
                   *np.full((4, len(right)), 0.5))
    found = scores(said, digits(), groups, 3)

    assert found["by_group"]["counts"] == {name: images for name, (images, _) in WATERBIRD.items()}
    assert {name: 100 * value for name, value in found["by_group"]["groups"].items()} == pytest.approx(
        {"water on water": 63.83, "water on land": 63.24, "land on land": 75.64, "land on water": 74.36}, abs=0.04)
    assert 100 * found["by_group"]["average"] == pytest.approx(72.46, abs=0.02)
    assert found["by_group"]["average"] == found["top1"]
    assert 100 * found["by_group"]["mean"] == pytest.approx(69.27, abs=0.02), "another number"
    assert found["by_group"]["worst"] == 406 / 642
    assert scores(said, digits(), None, 3)["by_group"] is None


def test_classes_are_matched_by_key_in_whatever_order() -> None:
    trained = ClassTable.of([str(digit) for digit in reversed(range(10))] + ["none"])
    one = digits()
    opened, plain = open_test(one, trained), build_index(one.data)
    index = opened.index

    np.testing.assert_array_equal(index.labels, 9 - plain.labels)
    assert index.classes is trained
    assert index.seed_ids == plain.seed_ids
    assert classes_among(one, opened) is None
    assert classes_among(digits(restrict=True), opened).tolist() == list(range(10))  # type: ignore[union-attr]
    with pytest.raises(UsageError, match=r"its classes '8', '9' are none of those that are trained"):
        open_test(one, ClassTable.of([str(digit) for digit in range(8)]))


def test_some_classes_of_the_set_have_no_image(tmp_path: Path) -> None:
    index = build_index(digits().data)
    (tmp_path / "ids.txt").write_text("\n".join(np.array(index.seed_ids)[np.isin(index.labels, [7, 2])]) + "\n")
    some = digits(data={"ids": str(tmp_path / "ids.txt")}, restrict=True)

    assert classes_among(some, open_test(some, index.classes)).tolist() == [2, 7]  # type: ignore[union-attr]


def test_groups_are_in_a_file_or_in_the_ids(tmp_path: Path) -> None:
    both = {"digits_background": "all"}
    index = build_index(digits(data=both).data)
    lines = [f"{one},{one.rpartition('/')[2]}" for one in reversed(index.seed_ids)]
    for column in ("seed_id", "path"):
        (tmp_path / f"{column}.csv").write_text("\n".join([f"{column},group", *lines, "elsewhere,none"]) + "\n")
    found = [groups_of(one, index) for one in (
        digits(data=both, groups=str(tmp_path / "seed_id.csv")), digits(data=both, groups=str(tmp_path / "path.csv")),
        digits(data=both, group_of="[^/]+/[^/]+/(.+)"))]

    assert all(one is not None and one.tolist() == found[0].tolist() for one in found)  # type: ignore[union-attr]
    low = int((index.labels[::2] < 5).sum())
    assert Counter(found[0].tolist()) == {"low-dark": low, "low-grey": low, "high-dark": 500 - low,  # type: ignore[union-attr]
                                          "high-grey": 500 - low}
    assert groups_of(digits(), index) is None
    (tmp_path / "some.csv").write_text("\n".join(["seed_id,group", *lines[:-2]]) + "\n")
    with pytest.raises(UsageError, match="2 of its 1,000 images are in no group"):
        groups_of(digits(data=both, groups=str(tmp_path / "some.csv")), index)


@pytest.mark.parametrize(("content", "words"), [
    ("name,group\na,b\n", r"groups: '.*' has the columns 'name', 'group', and needs seed_id or path, and group"),
    ("seed_id,group\na,b\na,c\n", "puts 'a' in two groups"),
    (None, "groups: '.*' does not exist")])
def test_a_file_of_groups_is_checked_before_training(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "groups.csv").write_text(content)
    one = digits(groups=str(tmp_path / "groups.csv"))

    with pytest.raises(SeedDataError, match=words):
        raise SeedDataError("\n".join(problems(one)))


@pytest.mark.parametrize(("fields", "words"), [
    ({"group_of": "(a"}, "is no regular expression"), ({"group_of": "a"}, "has no bracket"),
    ({"group_of": "(a)", "groups": "nowhere.csv"}, "given twice")])
def test_groups_that_cannot_be_meant(fields: dict[str, str], words: str) -> None:
    assert any(words in line for line in problems(digits(**fields)))
    assert problems(digits()) == []


# Class maps -----------------------------------------------------------------------------------------------------------


def mapped(folder: Path, lines: str, **fields: Any) -> ExtraTest:
    (folder / "map.csv").write_text(f"key,train_key\n{lines}")
    return digits(class_map=str(folder / "map.csv"), **fields)


def test_an_image_is_right_if_it_is_taken_for_any_of_its_classes(tmp_path: Path) -> None:
    """Digits 1 and 7 are one class of the set's words, 3 has two trained classes, the others have no line."""
    trained = ClassTable.of(["three", "also three", "bar", "none"])
    one = mapped(tmp_path, "1,bar\n7,bar\n3,also three\n3,three\nmoon,none\n", restrict=True)
    opened, plain = open_test(one, trained), build_index(one.data)

    assert opened.left_out == int((~np.isin(plain.labels, [1, 3, 7])).sum())
    assert len(opened.index) == len(plain) - opened.left_out
    assert {(plain.classes.key[own], int(label)) for own, label in zip(opened.own_N, opened.index.labels, strict=True)
            } == {("1", 2), ("7", 2), ("3", 0)}
    assert classes_among(one, opened).tolist() == [0, 1, 2], "the union of what is mapped"  # type: ignore[union-attr]
    three = np.flatnonzero(opened.own_N == 3)[:1].repeat(3)
    z_NK = np.array([[1.0, 2.0, 0.0, 9.0], [2.0, 1.0, 3.0, 0.0], [2.0, 1.0, 0.0, 0.0]])
    found = answer_among(three, z_NK, opened.index.labels[three], classes_among(one, opened), opened.accepted(three))
    assert found.rank.tolist() == [0, 1, 0]
    assert found.label.tolist() == [1, 0, 0]
    assert found.predicted.tolist() == [1, 2, 0]


def test_scores_of_mapped_classes_are_by_the_classes_of_the_set(tmp_path: Path) -> None:
    """1 and 7 are both right as `bar`: their accuracies count apart."""
    one = mapped(tmp_path, "1,bar\n7,bar\n")
    opened = open_test(one, ClassTable.of(["bar", "none"]))
    order = np.arange(len(opened.index))
    is_one = opened.own_N == 1
    said = Answers(order, np.zeros(len(order), int), (~is_one).astype(int), (~is_one).astype(int),
                   *np.full((4, len(order)), 0.5))
    found = scores(said, one, None, 2, opened)

    assert found["top1"] == is_one.mean()
    assert (found["per_class"], found["classes"], found["left_out"]) == (0.5, 2, opened.left_out)


def test_folders_that_are_numbers_are_numbers_of_the_trained_classes(tmp_path: Path) -> None:
    """ImageNet-V2: folder 10 is class 10, not what comes after folder 1."""
    for number in (0, 1, 2, 10, 11):
        (tmp_path / str(number)).mkdir()
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / f"{number}/image.png")
    one = ExtraTest(data=DataConfig(source="imagefolder", path=str(tmp_path)), class_map="numbers")
    opened = open_test(one, ClassTable.of([f"n{number:02d}" for number in range(12)]))

    assert {name.split("/")[0]: int(label) for name, label in zip(
        opened.index.seed_ids, opened.index.labels, strict=True)} == {str(n): n for n in (0, 1, 2, 10, 11)}
    assert opened.left_out == 0
    with pytest.raises(UsageError, match="its classes '8', '9' are no numbers from 0 to 7"):
        open_test(digits(class_map="numbers"), ClassTable.of([f"n{number}" for number in range(8)]))


@pytest.mark.parametrize(("content", "words"), [
    ("key,label\n1,a\n", "has the columns 'key', 'label', and needs train_key"), ("key,train_key\n", "has no line"),
    ("key,train_key\n1,\n", "has an empty cell"), ("key,train_key\n1,a\n2,bar\n", "has the train_key 'a', none of"),
    ("key,train_key\none,bar\n", "has no line for any of its classes")])
def test_a_class_map_is_checked(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "map.csv").write_text(content)
    one = digits(class_map=str(tmp_path / "map.csv"))
    if not (found := problems(one)):
        with pytest.raises(UsageError) as raised:
            open_test(one, ClassTable.of(["bar", "none"]))
        found = [str(raised.value)]
    assert [words in line for line in found] == [True]


def test_the_border_is_cut_off_first(tmp_path: Path) -> None:
    """ObjectNet's frame: an image with a red border is tested as the image inside it."""
    rng = np.random.Generator(np.random.Philox(key=9))
    for name in ("plain", "framed", "thin"):
        (tmp_path / name / "a").mkdir(parents=True)
    inner = rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)
    framed = np.pad(inner, [(3, 3), (3, 3), (0, 0)])
    framed[:3] = framed[-3:] = [255, 0, 0]
    Image.fromarray(inner).save(tmp_path / "plain/a/0.png")
    Image.fromarray(framed).save(tmp_path / "framed/a/0.png")
    Image.fromarray(inner[:8, :8]).save(tmp_path / "thin/a/0.png")

    def seen(name: str, border: int) -> np.ndarray:
        data = DataConfig(source="imagefolder", path=str(tmp_path / name))
        return next(TestSet(build_index(data), data, Recipe(size=16), 0, 1, 1, crop_border=border).batches()).x_BHWC

    np.testing.assert_array_equal(seen("framed", 3), seen("plain", 0))
    assert not np.array_equal(seen("framed", 0), seen("plain", 0))
    with pytest.raises(UsageError, match="has 8 x 8 pixels, and crop_border 4 leaves nothing of it"):
        seen("thin", 4)


def test_fields_that_came_later_move_no_old_file() -> None:
    assert set(digits().model_dump()) == {"data", "restrict", "groups", "group_of"}
    assert set(digits(class_map="numbers", crop_border=3).model_dump()) >= {"class_map", "crop_border"}
