from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayexpand.contract.errors import EnvironmentFault, SeedDataError
from rayexpand.contract.schema import Seed
from rayexpand.data.seeds import DataConfig, SeedReader, build_index, check
from tests.corpus import NAMES, encoded, photo, write_bad_manifest
from tests.data.seeds.outcomes import in_memory, reasons


def manifest(folder: Path, text: str | pa.Table, name: str = "list.csv", images: int = 4, **fields: object
             ) -> DataConfig:
    """A manifest `text` in `folder`, beside images 0.png, 1.png, ..."""
    folder.mkdir(exist_ok=True)
    for i in range(images):
        (folder / f"{i}.png").write_bytes(encoded(photo(i)))
    if isinstance(text, str):
        (folder / name).write_text(text)
    else:
        pq.write_table(text, folder / name)
    return DataConfig(source="manifest", path=str(folder / name), **fields)


def images(data: DataConfig) -> list[bytes]:
    index = build_index(data)
    found = SeedReader(index, data).read(range(len(index)))
    return [seed.image for seed in found if isinstance(seed, Seed)]


def test_every_row_of_a_bad_manifest_ends_with_its_reason(tmp_path: Path) -> None:
    expected = write_bad_manifest(tmp_path / "set")
    data = DataConfig(source="manifest", path=str(tmp_path / "set/list.csv"), classes=str(tmp_path / "set.json"))
    index = build_index(data)
    assert reasons(index, data) == expected
    assert index.seed_ids == list(expected)
    assert index.classes.name == tuple(NAMES.values())
    assert sum(index.classes.count) == sum(reason != "bad_label" for reason in expected.values())


def test_rows_lead_to_their_images_with_their_labels(tmp_path: Path) -> None:
    data = manifest(tmp_path / "set", "label,path\ncat,3.png\ndog,1.png\n\ncat,./0.png\n")
    index = build_index(data)
    assert index.seed_ids == ["3.png", "1.png", "./0.png"]
    assert (index.classes.key, index.labels.tolist()) == (("cat", "dog"), [0, 1, 0])
    assert images(data) == [encoded(photo(i)) for i in (3, 1, 0)]


def test_full_paths_and_urls_below_the_folder_are_fine(tmp_path: Path) -> None:
    data = manifest(tmp_path / "set", f"path,label\n{tmp_path}/set/0.png,0\nfile://{tmp_path}/set/1.png,1\n")
    assert images(data) == [encoded(photo(0)), encoded(photo(1))]
    (tmp_path / "set-2").mkdir()
    near = manifest(tmp_path / "set", f"path,label\n{tmp_path}/set-2/0.png,0\n")
    assert [*reasons(build_index(near), near).values()] == ["unsafe_path"]


def test_a_manifest_behind_a_url(tmp_path: Path) -> None:
    text = "path,label\n0.png,0\nmemory://far/1.png,1\nmemory://elsewhere/1.png,1\n../x.png,1\n2.png,1\nno.png,0\n"
    near = manifest(tmp_path / "set", text)
    with in_memory(tmp_path / "set") as url:
        data = near.model_copy(update={"path": f"{url}/list.csv"})
        assert [*reasons(build_index(data), data).values()] == ["", "", "unsafe_path", "unsafe_path", "", "missing"]
        assert images(data) == [encoded(photo(i)) for i in range(3)]


def test_ids_from_a_column(tmp_path: Path) -> None:
    data = manifest(tmp_path, "path,label,key\n0.png,0,a\n1.png,0,a\n2.png,0,\n0.png,0,b\n", id_column="key")
    index = build_index(data)
    assert index.seed_ids == ["a", "a#2", "2.png", "b"]
    assert index.table["fault"].to_pylist() == ["", "duplicate_id", "", ""]


@pytest.mark.parametrize("column", ["image", "path", "file_name"])
def test_the_path_column_has_three_usual_names(tmp_path: Path, column: str) -> None:
    assert images(manifest(tmp_path, f"{column},label\n2.png,0\n")) == [encoded(photo(2))]
    other = manifest(tmp_path, f"{column},where,label\n2.png,1.png,0\n", image_column="where")
    assert images(other) == [encoded(photo(1))]


def test_split_selects_rows(tmp_path: Path) -> None:
    data = manifest(tmp_path, "path,label,split\n0.png,0,train\n1.png,0,val\n2.png,0,train\n3.png,0,\n")
    assert check(data) == []
    with pytest.raises(SeedDataError, match=r"data.split: missing.*'train', 'val'"):
        build_index(data)
    with pytest.raises(SeedDataError, match=r"no row with split 'test'.*'train', 'val'"):
        build_index(data.model_copy(update={"split": "test"}))
    assert build_index(data.model_copy(update={"split": "train"})).seed_ids == ["0.png", "2.png"]
    other = manifest(tmp_path, "path,label,part\n0.png,0,a\n1.png,0,b\n", split="b", split_column="part")
    assert build_index(other).seed_ids == ["1.png"]


def test_parquet_manifest_keeps_types_and_class_names(tmp_path: Path) -> None:
    table = pa.table({"path": ["0.png", "1.png", None], "label": pa.array([1, 0, 1], pa.int8()),
                      "split": ["train"] * 3})
    features = ('{"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}')
    data = manifest(tmp_path, table.replace_schema_metadata({"huggingface": features}), "m.parquet", split="train")
    index = build_index(data)
    assert (index.classes.name, index.labels.tolist()) == (("cat", "dog"), [1, 0, 1])
    assert reasons(index, data) == {"0.png": "", "1.png": "", "m/2": "missing"}
    coded = pa.table({"path": ["0.png", "1.png"], "label": pa.array(["b", "a"]).dictionary_encode()})
    assert build_index(manifest(tmp_path, coded, "m.parquet")).labels.tolist() == [1, 0]


@pytest.mark.parametrize(("text", "fields", "start"), [
    ("path,labels\n0.png,0\n", {}, "data.label_column: no column 'label' in 'list.csv'"),
    ("where,label\n0.png,0\n", {}, "data.image_column: no column 'image'"),
    ("path,label\n0.png,0\n", {"id_column": "key"}, "data.id_column: no column 'key'"),
    ("path,label\n0.png,0\n", {"split": "train"}, "data.split_column: no column 'split'"),
    ("", {}, "data.image_column: no column 'image'"),
    (pa.table({"path": ["0.png"], "label": [0.5]}), {}, "data.label_column: 'label' is double"),
    (pa.table({"path": [b"0.png"], "label": [0]}), {}, "data.image_column: 'path' is binary")])
def test_wrong_columns_are_named_before_listing(tmp_path: Path, text: str | pa.Table, fields: dict[str, str],
                                                start: str) -> None:
    name = "list.csv" if isinstance(text, str) else "list.parquet"
    (problem,) = check(manifest(tmp_path, text, name, **fields))
    assert problem.startswith(start)
    assert "; " in problem


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.csv", b"path,label\n\xff.png,0\n", "is not UTF-8 text"), ("a.parquet", b"PAR1", "cannot be read"),
    ("a.csv", b'path,label\n"' + b"x" * 200_000 + b'",0\n', r"is not CSV \(after line 1"),
    ("none.csv", None, "does not exist"), ("", None, "is a folder")])
def test_what_is_no_manifest(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SeedDataError, match=message):
        build_index(DataConfig(source="manifest", path=str(tmp_path / name)))


@pytest.mark.parametrize(("text", "message"), [
    ("path,label\n0.png,0\n1, 2.png,cat\n", r"line 3 of .* has 3 cells, the header 2; put quotes"),
    ('path,label\n"0\n.png",0\n1.png,cat,dog\n', "line 4 of .* has 3 cells"),
    ("path,label,label\n0.png,0,1\n", "'label' names 2 columns"), ("path,label,path\n0.png,0,1\n", "'path' names 2"),
    ("path,label\r0.png,0\r", "is not CSV")])
def test_csv_whose_cells_do_not_fit_its_header(tmp_path: Path, text: str, message: str) -> None:
    data = manifest(tmp_path, text)
    with pytest.raises(SeedDataError, match=message):
        build_index(data)


def test_a_repeated_column_that_is_not_used_does_no_harm(tmp_path: Path) -> None:
    assert build_index(manifest(tmp_path, "path,label,x,x\n0.png,0,1,2\n1.png,0,1,2,\n")).classes.key == ("0",)
    table = pa.Table.from_arrays([pa.array(["0.png"]), pa.array([0]), pa.array([1])], ["path", "label", "label"])
    with pytest.raises(SeedDataError, match="'label' names 2 columns"):
        build_index(manifest(tmp_path, table, "m.parquet"))


def test_path_with_a_null_character_is_one_refused_row(tmp_path: Path) -> None:
    data = manifest(tmp_path, pa.table({"path": ["0.png", "x\0.png"], "label": [0, 0]}), "m.parquet")
    assert [*reasons(build_index(data), data).values()] == ["", "unsafe_path"]


def test_folder_that_went_away_is_no_row_fault(tmp_path: Path) -> None:
    data = manifest(tmp_path / "set", "path,label\n0.png,0\n")
    reader = SeedReader(build_index(data), data)
    shutil.rmtree(tmp_path / "set")
    with pytest.raises(EnvironmentFault, match="mounted"):
        reader.read([0])
