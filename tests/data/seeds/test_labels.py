"""What labels mean in each layout: keys, and class tables that name classes without an image."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayexpand.contract.errors import SeedDataError
from rayexpand.contract.schema import SeedIndex
from rayexpand.data.seeds import DataConfig, build_index
from tests.corpus import encoded, photo, write_parquet, write_tar

Write = Callable[[Path, list[str]], DataConfig]


def csv_of(folder: Path, labels: list[str]) -> DataConfig:
    (folder / "list.csv").write_text("path,label\n" + "".join(f"{i}.png,{label}\n" for i, label in enumerate(labels)))
    return DataConfig(source="manifest", path=str(folder / "list.csv"))


def tar_of(folder: Path, labels: list[str]) -> DataConfig:
    write_tar(folder / "a.tar", [member for i, label in enumerate(labels) for member in (
        (f"{i}.png", encoded(photo(i))), (f"{i}.cls", label.encode()))])
    return DataConfig(source="webdataset", path=str(folder))


def json_of(folder: Path, labels: list[str]) -> DataConfig:
    write_tar(folder / "a.tar", [member for i, label in enumerate(labels) for member in (
        (f"{i}.png", encoded(photo(i))), (f"{i}.json", json.dumps({"label": label}).encode()))])
    return DataConfig(source="webdataset", path=str(folder))


def parquet_of(folder: Path, labels: list[str]) -> DataConfig:
    write_parquet(folder / "a.parquet", [encoded(photo())] * len(labels), pa.array(labels))
    return DataConfig(source="parquet", path=str(folder))


def list_of(folder: Path, labels: list[str]) -> DataConfig:
    pq.write_table(pa.table({"path": [f"{i}.png" for i in range(len(labels))], "label": labels}),
                   folder / "list.parquet")
    return DataConfig(source="manifest", path=str(folder / "list.parquet"))


def bad(index: SeedIndex) -> list[bool]:
    return [fault == "bad_label" for fault in index.table["fault"].to_pylist()]


# --- texts


@pytest.mark.parametrize("write", [csv_of, tar_of, json_of, parquet_of, list_of])
def test_texts_of_digits_are_keys_and_never_numbers(tmp_path: Path, write: Write) -> None:
    index = build_index(write(tmp_path, ["000", "001", "01", "001"]))
    assert index.classes.key == ("000", "001", "01")
    assert index.labels.tolist() == [0, 1, 2, 1]
    assert not any(bad(index))


@pytest.mark.parametrize("write", [csv_of, tar_of])
def test_a_damaged_label_makes_no_names_of_padded_numbers(tmp_path: Path, write: Write) -> None:
    index = build_index(write(tmp_path, ["00", "01", "oops", "-1", "01"]))
    assert (index.classes.key, bad(index)) == (("00", "01"), [False, False, True, True, False])


@pytest.mark.parametrize("write", [csv_of, tar_of])
def test_padded_keys_of_a_mapping(tmp_path: Path, write: Write) -> None:
    data = write(tmp_path, ["02", "01", "02"])
    (tmp_path / "map.json").write_text(json.dumps({"01": "cat", "02": "dog"}))
    classes = build_index(data.model_copy(update={"classes": str(tmp_path / "map.json")})).classes
    assert (classes.key, classes.name, classes.count) == (("01", "02"), ("cat", "dog"), (1, 2))


@pytest.mark.parametrize("write", [csv_of, tar_of, json_of, parquet_of, list_of])
def test_an_empty_label_is_bad(tmp_path: Path, write: Write) -> None:
    index = build_index(write(tmp_path, ["cat", "", " ", "dog"]))
    assert (index.classes.key, index.classes.count) == (("cat", "dog"), (1, 1))
    assert bad(index) == [False, True, True, False]


# --- several files


@pytest.mark.parametrize(("first", "second"), [([0, 1], ["cat", "dog"]), (["cat"], [0]), ([0], [0.5]), ([0], [True])])
def test_files_with_labels_of_two_kinds_are_refused(tmp_path: Path, first: list[object], second: list[object]) -> None:
    for name, labels in (("a", first), ("b", second)):
        write_parquet(tmp_path / f"{name}.parquet", [encoded(photo())] * len(labels), pa.array(labels))
    with pytest.raises(SeedDataError, match=r"data\.label_column: 'label' is \w+ in 'b\.parquet' and \w+ in the first"):
        build_index(DataConfig(source="parquet", path=str(tmp_path)))


def test_files_that_number_other_classes_are_refused(tmp_path: Path) -> None:
    for name, names in (("a", ["cat", "dog"]), ("b", ["dog", "cat"])):
        write_parquet(tmp_path / f"{name}.parquet", [encoded(photo())] * 2, pa.array([0, 1]), names)
    with pytest.raises(SeedDataError, match=r"'b\.parquet' numbers other classes \('dog', 'cat'\)"):
        build_index(DataConfig(source="parquet", path=str(tmp_path)))


@pytest.mark.parametrize(("names", "message"), [
    (["cat", "dog", "cat"], "names 'cat' more than once"), (["cat", ""], "1 of 2 classes have no name"),
    (["cat", " "], "1 of 2 classes have no name")])
def test_class_tables_that_name_no_class_or_one_twice_are_refused(tmp_path: Path, names: list[str],
                                                                   message: str) -> None:
    write_parquet(tmp_path / "a.parquet", [encoded(photo())] * 2, pa.array([0, 1]), names)
    with pytest.raises(SeedDataError, match=rf"data\.label_column: .*{message}"):
        build_index(DataConfig(source="parquet", path=str(tmp_path)))


def test_files_whose_labels_differ_in_width_or_are_all_empty_are_fine(tmp_path: Path) -> None:
    for name, labels in (("a", pa.array([0, 1], pa.int64())), ("b", pa.array([1, 0], pa.uint8())),
                         ("c", pa.array([None, None]))):
        write_parquet(tmp_path / f"{name}.parquet", [encoded(photo())] * 2, labels)
    index = build_index(DataConfig(source="parquet", path=str(tmp_path)))
    assert (index.labels.tolist()[:4], bad(index)) == ([0, 1, 1, 0], [False] * 4 + [True] * 2)


# --- integers


def integers(folder: Path, source: str, labels: list[int]) -> DataConfig:
    if source == "npz":
        np.savez(folder / "a.npz", train_images=np.stack([photo(i) for i in range(len(labels))]),
                 train_labels=np.array(labels))
        return DataConfig(source="npz", path=str(folder / "a.npz"), split="train")
    if source == "parquet":
        write_parquet(folder / "a.parquet", [encoded(photo())] * len(labels), pa.array(labels))
        return DataConfig(source="parquet", path=str(folder))
    return (csv_of if source == "manifest" else tar_of)(folder, list(map(str, labels)))


@pytest.mark.parametrize("source", ["manifest", "webdataset", "parquet", "npz"])
@pytest.mark.parametrize(("labels", "keys", "codes"), [
    ([1, 20, 3, 20], ("1", "3", "20"), [0, 2, 1, 2]), ([7_000_000_000, 5], ("5", "7000000000"), [1, 0]),
    ([0, 2, 1, 10], ("0", "1", "2", "10"), [0, 2, 1, 3])])
def test_integers_are_keys(tmp_path: Path, source: str, labels: list[int], keys: tuple[str, ...],
                           codes: list[int]) -> None:
    index = build_index(integers(tmp_path, source, labels))
    assert (index.classes.key, index.labels.tolist()) == (keys, codes)


@pytest.mark.parametrize("source", ["manifest", "webdataset", "parquet", "npz"])
def test_classes_of_the_mapping_may_be_absent(tmp_path: Path, source: str) -> None:
    data = integers(tmp_path, source, [1, 3, 4, -1])
    (tmp_path / "map.txt").write_text("1 cat\n2 dog\n3 emu\n")
    index = build_index(data.model_copy(update={"classes": str(tmp_path / "map.txt")}))
    assert (index.classes.key, index.classes.count) == (("1", "2", "3"), (1, 0, 1))
    assert index.classes.name == ("cat", "dog", "emu")
    assert bad(index) == [False, False, True, True]
    (tmp_path / "map.txt").write_text("9 yak\n")
    with pytest.raises(SeedDataError, match="no image has a label of the 1 classes; 4 rows have a null"):
        build_index(data.model_copy(update={"classes": str(tmp_path / "map.txt")}))


def test_a_filtered_hugging_face_set_and_manifest_keep_their_class_numbers(tmp_path: Path) -> None:
    names = {"info": {"features": {"label": {"names": ["cat", "dog", "emu"], "_type": "ClassLabel"}}}}
    table = pa.table({"path": ["0.png", "1.png"], "label": [2, 0]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), tmp_path / "m.parquet")
    write_parquet(tmp_path / "rows/a.parquet", [encoded(photo())] * 2, pa.array([2, 0]), ["cat", "dog", "emu"])
    for data in (DataConfig(source="manifest", path=str(tmp_path / "m.parquet")),
                 DataConfig(source="parquet", path=str(tmp_path / "rows"))):
        index = build_index(data)
        assert (index.classes.key, index.classes.count) == (("cat", "dog", "emu"), (1, 0, 1))
        assert index.labels.tolist() == [2, 0]


def test_empty_class_folder_is_allowed_where_the_mapping_names_it(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
    (tmp_path / "set/a/0.png").write_bytes(encoded(photo()))
    data = DataConfig(source="imagefolder", path=str(tmp_path / "set"))
    with pytest.raises(SeedDataError, match="1 of 2 classes have no image"):
        build_index(data)
    (tmp_path / "map.txt").write_text("a cat\nb dog\n")
    assert build_index(data.model_copy(update={"classes": str(tmp_path / "map.txt")})).classes.count == (1, 0)
