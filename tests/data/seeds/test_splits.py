"""Splits that a dataset does not separate by itself: training images beside test images."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from rayexpand.contract.errors import SeedDataError
from rayexpand.data.seeds import DataConfig, build_index, check
from rayexpand.data.seeds.listing import split_words
from tests.corpus import encoded, photo, write_parquet, write_tar


def files(folder: Path, source: str, names: list[str]) -> DataConfig:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if source == "parquet":
            write_parquet(folder / f"{name}.parquet", [encoded(photo(i))], pa.array([0]))
        else:
            write_tar(folder / f"{name}.tar", [("0.png", encoded(photo(i))), ("0.cls", b"0")])
    return DataConfig(source=source, path=str(folder))  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["parquet", "webdataset"])
@pytest.mark.parametrize(("names", "splits"), [
    (["imagenet1k-train-0000", "imagenet1k-validation-00"], ["train", "validation"]),
    (["cifar10-train", "cifar10-test"], ["train", "test"]), (["train_0", "test_0"], ["train", "test"]),
    (["Train-0", "Test-0"], ["Train", "Test"]), (["TRAIN", "VAL"], ["train", "val"]),
    (["train2017", "val2017"], ["train", "val"]), (["birdsTrain0", "birdsTest0"], ["train", "test"]),
    (["voc.trainval.0", "voc.test.0"], ["trainval", "test"]), (["a-test-train", "a-test-val"], ["train", "val"])])
def test_any_word_for_a_split_in_a_file_name_asks_for_one(tmp_path: Path, source: str, names: list[str],
                                                          splits: list[str]) -> None:
    data = files(tmp_path, source, names)
    (problem,) = check(data)
    assert problem.startswith("data.split: missing")
    for split, name in zip(splits, names, strict=True):
        assert f"'{split.lower()}'" in problem
        (seed_id,) = build_index(data.model_copy(update={"split": split})).seed_ids
        assert seed_id == f"{name}/0"


@pytest.mark.parametrize("names", [["a-0", "b-0"], ["set-train-0", "set-train-1"], ["train-0", "extra-0"],
                                   ["latest-0", "contest-1", "invalid-2", "strain-3"]])
def test_other_words_say_no_split(tmp_path: Path, names: list[str]) -> None:
    data = files(tmp_path, "webdataset", names)
    assert check(data) == []
    assert len(build_index(data)) == len(names)


def test_folders_of_a_pattern_are_seen_too(tmp_path: Path) -> None:
    data = files(tmp_path, "webdataset", ["train/0", "test/0"]).model_copy(update={"path": f"{tmp_path}/*/*.tar"})
    assert "set it to one of 'test', 'train'" in check(data)[0]
    assert len(build_index(data.model_copy(update={"split": "test"}))) == 1


def folders(root: Path, *names: str) -> DataConfig:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "0.png").write_bytes(encoded(photo()))
    return DataConfig(source="imagefolder", path=str(root))


@pytest.mark.parametrize("names", [("train_set/cat", "test_set/cat"), ("Train-0/cat", "Val-0/cat"),
                                   ("train/cat", "val/cat", "annotations/old"), ("train2017/cat", "test2017/cat")])
def test_split_folders_by_any_word_are_no_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    (problem,) = check(data := folders(tmp_path, *names))
    assert problem.startswith("data.split: missing")
    split = names[1].split("/")[0]
    assert f"'{split}'" in problem
    assert build_index(data.model_copy(update={"split": split})).classes.key == ("cat",)


def test_classes_may_be_called_like_splits(tmp_path: Path) -> None:
    data = folders(tmp_path, "test tube", "steam train/old", "valid")
    assert build_index(data).classes.key == ("steam train", "test tube", "valid")


@pytest.mark.parametrize("column", ["split", "Split", "SPLIT"])
def test_split_column_in_any_case(tmp_path: Path, column: str) -> None:
    (tmp_path / "list.csv").write_text(f"path,label,{column}\n0.png,0,train\n1.png,0,test\n")
    data = DataConfig(source="manifest", path=str(tmp_path / "list.csv"))
    with pytest.raises(SeedDataError, match=r"data\.split: missing"):
        build_index(data)
    assert build_index(data.model_copy(update={"split": "test"})).seed_ids == ["1.png"]


@pytest.mark.parametrize(("name", "words"), [
    ("Train", {"train"}), ("x_TEST_0", {"test"}), ("trainA", {"train"}), ("constrain", set()), ("a.val.b", {"val"})])
def test_words_of_a_name(name: str, words: set[str]) -> None:
    assert split_words(name) == words
