"""What `validate` says of a dataset: sizes of classes, splits, what was skipped, faults."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayexpand import api
from rayexpand.contract.errors import SeedDataError
from rayexpand.data.seeds import DataConfig, SeedReader, build_index, survey
from rayexpand.data.seeds.listing import EXTENSIONS
from tests.corpus import encoded, modern_images, photo, write_parquet, write_tar
from tests.data.seeds.outcomes import in_memory, outcomes


def put(folder: Path, names: list[str], content: bytes = b"x") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def mixed(folder: Path) -> DataConfig:
    put(folder, ["a/0.png", "a/1.PNG", "b/0.png"], encoded(photo()))
    put(folder, [*(f"a/{i}.heic" for i in range(5)), "b/deep/notes.txt", "b/LICENSE", "top.csv", ".hidden", "b/.x"])
    return DataConfig(source="imagefolder", path=str(folder))


def test_skipped_files_are_counted_by_suffix(tmp_path: Path) -> None:
    data = mixed(tmp_path / "set")
    found = survey(data)
    assert found == {
        "seeds": 3, "classes": 2, "largest_classes": {"a": 2, "b": 1}, "skipped": {
            ".heic": {"files": 5, "examples": ["a/0.heic", "a/1.heic", "a/2.heic"]},
            ".txt": {"files": 1, "examples": ["b/deep/notes.txt"]},
            "no suffix": {"files": 1, "examples": ["b/LICENSE"]}, ".csv": {"files": 1, "examples": ["top.csv"]}}}
    with in_memory(tmp_path / "set") as url:
        assert survey(data.model_copy(update={"path": url})) == found


def test_hidden_images_are_counted(tmp_path: Path) -> None:
    put(tmp_path / "set", ["a/0.png", "a/.0.png", "a/.cache/deep/1.JPG", ".old/2.png", ".3.png", "a/.hidden",
                           "a/.x.txt"], encoded(photo()))
    data = DataConfig(source="imagefolder", path=str(tmp_path / "set"))
    found = survey(data)
    assert found["skipped"] == {"hidden .png": {"files": 3, "examples": [".3.png", ".old/2.png", "a/.0.png"]},
                                "hidden .jpg": {"files": 1, "examples": ["a/.cache/deep/1.JPG"]}}
    with in_memory(tmp_path / "set") as url:
        assert survey(data.model_copy(update={"path": url})) == found
    write_tar(tmp_path / "tars/s.tar", [("./a.png", encoded(photo())), ("./a.cls", b"0"), (".b.png", b"x"),
                                        ("d/.c.png", b"x"), ("./LICENSE", b"x"), (".hidden", b"x"), (".d/e.png", b"x")])
    found = survey(DataConfig(source="webdataset", path=str(tmp_path / "tars")))
    assert {suffix: one["files"] for suffix, one in found["skipped"].items()} == {"hidden .png": 2, "no suffix": 1}
    assert found["seeds"] == 2


def test_a_folder_of_unknown_files_says_which(tmp_path: Path) -> None:
    put(tmp_path, ["a/0.heic", "a/1.heic"])
    with pytest.raises(SeedDataError, match=r"were skipped: 2 \.heic \('a/0\.heic', 'a/1\.heic'\)"):
        build_index(DataConfig(source="imagefolder", path=str(tmp_path)))


@pytest.mark.parametrize("name", modern_images())
def test_every_format_that_pillow_opens_safely_is_an_image(tmp_path: Path, name: str) -> None:
    content, note = modern_images()[name]
    put(tmp_path, [f"set/a/{name}"], content)
    folder = DataConfig(source="imagefolder", path=str(tmp_path / "set"))
    assert outcomes(build_index(folder), folder) == {f"a/{name}": ("", note)}
    write_tar(tmp_path / "tars/s.tar", [(name, content), (f"{name.split('.')[0]}.cls", b"0")])
    tars = DataConfig(source="webdataset", path=str(tmp_path / "tars"))
    assert [*outcomes(build_index(tars), tars).values()] == [("", note)]
    assert f".{name.split('.')[1]}" in EXTENSIONS


def test_the_common_format_of_a_sample_stays_its_image(tmp_path: Path) -> None:
    mask, image = encoded(255 - photo(), "PPM"), encoded(photo())
    write_tar(tmp_path / "s.tar", [("a.ppm", mask), ("a.png", image), ("a.cls", b"0"), ("b.ppm", mask),
                                   ("b.left.png", image), ("b.cls", b"0")])
    data = DataConfig(source="webdataset", path=str(tmp_path))
    found = SeedReader(build_index(data), data).read([0, 1])
    assert [seed.image for seed in found] == [image, image]  # type: ignore[union-attr]
    assert survey(data)["skipped"] == {".ppm": {"files": 2, "examples": ["s.tar/a.ppm", "s.tar/b.ppm"]}}


def test_skipped_members_and_files_beside_shards(tmp_path: Path) -> None:
    image = encoded(photo())
    write_tar(tmp_path / "train-0.tar", [
        ("README.md", b"x"), ("LICENSE", b"x"), ("a.png", image), ("a.txt", b"a caption"), ("a.cls", b"0"),
        ("b.left.png", image), ("b.right.png", image), ("b.cls", b"0"), ("c.heic", b"x"),
        ("d.1.png", image), ("d.1.cls", b"0"), ("d.2.png", image), ("d.2.cls", b"0")])
    write_tar(tmp_path / "val-0.tar", [("a.png", image), ("a.cls", b"0")])
    put(tmp_path, ["index.json"])
    found = survey(DataConfig(source="webdataset", path=str(tmp_path), split="train"))
    assert found["splits"] == ["train", "val"]
    assert found["skipped"] == {
        ".json": {"files": 1, "examples": ["index.json"]},
        "no suffix": {"files": 1, "examples": ["train-0.tar/LICENSE"]},
        ".md": {"files": 1, "examples": ["train-0.tar/README.md"]},
        ".heic": {"files": 1, "examples": ["train-0.tar/c.heic"]},
        ".png": {"files": 1, "examples": ["train-0.tar/b.right.png"]}}
    assert found["faults"] == {"bad_label": 1, "duplicate_id": 1}


def test_largest_and_smallest_classes(tmp_path: Path) -> None:
    labels = [f"{label:02d}" for label in range(25) for _ in range(25 - label)]
    write_parquet(tmp_path / "a.parquet", [encoded(photo())] * len(labels), pa.array(labels))
    found = survey(DataConfig(source="parquet", path=str(tmp_path)))
    assert found["classes"] == 25
    assert found["largest_classes"] == {f"{label:02d}": 25 - label for label in range(10)}
    assert found["smallest_classes"] == {f"{label:02d}": 25 - label for label in range(15, 25)}


def test_splits_that_are_there(tmp_path: Path) -> None:
    put(tmp_path / "folder", ["train/a/0.png", "val/a/0.png"], encoded(photo()))
    (tmp_path / "list.csv").write_text("path,label,split\n0.png,0,train\n1.png,0,test\n")
    arrays = {f"{split}_{part}": array for split in ("train", "val") for part, array in (
        ("images", photo()[None]), ("labels", np.zeros(1, np.int64)))}
    np.savez(tmp_path / "a.npz", **arrays)
    for source, path, there in (("imagefolder", "folder", ["train", "val"]), ("npz", "a.npz", ["train", "val"]),
                                ("manifest", "list.csv", ["test", "train"])):
        found = survey(DataConfig(source=source, path=str(tmp_path / path), split="train"))  # type: ignore[arg-type]
        assert found["splits"] == there


def test_validate_shows_it_in_words(tmp_path: Path) -> None:
    data = mixed(tmp_path / "set")
    (tmp_path / "set/a/gone.png").symlink_to("nowhere.png")
    found = api.validate({"name": "x", "out": str(tmp_path), "data": data.model_dump(exclude_defaults=True),
                          "method": {"name": "classical"}})
    rows = dict(row[:2] for row in found.table()[1])
    assert rows["largest classes"] == "a (3), b (1)"
    assert rows["faults"] == "missing 1"
    assert rows["skipped"].startswith(".heic files 5, examples a/0.heic, a/1.heic, a/2.heic, .csv files 1")
