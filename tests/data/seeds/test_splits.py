"""Splits that a dataset does not separate by itself: training images beside test images."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayexpand.contract.errors import SeedDataError
from rayexpand.data.seeds import DataConfig, build_index, check, survey
from rayexpand.data.seeds.listing import split_words
from tests.corpus import encoded, photo, write_parquet, write_tar
from tests.data.seeds.outcomes import in_memory


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


# --- folders in other orders


@pytest.mark.parametrize("other", ["unlabeled/x", "holdout/cat", "pictures/deep/er"])
def test_a_split_folder_beside_another_folder_asks_for_the_split(tmp_path: Path, other: str) -> None:
    data = folders(tmp_path, "Train/cat", "Train/dog", other)
    with pytest.raises(SeedDataError, match=r"data\.split: missing, 'Train' .* set data\.split to 'Train'"):
        build_index(data)
    assert build_index(data.model_copy(update={"split": "Train"})).classes.key == ("cat", "dog")


@pytest.mark.parametrize("names", [("Train-0/a", "Train-0/b", "Val-1/a", "Val-1/b"), ("train/a", "train/b", "x/a"),
                                   ("images/a", "images/b")])
def test_a_stray_image_makes_no_class_of_a_split_or_of_the_folder_above(tmp_path: Path, names: tuple[str, ...]) -> None:
    data = folders(tmp_path, *names)
    (tmp_path / names[0]).parent.joinpath("stray.png").write_bytes(encoded(photo()))
    with pytest.raises(SeedDataError, match=r"data\.(split: missing|path: .* one folder)"):
        build_index(data)


def test_a_class_called_train_has_its_images_in_its_folder(tmp_path: Path) -> None:
    assert build_index(folders(tmp_path, "train", "train/old", "bus")).classes.key == ("bus", "train")


@pytest.mark.parametrize("names", [("cat/train", "cat/test", "dog/train"), ("cat/a/Train", "dog/VAL")])
def test_splits_inside_of_classes_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    data = folders(tmp_path / "set", *names)
    with pytest.raises(SeedDataError, match=r"data\.split: .* lie inside of the class folders .*<split>/<class>"):
        build_index(data)
    with in_memory(tmp_path / "set") as url, pytest.raises(SeedDataError, match="inside of the class folders"):
        build_index(data.model_copy(update={"path": url}))
    (tmp_path / "ids.txt").write_text(f"{names[0]}/0.png\n")
    assert len(build_index(data.model_copy(update={"ids": str(tmp_path / "ids.txt")}))) == 1


def test_one_word_inside_of_classes_is_no_split(tmp_path: Path) -> None:
    assert len(build_index(folders(tmp_path, "cat/train", "dog/train", "dog/test tube"))) == 3


def test_images_whose_names_say_splits_are_refused(tmp_path: Path) -> None:
    data = folders(tmp_path, "cat", "dog")
    for name in ("cat", "dog"):
        (tmp_path / name / "0.png").rename(tmp_path / name / "train_0.png")
    assert len(build_index(data)) == 2
    (tmp_path / "dog/test_1.png").write_bytes(encoded(photo(1)))
    (tmp_path / "dog/2.png").write_bytes(encoded(photo(2)))
    above = DataConfig(source="imagefolder", path=str(tmp_path.parent), split=tmp_path.name)
    assert len(build_index(above)) == 4, "data.split says which it is, whatever names say"
    with pytest.raises(SeedDataError, match=r"data\.split: the names of 3 of 4 images .*'test', 'train'"):
        build_index(data)
    (tmp_path / "cat/3.png").write_bytes(encoded(photo(3)))
    (tmp_path / "cat/4.png").write_bytes(encoded(photo(4)))
    assert len(build_index(data)) == 6


def test_images_called_like_their_class_say_no_split(tmp_path: Path) -> None:
    data = folders(tmp_path, "train", "test tube")
    for name in ("train", "test tube"):
        (tmp_path / name / "0.png").rename(tmp_path / name / f"{name}_0.png")
    assert len(build_index(data)) == 2


def test_a_path_one_folder_too_high_is_refused(tmp_path: Path) -> None:
    data = folders(tmp_path / "set", "images/cat", "images/dog")
    with pytest.raises(SeedDataError, match=r"data\.path: .* one folder, 'images', .*'cat', 'dog'.*set data\.path to"):
        build_index(data)
    with pytest.raises(SeedDataError, match=r"set data\.path to .*/two/images/train,"):
        build_index(folders(tmp_path / "two", "images/train/cat", "images/train/dog"))
    (tmp_path / "map.txt").write_text("images things\n")
    assert build_index(data.model_copy(update={"classes": str(tmp_path / "map.txt")})).classes.name == ("things",)
    assert build_index(folders(tmp_path / "one", "cat/very/deep")).classes.key == ("cat",)


# --- columns of other names


@pytest.mark.parametrize("column", ["subset", "phase", "data set"])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_column_that_says_splits_is_asked_for_whatever_its_name(tmp_path: Path, column: str, suffix: str) -> None:
    columns = {"path": ["0.png", "1.png", "2.png"], "label": ["a", "b", "a"], column: ["Train", "TEST", "Train"],
               "other": ["x", "train", "y"]}
    if suffix == "csv":
        lines = [",".join(columns), *(",".join(row) for row in zip(*columns.values(), strict=True))]
        (tmp_path / "list.csv").write_text("\n".join(lines))
    else:
        pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    data = DataConfig(source="manifest", path=str(tmp_path / f"list.{suffix}"))
    with pytest.raises(SeedDataError, match=rf"data\.split: missing, .*split_column to '{column}'.*'TEST', 'Train'"):
        build_index(data)
    chosen = data.model_copy(update={"split": "TEST", "split_column": column})
    assert build_index(chosen).seed_ids == ["1.png"]


# --- files that are left out


def test_files_of_a_dataset_that_are_left_out_are_counted(tmp_path: Path) -> None:
    data = files(tmp_path, "parquet", ["train-0", "train_1", "more/x", "more/test-0", "data/train-0", "test-0"])
    assert survey(data.model_copy(update={"split": "train"}))["skipped"] == {
        ".parquet": {"files": 3, "examples": ["data/train-0.parquet", "more/x.parquet", "train_1.parquet"]}}


@pytest.mark.parametrize("source", ["parquet", "webdataset"])
def test_files_in_further_folders_are_counted(tmp_path: Path, source: str) -> None:
    data = files(tmp_path / "set", source, ["a", "more/b", "more/still/c"])
    found = survey(data)
    assert found["seeds"] == 1
    (skipped,) = found["skipped"].values()
    assert skipped["files"] == 2
    with in_memory(tmp_path / "set") as url:
        assert survey(data.model_copy(update={"path": url})) == found


def test_only_a_survey_looks_for_what_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lists everything below the folder, which in a bucket is everything there is."""
    (tmp_path / "deep").mkdir()
    for name in ("a.parquet", "deep/b.parquet"):
        pq.write_table(pa.table({"image": [b"x"], "label": ["ant"]}), tmp_path / name)
    data = DataConfig(source="parquet", path=str(tmp_path))
    assert survey(data)["skipped"] == {".parquet": {"files": 1, "examples": ["deep/b.parquet"]}}
    monkeypatch.setattr("rayexpand.data.seeds.files._below", lambda folder: pytest.fail("listed everything"))
    assert len(build_index(data)) == 1
