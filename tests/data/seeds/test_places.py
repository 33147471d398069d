"""Links, special files, and file systems whose names begin in their own way."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayexpand.contract.errors import SeedDataError
from rayexpand.data.seeds import DataConfig, SeedReader, build_index, check
from rayexpand.data.seeds.places import Place
from tests.corpus import encoded, photo, write_parquet, write_tar
from tests.data.seeds.outcomes import outcomes, reasons


def put(folder: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(photo(i)))
    return folder


def images(folder: Path, **fields: object) -> DataConfig:
    return DataConfig(source="imagefolder", path=str(folder), **fields)


# --- links


def test_linked_class_folder_has_all_its_images(tmp_path: Path) -> None:
    put(tmp_path / "d", "cat/0.png", "cat/1.png")
    put(tmp_path / "elsewhere", "dog/0.png", "dog/deep/1.png", "dog/2.png")
    (tmp_path / "d/dog").symlink_to(tmp_path / "elsewhere/dog")
    data = images(tmp_path / "d")
    index = build_index(data)
    assert (index.classes.key, index.classes.count) == (("cat", "dog"), (2, 3))
    assert reasons(index, data) == dict.fromkeys(["cat/0.png", "cat/1.png", "dog/0.png", "dog/2.png",
                                                  "dog/deep/1.png"], "")
    (tmp_path / "plain").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "plain" / name).mkdir()
        for file in (tmp_path / "d" / name).rglob("*.png"):
            put(tmp_path / "plain", str(file.relative_to(tmp_path / "d")))
    plain = build_index(images(tmp_path / "plain"))
    assert (plain.seed_ids, plain.labels.tolist()) == (index.seed_ids, index.labels.tolist())


def test_linked_split_nested_folder_and_files_are_followed(tmp_path: Path) -> None:
    put(tmp_path / "store", "set/cat/0.png", "blobs/1.png", "more/2.png")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/train").symlink_to(tmp_path / "store/set")
    (tmp_path / "store/set/cat/1.png").symlink_to(tmp_path / "store/blobs/1.png")
    (tmp_path / "store/set/cat/more").symlink_to("../../more")
    data = images(tmp_path / "d", split="train")
    assert reasons(build_index(data), data) == dict.fromkeys(["cat/0.png", "cat/1.png", "cat/more/2.png"], "")


def test_loops_are_entered_once_or_refused(tmp_path: Path) -> None:
    put(tmp_path / "top/d", "cat/0.png", "dog/0.png")
    put(tmp_path / "elsewhere", "1.png")
    for name, target in (("self", "."), ("up", tmp_path / "top"), ("set", tmp_path / "top/d"), ("all", "/"),
                         ("out", tmp_path / "elsewhere")):
        (tmp_path / "top/d/cat" / name).symlink_to(target)
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "top/d/cat")
    data = images(tmp_path / "top/d")
    assert reasons(build_index(data), data) == {
        "cat/0.png": "", "cat/all": "unsafe_path", "cat/out/1.png": "", "cat/up": "unsafe_path", "dog/0.png": ""}


@pytest.mark.parametrize("name", ["dog", "audi_1.8t", "cat/more"])
def test_link_to_a_folder_that_is_gone_is_an_error(tmp_path: Path, name: str) -> None:
    data = images(put(tmp_path / "d", "cat/0.png"))
    (tmp_path / "d" / name).symlink_to(tmp_path / "unmounted")
    with pytest.raises(SeedDataError, match=rf"1 links in .* lead to nothing \('{Path(name).name}'\)"):
        build_index(data)


def test_linked_shards_are_read(tmp_path: Path) -> None:
    write_parquet(tmp_path / "blobs/1", [encoded(photo(0))], pa.array([0]))
    write_tar(tmp_path / "blobs/2", [("a.png", encoded(photo(0))), ("a.cls", b"0")])
    for number, source, name in ((1, "parquet", "a.parquet"), (2, "webdataset", "a.tar")):
        (tmp_path / source).mkdir()
        (tmp_path / source / name).symlink_to(f"../blobs/{number}")
        data = DataConfig(source=source, path=str(tmp_path / source))  # type: ignore[arg-type]
        assert [*reasons(build_index(data), data).values()] == [""]


# --- special files


def test_a_pipe_is_a_refused_row_and_never_waited_for(tmp_path: Path) -> None:
    put(tmp_path, "0.png", "c/0.png", "c/1.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    (tmp_path / "list.csv").write_text("path,label\n0.png,0\npipe.png,0\nlink.png,0\n")
    listed = DataConfig(source="manifest", path=str(tmp_path / "list.csv"))
    index = build_index(listed)
    assert reasons(index, listed) == {"0.png": "", "pipe.png": "unreadable", "link.png": "unreadable"}
    assert "pipe, socket or device" in SeedReader(index, listed).read([1])[0].detail  # type: ignore[union-attr]
    write_parquet(tmp_path / "rows/a.parquet", ["pipe.png", encoded(photo(0))], pa.array([0, 0]))
    os.mkfifo(tmp_path / "rows/pipe.png")
    rows = DataConfig(source="parquet", path=str(tmp_path / "rows"))
    assert [*reasons(build_index(rows), rows).values()] == ["unreadable", ""]
    folder = images(tmp_path)
    index = build_index(folder.model_copy(update={"path": str(put(tmp_path / "set", "c/0.png"))}))
    (tmp_path / "set/c/0.png").unlink()
    os.mkfifo(tmp_path / "set/c/0.png")
    assert [*reasons(index, images(tmp_path / "set")).values()] == ["unreadable"]


@pytest.mark.parametrize(("source", "name"), [("manifest", "m.csv"), ("manifest", "m.parquet"), ("npz", "a.npz"),
                                              ("parquet", "a.parquet"), ("webdataset", "a.tar")])
@pytest.mark.parametrize("device", [False, True])
def test_a_dataset_file_that_is_a_pipe_or_a_device_is_refused_at_once(tmp_path: Path, source: str, name: str,
                                                                      device: bool) -> None:
    (tmp_path / name).symlink_to("/dev/zero") if device else os.mkfifo(tmp_path / name)
    (problem,) = check(DataConfig(source=source, path=str(tmp_path / name), split="train"))  # type: ignore[arg-type]
    assert "pipe, socket or device" in problem
    with pytest.raises(SeedDataError, match="pipe, socket or device"):
        build_index(DataConfig(source=source, path=str(tmp_path / name), split="train"))  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["classes", "ids"])
def test_a_named_file_that_is_a_pipe_is_refused_at_once(tmp_path: Path, field: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (problem,) = check(DataConfig(source="digits", **{field: str(tmp_path / "pipe")}))
    assert problem.startswith(f"data.{field}: ")
    assert "pipe, socket or device" in problem


# --- file systems


def zipped(folder: Path) -> str:
    file = folder.with_suffix(".zip")
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, str(path.relative_to(folder)))
    return str(file)


def test_the_root_of_a_zip_holds_the_same_seeds_as_the_folder(tmp_path: Path) -> None:
    put(tmp_path / "set", "cat/0.png", "cat/deep/1.png", "dog/0.png")
    near = images(tmp_path / "set")
    far = images(Path()).model_copy(update={"path": f"zip://::{zipped(tmp_path / 'set')}"})
    assert build_index(far).table.equals(build_index(near).table)
    assert outcomes(build_index(far), far) == outcomes(build_index(near), near)


def test_every_layout_is_read_from_the_root_of_a_zip(tmp_path: Path) -> None:
    folder = put(tmp_path / "set", "0.png", "1.png")
    (folder / "list.csv").write_text("path,label\n0.png,0\n1.png,1\n")
    pq.write_table(pa.table({"path": ["0.png", "1.png"], "label": [0, 1]}), folder / "list.parquet")
    write_parquet(folder / "rows/train-0.parquet", [encoded(photo(0)), encoded(photo(1))], pa.array([0, 1]))
    os.rename(folder / "rows/train-0.parquet", folder / "train-0.parquet")
    write_tar(folder / "a.tar", [("a.png", encoded(photo(0))), ("a.cls", b"0"), ("b.png", encoded(photo(1))),
                                 ("b.cls", b"1")])
    np.savez(folder / "m.npz", train_images=np.stack([photo(0), photo(1)]), train_labels=np.array([0, 1]))
    (folder / "map.csv").write_text("key,name\n0,cat\n1,dog\n")
    archive = zipped(folder)
    for source, name, split in (("manifest", "list.csv", None), ("manifest", "list.parquet", None),
                                ("parquet", "train-*.parquet", None), ("parquet", "train-0.parquet", None),
                                ("webdataset", "*.tar", None), ("webdataset", "", None), ("npz", "m.npz", "train")):
        data = DataConfig(source=source, path=f"zip://{name}::{archive}", split=split,  # type: ignore[arg-type]
                          classes=f"zip://map.csv::{archive}")
        index = build_index(data)
        assert [*reasons(index, data).values()] == ["", ""], (source, name)
        assert index.classes.name == ("cat", "dog")


def test_what_lies_below_a_folder_whatever_its_names_begin_with() -> None:
    memory = fsspec.filesystem("memory")
    assert Place("", memory).relative("a/0.png") == Place("", memory).relative("/a/0.png") == "a/0.png"
    assert Place("/far", memory).relative("/far/a/0.png") == Place("far", memory).relative("far/a/0.png") == "a/0.png"
    assert Place("/list.csv").parent().at("0.png").root == "/0.png"


def test_folders_at_the_root_of_a_zip_are_entered(tmp_path: Path) -> None:
    folder = put(tmp_path / "set", "train/cat/0.png", "train/dog/1.png", "test/cat/2.png")
    write_parquet(folder / "data/train-0.parquet", [encoded(photo(0)), encoded(photo(1))], pa.array([0, 1]))
    near, archive = images(folder, split="train"), zipped(folder)
    far = near.model_copy(update={"path": f"zip://::{archive}"})
    assert build_index(far).table.equals(build_index(near).table)
    assert outcomes(build_index(far), far) == outcomes(build_index(near), near)
    rows = DataConfig(source="parquet", path=f"zip://::{archive}", split="train")
    assert [*reasons(build_index(rows), rows).values()] == ["", ""]
