from __future__ import annotations

import errno
import io
import json
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from rayexpand.contract.errors import EnvironmentFault, RowFault, SeedDataError, UsageError
from rayexpand.contract.schema import SEED_INDEX, Reason, SeedIndex
from rayexpand.data.pixels import decode
from rayexpand.data.seeds import DataConfig, SeedReader, build_index, check, digits_split
from rayexpand.data.seeds.places import Place
from tests.commands import ROOT
from tests.corpus import (
    CLASSES,
    encoded,
    odd_images,
    photo,
    spoil,
    write_bad_parquet,
    write_corpus,
    write_parquet,
)
from tests.data.seeds.outcomes import outcomes

CIFAR10 = ROOT.parent / "shared/data/cifar10"


def folder_of(root: Path, classes: dict[str, int], kind: str = "PNG") -> DataConfig:
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i:03d}.png").write_bytes(encoded(photo(i), kind))
    return DataConfig(source="imagefolder", path=str(root))


# --- corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, SeedIndex, dict[str, tuple[str, str]]]:
    folder = tmp_path_factory.mktemp("corpus") / "dataset"
    expected = write_corpus(folder)
    data = DataConfig(source="imagefolder", path=str(folder), split="train")
    index = build_index(data)
    spoil(folder)
    return data, index, expected


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_image_of_the_corpus_ends_as_a_good_one_or_with_its_reason(corpus: Any) -> None:
    data, index, expected = corpus
    found = outcomes(index, data)
    assert found == expected
    by_reason = Counter(reason for reason, _ in found.values())
    assert by_reason.total() == len(index) == len(set(index.seed_ids))
    assert by_reason[""] == len(odd_images()) + 9 + 3 + 6  # odd, healthy (one nested), links, odd names
    assert set(by_reason) == {"", "decode_error", "too_small", "too_large", "unsupported_mode", "missing",
                              "unreadable", "unsafe_path"}


def test_corpus_classes_and_index_layout(corpus: Any) -> None:
    _, index, expected = corpus
    assert index.classes.key == index.classes.name == CLASSES
    counts = Counter(seed_id.split("/")[0] for seed_id in expected)
    assert index.classes.count == tuple(counts[name] for name in CLASSES)
    assert index.table.schema.equals(SEED_INDEX)
    assert index.seed_ids == sorted(expected)
    faults = dict(zip(index.seed_ids, index.table["fault"].to_pylist(), strict=True))
    assert {seed_id: fault for seed_id, fault in faults.items() if fault} == {
        "bad/dangling.png": "missing", "bad/self.png": "missing", "bad/loop": "unsafe_path",
        "bad/pipe.png": "unreadable"}
    assert [CLASSES[label] for label in index.labels] == [seed_id.split("/")[0] for seed_id in index.seed_ids]


def test_order_does_not_follow_the_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder_of(tmp_path, {"b": 12, "a": 12, "c/deep": 3})
    plain, scandir = build_index(data), os.scandir

    class Shuffled:
        def __init__(self, path: Any) -> None:
            with scandir(path) as entries:
                self.entries = random.Random(1).sample(found := list(entries), len(found))

        def __enter__(self) -> Any:
            return iter(self.entries)

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(os, "scandir", Shuffled)
    assert build_index(data).table.equals(plain.table)
    assert plain.seed_ids[0] == "a/000.png"
    assert plain.seed_ids[-1] == "c/deep/002.png"


def test_name_that_is_not_utf8_is_one_refused_row(tmp_path: Path) -> None:
    data = folder_of(tmp_path, {"a": 1})
    try:
        Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"/\xff.png")).write_bytes(encoded(photo()))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert outcomes(build_index(data), data) == {"a/000.png": ("", ""), "a/\\xff.png": ("unreadable", "")}


# --- image folders


def test_empty_class_folders_are_named_all_at_once(tmp_path: Path) -> None:
    data = folder_of(tmp_path, {"a": 1, "b": 0, "c": 1, "d": 0})
    (tmp_path / "d/notes.txt").write_text("x")
    with pytest.raises(SeedDataError, match=r"2 of 4 classes have no image \('b', 'd'\)"):
        build_index(data)


def test_split_folders_are_not_taken_for_classes(tmp_path: Path) -> None:
    folder_of(tmp_path / "train", {"a": 1})
    data = folder_of(tmp_path / "val", {"a": 2})
    data = DataConfig(source="imagefolder", path=str(tmp_path))
    assert check(data)[0].startswith("data.split: missing")
    assert len(build_index(data.model_copy(update={"split": "val"}))) == 2
    assert "it has 'train', 'val'" in check(data.model_copy(update={"split": "test"}))[0]


@pytest.mark.parametrize(("name", "content"), [
    ("map.json", json.dumps({"n01": "tench", "n02": {"name": "kite", "metaclass": "bird", "noun": "kite"}, "n9": "x"})),
    ("map.csv", "\ufeffkey,name,metaclass,noun\r\nn02,kite,bird,kite\r\nn01,tench,,\r\n"),
    ("LOC_synset_mapping.txt", "n01 tench, Tinca tinca\nn02 kite\n\n")])
def test_mapping_files_name_the_classes(tmp_path: Path, name: str, content: str) -> None:
    data = folder_of(tmp_path / "set", {"n02": 1, "n01": 2})
    (tmp_path / name).write_text(content, encoding="utf-8")
    classes = build_index(data.model_copy(update={"classes": str(tmp_path / name)})).classes
    assert (classes.key, classes.name, classes.count) == (("n01", "n02"), ("tench", "kite"), (2, 1))
    assert (classes.metaclass, classes.noun) == ((("", "bird"), ("", "kite")) if "csv" in name or "json" in name
                                                 else (("", ""), ("", "")))


@pytest.mark.parametrize(("name", "content"), [
    ("a.json", "[1]"), ("a.json", '{"n01": 3}'), ("a.json", '{"n01": {"noun": "x"}}'), ("a.csv", "id,title\nn01,x\n"),
    ("a.txt", "n01\n"), ("a.txt", ""), ("a.txt", "\udcff")])
def test_wrong_mapping_files_are_refused(tmp_path: Path, name: str, content: str) -> None:
    data = folder_of(tmp_path / "set", {"n01": 1}).model_copy(update={"classes": str(tmp_path / name)})
    (tmp_path / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    (problem,) = check(data)
    assert problem.startswith(f"data.classes: '{tmp_path / name}'")


@pytest.mark.parametrize(("name", "content"), [
    ("a.json", '{"n01": "tench", "n01": "kite"}'), ("a.csv", "key,name\nn01,tench\nn01,kite\n"),
    ("a.txt", "n01 tench\nn02 emu\nn01 kite\n"), ("a.csv", "key,name\nn01,tench, Tinca tinca\n")])
def test_mapping_files_that_say_two_things_of_a_class_are_refused(tmp_path: Path, name: str, content: str) -> None:
    data = folder_of(tmp_path / "set", {"n01": 1}).model_copy(update={"classes": str(tmp_path / name)})
    (tmp_path / name).write_text(content)
    (problem,) = check(data)
    assert problem.startswith(f"data.classes: '{tmp_path / name}'")
    assert "'n01'" in problem


def test_mapping_without_a_class_is_refused(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "set", {"n01": 1, "n02": 1}).model_copy(update={"classes": str(tmp_path / "a.txt")})
    (tmp_path / "a.txt").write_text("n01 tench\n")
    with pytest.raises(SeedDataError, match=r"1 of 2 classes have no entry \('n02'\)"):
        build_index(data)


# --- subsets


def write_ids(path: Path, ids: list[str]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"seed_id": ids}), path)
    elif path.suffix == ".csv":
        path.write_text("seed_id,why\n" + "".join(f"{name},x\n" for name in ids))
    else:
        path.write_text(json.dumps(ids) if path.suffix == ".json" else "\n".join(ids) + "\n")
    return str(path)


@pytest.mark.parametrize("suffix", ["txt", "csv", "json", "parquet"])
def test_explicit_ids_choose_seeds_in_index_order(tmp_path: Path, suffix: str) -> None:
    data = folder_of(tmp_path / "set", {"a": 3, "b": 3, "c": 3})
    ids = write_ids(tmp_path / f"ids.{suffix}", ["c/001.png", "a/002.png", "c/001.png"])
    index = build_index(data.model_copy(update={"ids": ids}))
    assert index.seed_ids == ["a/002.png", "c/001.png"]
    assert index.classes.key == ("a", "b", "c")
    assert index.classes.count == (1, 0, 1)
    assert SeedReader(index, data).read([1])[0].image == encoded(photo(1))  # type: ignore[union-attr]


def test_unknown_ids_are_counted_and_named(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "set", {"a": 1})
    ids = write_ids(tmp_path / "ids.txt", ["a/000.png"] + [f"x{i}" for i in range(7)])
    with pytest.raises(SeedDataError, match=r"7 of 8 ids .*'x0', 'x1', 'x2', 'x3', 'x4' and 2 more.*'a/000.png'"):
        build_index(data.model_copy(update={"ids": ids}))


def test_per_class_subsets_are_nested_and_keyed(tmp_path: Path) -> None:
    data = folder_of(tmp_path, {"a": 9, "b": 7})
    sets = [set(build_index(data.model_copy(update={"per_class": n})).seed_ids) for n in (1, 2, 5)]
    assert [len(chosen) for chosen in sets] == [2, 4, 10]
    assert sets[0] < sets[1] < sets[2]
    other = set(build_index(data.model_copy(update={"per_class": 5, "subset_seed": 1})).seed_ids)
    assert other != sets[2]
    (tmp_path / "a/added.png").write_bytes(encoded(photo()))  # moves no other choice, but may be chosen itself
    again = set(build_index(data.model_copy(update={"per_class": 5})).seed_ids)
    assert len(again - sets[2]) <= 1
    assert build_index(data.model_copy(update={"per_class": 5})).classes.count == (5, 5)


def test_per_class_takes_sound_seeds_only_and_says_when_there_are_too_few(tmp_path: Path) -> None:
    data = folder_of(tmp_path, {"a": 3, "b": 4})
    (tmp_path / "a/x.png").symlink_to("nowhere.png")
    index = build_index(data.model_copy(update={"per_class": 3}))
    assert "a/x.png" not in index.seed_ids
    with pytest.raises(SeedDataError, match=r"1 classes have fewer sound ones \('a \(3\)'\)"):
        build_index(data.model_copy(update={"per_class": 4}))


def test_an_image_can_be_listed_again_under_ids_of_its_own(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "set", {"a": 2, "b": 2})
    index = build_index(again := data.model_copy(update={"repeats": {"a/001.png": 3}}))

    assert index.seed_ids == ["a/000.png", "a/001.png", "a/001.png~2", "a/001.png~3", "b/000.png", "b/001.png"]
    assert index.classes.count == (4, 2)
    assert len({seed.image for seed in SeedReader(index, again).read([1, 2, 3])}) == 1  # type: ignore[union-attr]
    assert "repeats" not in data.model_dump(mode="json")  # digests of runs made before do not move
    for wrong, said in (({"a/9.png": 2}, "'a/9.png' are no ids"), ({"a/001.png": 0}, "less than once")):
        with pytest.raises(SeedDataError, match=said):
            build_index(data.model_copy(update={"repeats": wrong}))


# --- digits


def test_digits_are_the_seeds_part_with_words_for_names() -> None:
    data = DataConfig(source="digits")
    index = build_index(data)
    images, labels = digits_split(0)["seeds"]
    assert index.classes.name == ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    np.testing.assert_array_equal(index.labels, labels)
    assert sum(index.classes.count) == len(set(index.seed_ids)) == len(images) == 297
    for row, seed in zip((5, 296), SeedReader(index, data).read([5, 296]), strict=True):
        pixels, note = decode(seed.image)  # type: ignore[union-attr]
        np.testing.assert_array_equal(pixels, images[row])
        assert note == ""


def test_a_digit_keeps_its_id_in_every_split() -> None:
    by_id: dict[str, bytes] = {}
    for split in (0, 1):
        data = DataConfig(source="digits", digits_split=split)
        index = build_index(data)
        for seed in SeedReader(index, data).read(range(len(index))):
            assert by_id.setdefault(seed.seed_id, seed.image) == seed.image  # type: ignore[union-attr]
    assert 297 < len(by_id) < 594


# --- parquet


def test_bad_parquet_rows_end_with_their_reason(tmp_path: Path) -> None:
    expected = write_bad_parquet(tmp_path)
    data = DataConfig(source="parquet", path=str(tmp_path / "rows"), split="train", id_column="key")
    index = build_index(data)
    assert index.seed_ids == list(expected)
    assert {seed_id: reason for seed_id, (reason, _) in outcomes(index, data).items()} == expected
    assert index.classes.name == ("cat", "dog")
    assert index.classes.count == (9, 6)  # without the three bad labels
    assert index.labels.min() == 0  # countable: np.bincount takes no -1


def test_parquet_without_label_column_is_one_clear_error(tmp_path: Path) -> None:
    write_bad_parquet(tmp_path)
    data = DataConfig(source="parquet", path=str(tmp_path / "no_label"))
    (problem,) = check(data)
    assert problem.startswith("data.label_column: no column 'label' in 'train-00000-of-00001.parquet'")
    assert "did you mean 'labels'?" in problem
    with pytest.raises(SeedDataError, match="did you mean"):
        build_index(data)
    assert len(build_index(data.model_copy(update={"label_column": "labels"}))) == 1


@pytest.mark.parametrize(("labels", "keys", "want"), [
    (pa.array(["dog", "cat", None, "dog"]), ("cat", "dog"), [1, 0, 0, 1]),
    (pa.array(["dog", "cat", "cat", "dog"]).dictionary_encode(), ("cat", "dog"), [1, 0, 0, 1]),
    (pa.array([1, 0, 1, -1], pa.int8()), ("0", "1"), [1, 0, 1, 0]),
    (pa.array([1, 0, 1, 1], pa.uint16()), ("0", "1"), [1, 0, 1, 1])])
def test_label_types(tmp_path: Path, labels: pa.Array, keys: tuple[str, ...], want: list[int]) -> None:
    write_parquet(tmp_path / "a.parquet", [encoded(photo())] * 4, labels)
    index = build_index(DataConfig(source="parquet", path=str(tmp_path / "a.parquet")))
    assert index.classes.key == keys
    assert index.labels.tolist() == want
    assert index.seed_ids == ["a/0", "a/1", "a/2", "a/3"]


@pytest.mark.parametrize(("labels", "error"), [
    (pa.array([0.5]), "a label is an integer or a string"), (pa.array([""]), "no class; 1 rows have a null"),
    (pa.array([-1]), "no image has a label of the 1 classes; 1 rows")])
def test_labels_that_are_none(tmp_path: Path, labels: pa.Array, error: str) -> None:
    write_parquet(tmp_path / "a.parquet", [encoded(photo())], labels, ["cat"] if labels[0].as_py() == -1 else None)
    with pytest.raises(SeedDataError, match=error):
        build_index(DataConfig(source="parquet", path=str(tmp_path)))


def test_class_of_the_metadata_may_have_no_rows(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [encoded(photo())] * 2, pa.array([0, 0]), ["cat", "dog"])
    data = DataConfig(source="parquet", path=str(tmp_path))
    classes = build_index(data).classes
    assert (classes.key, classes.count) == (("cat", "dog"), (2, 0))
    chosen = build_index(data.model_copy(update={"ids": write_ids(tmp_path / "ids.txt", ["a/1"])}))
    assert chosen.classes.count == (1, 0)


def test_integer_labels_are_named_by_the_mapping(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [encoded(photo())] * 3, pa.array([1, 0, 5]))
    (tmp_path / "names.json").write_text('{"0": "cat", "1": "dog"}')
    data = DataConfig(source="parquet", path=str(tmp_path), classes=str(tmp_path / "names.json"))
    index = build_index(data)
    assert index.classes.name == ("cat", "dog")
    assert index.table["fault"].to_pylist() == ["", "", "bad_label"]


@pytest.mark.parametrize("names", [
    ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], ["data/train-00000-of-00001-0a1b.parquet"],
    ["train/0000.parquet", "train/0001.parquet"], ["train.parquet"]])
def test_split_finds_files(tmp_path: Path, names: list[str]) -> None:
    for name in [*names, *(name.replace("train", "test") for name in names)]:
        write_parquet(tmp_path / name, [encoded(photo())] * 2, pa.array([0, 1]))
    index = build_index(DataConfig(source="parquet", path=str(tmp_path), split="train"))
    assert index.seed_ids == [f"{Path(name).stem}/{row}" for name in names for row in (0, 1)]
    assert json.loads(index.table.schema.metadata[b"files"]) == names
    assert check(DataConfig(source="parquet", path=str(tmp_path)))  # several splits, or none at the top


def test_reader_reads_each_row_group_once_and_keeps_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [encoded(photo(i)) for i in range(9)]
    for part in (0, 1):
        write_parquet(tmp_path / f"train-{part}.parquet", images, pa.array([0] * 9), row_group_size=3)
    data = DataConfig(source="parquet", path=str(tmp_path))
    index, reads = build_index(data), []
    original = pq.ParquetFile.read_row_group

    def counted(file: Any, group: int, **options: Any) -> Any:
        reads.append(group)
        return original(file, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    reader = SeedReader(index, data)
    order = [17, 0, 8, 1, 9, 7, 2]
    found = reader.read(order)
    assert [seed.image for seed in found] == [images[i % 9] for i in order]  # type: ignore[union-attr]
    assert [seed.seed_id for seed in found] == [index.seed_ids[i] for i in order]  # type: ignore[union-attr]
    assert len(reads) == 4
    reader.read([15, 16])  # the group kept from the last call
    assert len(reads) == 4


def test_indexing_reads_no_image_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet", [os.urandom(200_000)] * 20, pa.array([0, 1] * 10), row_group_size=4)
    read = 0

    class Counting(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            nonlocal read
            got = super().read(size)
            read += len(got)
            return got

    monkeypatch.setattr(Place, "open", lambda place: Counting(place.root))
    assert len(build_index(DataConfig(source="parquet", path=str(tmp_path)))) == 20
    assert 0 < read < 200_000


def test_plain_binary_images_and_damaged_row_groups(tmp_path: Path) -> None:
    images = [np.random.Generator(np.random.Philox(key=i)).bytes(3000) for i in range(4)]
    pq.write_table(pa.table({"img": pa.array(images, pa.binary()), "label": [0, 1, 0, 1]}), tmp_path / "a.parquet",
                   row_group_size=2, compression="snappy", use_dictionary=False, write_page_checksum=False)
    data = DataConfig(source="parquet", path=str(tmp_path), image_column="img")
    index = build_index(data)
    assert [seed.image for seed in SeedReader(index, data).read(range(4))] == images  # type: ignore[union-attr]
    raw = bytearray((tmp_path / "a.parquet").read_bytes())
    start = pq.read_metadata(tmp_path / "a.parquet").row_group(1).column(0).data_page_offset
    raw[start:start + 60] = b"\xff" * 60
    (tmp_path / "a.parquet").write_bytes(raw)
    found = SeedReader(index, data).read(range(4))
    assert [getattr(seed, "reason", "") for seed in found] == ["", "", Reason.UNREADABLE, Reason.UNREADABLE]


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="the CIFAR-10 parquet files are not beside this checkout")
def test_real_cifar10() -> None:
    data = DataConfig(source="parquet", path=str(CIFAR10), split="train")
    index = build_index(data)
    assert len(index) == len(set(index.seed_ids)) == 50_000
    assert index.classes.name == ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                                  "truck")
    assert index.classes.count == (5000,) * 10
    assert index.seed_ids[5001] == "train-00001-of-00010/1"
    rows = [0, 49_999, 5001, 17]
    for row, seed in zip(rows, SeedReader(index, data).read(rows), strict=True):
        pixels, note = decode(seed.image)  # type: ignore[union-attr]
        assert (pixels.shape, note, seed.label) == ((32, 32, 3), "", index.labels[row])  # type: ignore[union-attr]


# --- storage


def test_remote_folders_and_parquet_match_local_ones(tmp_path: Path) -> None:
    local = folder_of(tmp_path / "set", {"a": 3, "b/deep": 2})
    (tmp_path / "set/a/.hidden.png").write_bytes(b"")
    write_parquet(tmp_path / "rows/data/train-0.parquet", [encoded(photo(i)) for i in range(4)], pa.array([0, 1, 0, 1]))
    memory = fsspec.filesystem("memory")
    for name in ("set", "rows"):
        memory.put(str(tmp_path / name), f"/remote/{name}", recursive=True)
    rows = DataConfig(source="parquet", path=str(tmp_path / "rows"), split="train")
    try:
        for data, name in ((local, "set"), (rows, "rows")):
            far = data.model_copy(update={"path": f"memory://remote/{name}"})
            index = build_index(far)
            assert index.table.equals(build_index(data).table)
            assert index.classes == build_index(data).classes
            assert SeedReader(index, far).read(range(4)) == SeedReader(index, data).read(range(4))
            url = data.model_copy(update={"path": f"file://{data.path}"})
            assert build_index(url).table.equals(index.table)
        write_parquet(tmp_path / "up/a.parquet", ["../set/a/000.png", "../../x.png"], pa.array([0, 0]))
        memory.put(str(tmp_path / "up"), "/remote/up", recursive=True)
        up = DataConfig(source="parquet", path="memory://remote/up")
        assert [reason for reason, _ in outcomes(build_index(up), up).values()] == ["unsafe_path"] * 2
        memory.rm("/remote/set/a/000.png")
        (fault,) = SeedReader(build_index(local), local.model_copy(update={"path": "memory://remote/set"})).read([0])
        assert isinstance(fault, RowFault)
        assert fault.reason == Reason.MISSING
    finally:
        memory.rm("/remote", recursive=True)


@pytest.mark.parametrize(("error", "remote", "reason"), [
    (FileNotFoundError("x"), False, Reason.MISSING), (FileNotFoundError("x"), True, Reason.MISSING),
    (PermissionError(errno.EACCES, "x"), False, Reason.UNREADABLE), (PermissionError("403"), True, None),
    (IsADirectoryError(errno.EISDIR, "x"), False, Reason.UNREADABLE), (pa.ArrowInvalid("x"), True, Reason.UNREADABLE),
    (OSError("Corrupt snappy compressed data."), False, Reason.UNREADABLE), (OSError(errno.EIO, "x"), False, None),
    (OSError(errno.ESTALE, "x"), False, None), (TimeoutError(errno.ETIMEDOUT, "x"), False, None),
    (TimeoutError(), True, None), (ConnectionResetError(), True, None), (OSError(errno.EBUSY, "503"), True, None),
    (OSError(errno.EMFILE, "x"), False, None), (RuntimeError("client closed"), True, None)])
def test_who_is_to_blame_for_a_failed_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception,
                                           remote: bool, reason: Reason | None) -> None:
    data = folder_of(tmp_path, {"a": 1})
    reader = SeedReader(build_index(data), data)

    def fail(_: object) -> bytes:
        raise error

    monkeypatch.setattr(Place, "read", fail)
    if remote:
        reader._place = Place(reader._place.root, fsspec.filesystem("memory"))
    if reason is None:
        with pytest.raises(EnvironmentFault, match=r"'a/000\.png'"):
            reader.read([0])
    else:
        (fault,) = reader.read([0])
        assert isinstance(fault, RowFault)
        assert fault.reason == reason


def test_dataset_folder_that_went_away_is_no_row_fault(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "set", {"a": 1})
    index = build_index(data)
    reader = SeedReader(index, data)
    (tmp_path / "set").rename(tmp_path / "elsewhere")
    with pytest.raises(EnvironmentFault, match="mounted"):
        reader.read([0])


def test_file_without_read_permission(tmp_path: Path) -> None:
    data = folder_of(tmp_path, {"a": 2})
    (tmp_path / "a/000.png").chmod(0)
    if os.access(tmp_path / "a/000.png", os.R_OK):
        pytest.skip("this user (root?) may read everything")
    assert [reason for reason, _ in outcomes(build_index(data), data).values()] == ["unreadable", ""]


def test_link_made_after_indexing_is_not_followed(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "set", {"a": 1})
    index = build_index(data)
    (tmp_path / "secret.png").write_bytes(encoded(photo()))
    (tmp_path / "set/a/000.png").unlink()
    (tmp_path / "set/a/000.png").symlink_to(tmp_path / "secret.png")
    assert outcomes(index, data) == {"a/000.png": ("unsafe_path", "")}


def test_reader_refuses_the_index_of_another_source(tmp_path: Path) -> None:
    data = folder_of(tmp_path, {"a": 1})
    with pytest.raises(UsageError, match="plan again"):
        SeedReader(build_index(data), DataConfig(source="digits"))


# --- configuration


@pytest.mark.parametrize(("fields", "start"), [
    ({"source": "imagefolder"}, "data.path: missing"), ({"source": "digits", "path": "x"}, "data.path: 'x' has no"),
    ({"source": "imagefolder", "path": "{tmp}/none"}, "data.path: '{tmp}/none' does not exist"),
    ({"source": "imagefolder", "path": "{tmp}/file"}, "data.path: '{tmp}/file' is a file"),
    ({"source": "imagefolder", "path": "{tmp}/file/x"}, "data.path: '{tmp}/file/x' does not exist"),
    ({"source": "imagefolder", "path": "{tmp}/void"}, "data.path: no class folder"),
    ({"source": "parquet", "path": "{tmp}/void"}, "data.path: no file *.parquet"),
    ({"source": "parquet", "path": "{tmp}/file"}, "data.path: 'file' cannot be read"),
    ({"source": "imagefolder", "path": "nosuch://x"}, "data.path: 'nosuch://x' cannot be opened"),
    ({"source": "digits", "ids": "{tmp}/none"}, "data.ids: '{tmp}/none' does not exist"),
    ({"source": "digits", "ids": "{tmp}/void"}, "data.ids: '{tmp}/void' cannot be read"),
    ({"source": "digits", "ids": "{tmp}/empty.json"}, "data.ids: '{tmp}/empty.json' holds no seed ids"),
    ({"source": "digits", "classes": "{tmp}/none"}, "data.classes: '{tmp}/none' does not exist"),
    ({"source": "digits", "id_column": "id"}, "data.id_column: has no effect")])
def test_check_names_field_cause_and_next_step(tmp_path: Path, fields: dict[str, str], start: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "void").mkdir()
    (tmp_path / "empty.json").write_text("[]")
    fill: Callable[[str], str] = lambda text: text.replace("{tmp}", str(tmp_path))  # noqa: E731
    (problem,) = check(DataConfig(**{key: fill(value) for key, value in fields.items()}))
    assert problem.startswith(fill(start))
    assert "; " in problem


def test_all_problems_at_once() -> None:
    data = DataConfig(source="parquet", ids="none.txt", classes="none.json")
    assert [line.split(":")[0] for line in check(data)] == ["data.path", "data.classes", "data.ids"]
    with pytest.raises(SeedDataError, match="3 problem"):
        build_index(data)


def test_config_is_closed_and_described() -> None:
    for wrong in ({"source": "tar"}, {"source": "digits", "shuffle": True}, {"source": "digits", "per_class": 0},
                  {"source": "digits", "max_pixels": 10**9}):
        with pytest.raises(ValidationError):
            DataConfig(**wrong)
    assert all(field.description for field in DataConfig.model_fields.values())


def test_what_only_the_digits_have_is_refused_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    data = DataConfig(source="imagefolder", path=str(tmp_path), digits_split=3, digits_background="all")
    assert [one.partition(";")[0] for one in check(data)] == [
        f"data.{name}: has no effect on source 'imagefolder', only the digits have it"
        for name in ("digits_split", "digits_background")]
    assert check(DataConfig(source="digits", digits_split=3, digits_background="all")) == []
