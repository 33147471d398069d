from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from rayexpand.contract.errors import RowFault, SeedDataError
from rayexpand.contract.schema import Reason, Seed
from rayexpand.data.seeds import DataConfig, SeedReader, build_index, check
from rayexpand.data.seeds.places import Place
from rayexpand.data.seeds.tarscan import BLOCK, DamagedTar, members
from tests.corpus import NAMES, encoded, photo, write_bad_tar, write_tar
from tests.data.seeds.outcomes import in_memory, reasons

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def tars(folder: Path, **fields: object) -> DataConfig:
    return DataConfig(source="webdataset", path=str(folder), **fields)


def shard(file: Path, labels: list[str], start: int = 0) -> DataConfig:
    """A tar of one image per label, keys 000000, 000001, ..."""
    write_tar(file, [member for i, label in enumerate(labels) for member in (
        (f"{start + i:06d}.png", encoded(photo(i))), (f"{start + i:06d}.cls", label.encode()))])
    return tars(file.parent)


# --- samples


def test_every_sample_of_bad_shards_ends_with_its_reason(tmp_path: Path) -> None:
    expected = write_bad_tar(tmp_path / "wds")
    data = tars(tmp_path / "wds", split="train", classes=str(tmp_path / "wds.json"))
    index = build_index(data)
    assert reasons(index, data) == expected
    assert index.seed_ids == list(expected)
    assert index.classes.name == tuple(NAMES.values())
    assert sum(index.classes.count) == sum(reason != "bad_label" for reason in expected.values())
    faults = dict(zip(index.seed_ids, index.table["fault"].to_pylist(), strict=True))
    assert faults == {seed_id: reason if reason != "decode_error" else "" for seed_id, reason in expected.items()}
    assert not list(tmp_path.parent.rglob("evil*"))


def test_images_and_labels_are_the_ones_of_the_sample(tmp_path: Path) -> None:
    write_bad_tar(tmp_path / "wds")
    data = tars(tmp_path / "wds", classes=str(tmp_path / "wds.json"))
    index = build_index(data)
    found = {seed.seed_id: seed for seed in SeedReader(index, data).read(range(len(index))) if isinstance(seed, Seed)}
    want = {"train-000000/000": (photo(0), 0), "train-000001/000": (photo(2), 2), "train-000001/only": (photo(1), 1),
            "train-000001/sp ace": (photo(5), 1), "train-000001/ünïcødé 日本/ñ🐧": (photo(4), 0),
            "train-000001/" + "long/" * 30 + "name": (photo(3), 0)}
    for seed_id, (pixels, label) in want.items():
        assert (found[seed_id].image, found[seed_id].label) == (encoded(pixels), label), seed_id
    assert found["train-000001/mask"].image == encoded(photo(3), "JPEG"), "an exact extension wins over seg.png"


def test_duplicate_says_that_files_of_a_sample_lie_together(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("x.png", encoded(photo())), ("x.cls", b"0"), ("y.png", encoded(photo())),
                                   ("y.cls", b"0"), ("x.json", b'{"label": 0}')])
    data = tars(tmp_path)
    *_, fault = SeedReader(index := build_index(data), data).read(range(3))
    assert index.seed_ids == ["a/x", "a/y", "a/x#2"]
    assert isinstance(fault, RowFault)
    assert "must lie together" in fault.detail


@pytest.mark.parametrize("label", ["cls", "json"])
def test_keys_with_a_dot_collide_and_every_one_is_a_refused_row(tmp_path: Path, label: str) -> None:
    text = {"cls": b"0", "json": b'{"label": 0}'}[label]
    names = [f"bmw_{i:03d}" for i in range(5)] + [f"audi_1.8t_{i:03d}" for i in range(4)]
    write_tar(tmp_path / "a.tar", [member for i, name in enumerate(names) for member in (
        (f"{name}.jpg", encoded(photo(i), "JPEG")), (f"{name}.{label}", text))])
    data = tars(tmp_path)
    found = reasons(index := build_index(data), data)
    assert found == {f"a/bmw_{i:03d}": "" for i in range(5)} | {"a/audi_1": "bad_label"} | {
        f"a/audi_1.8t_{i:03d}": "duplicate_id" for i in (1, 2, 3)}
    assert index.classes.count == (5,)
    fault = SeedReader(index, data).read([6])[0]
    assert isinstance(fault, RowFault)
    assert "first dot" in fault.detail


def test_colliding_samples_beside_a_sound_one(tmp_path: Path) -> None:
    one, two = encoded(photo(0)), encoded(photo(1))
    write_tar(tmp_path / "a.tar", [("d/x.png", one), ("d/x.cls", b"0"), ("d/x.1.png", two), ("d/x.1.cls", b"1")])
    data = tars(tmp_path)
    assert reasons(build_index(data), data) == {"a/d/x": "", "a/d/x.1": "duplicate_id"}


def test_further_files_of_one_sample_are_no_collisions(tmp_path: Path) -> None:
    good = encoded(photo())
    write_tar(tmp_path / "a.tar", [
        ("a.left.png", good), ("a.right.png", good), ("a.cls", b"0"), ("b.png", good), ("b.seg.png", good),
        ("b.seg.json", b"{}"), ("b.json", b'{"label": 0}'), ("c.v1.png", good), ("c.v1.json", b"{}"), ("c.cls", b"0")])
    data = tars(tmp_path)
    assert reasons(build_index(data), data) == {"a/a": "", "a/b": "", "a/c": ""}


@pytest.mark.parametrize(("labels", "keys", "want"), [
    (["2", "0", "1", "oops"], ("0", "1", "2"), [2, 0, 1, 0]),  # one damaged label does not make names of numbers
    (["dog", "cat", "cat"], ("cat", "dog"), [1, 0, 0])])
def test_labels_are_numbers_or_names(tmp_path: Path, labels: list[str], keys: tuple[str, ...], want: list[int]) -> None:
    index = build_index(shard(tmp_path / "s.tar", labels))
    assert index.classes.key == keys
    assert index.labels.tolist() == want
    assert [fault == "bad_label" for fault in index.table["fault"].to_pylist()] == [x == "oops" for x in labels]


def test_class_names_come_from_the_mapping(tmp_path: Path) -> None:
    data = shard(tmp_path / "set/s.tar", ["n02", "n01"])
    (tmp_path / "map.json").write_text(json.dumps({"n01": "tench", "n02": "kite"}))
    assert build_index(data.model_copy(update={"classes": str(tmp_path / "map.json")})).classes.name == ("tench",
                                                                                                          "kite")


def test_label_column_is_the_field_of_the_json(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", [("a.png", encoded(photo())), ("a.json", b'{"label": 7, "species": "emu"}')])
    assert build_index(tars(tmp_path, label_column="species")).classes.key == ("emu",)


def test_json_labels_are_numbers_or_strings(tmp_path: Path) -> None:
    found = {"a": "cat", "b": True, "c": 1.5, "d": None, "e": ["cat"], "f": " dog "}
    write_tar(tmp_path / "s.tar", [member for key, label in found.items() for member in (
        (f"{key}.png", encoded(photo())), (f"{key}.json", json.dumps({"label": label}).encode()))])
    index = build_index(tars(tmp_path))
    assert index.classes.key == ("cat", "dog")
    assert index.table["fault"].to_pylist() == ["", *["bad_label"] * 4, ""]


# --- files


def test_stems_that_repeat_are_told_apart_by_their_folder(tmp_path: Path) -> None:
    for sub in ("a", "b"):
        shard(tmp_path / sub / "0.tar", ["0"])
    data = tars(tmp_path / "*" / "*.tar")
    assert build_index(data).seed_ids == ["a/0/000000", "b/0/000000"]
    assert set(reasons(build_index(data), data).values()) == {""}


def test_folder_file_pattern_and_url_give_the_same_seeds(tmp_path: Path) -> None:
    for number in (1, 0):
        data = shard(tmp_path / f"set/train-{number}.tar", ["0", "1"], start=2 * number)
    shard(tmp_path / "set/val-0.tar", ["0", "1"])
    assert "data.split: missing" in check(data)[0]
    index = build_index(data.model_copy(update={"split": "train"}))
    assert index.seed_ids == [f"train-{i // 2}/{i:06d}" for i in range(4)]
    assert build_index(tars(tmp_path / "set/train-*.tar")).table.equals(index.table)
    assert build_index(tars(tmp_path / "set/train-1.tar")).seed_ids == index.seed_ids[2:]
    with in_memory(tmp_path / "set") as url:
        for far in (DataConfig(source="webdataset", path=url, split="train"),
                    DataConfig(source="webdataset", path=f"{url}/train-*.tar")):
            assert build_index(far).table.equals(index.table)
            near = SeedReader(index, data.model_copy(update={"split": "train"}))
            assert SeedReader(index, far).read(range(4)) == near.read(range(4))


def test_compressed_shards_are_refused_with_the_remedy(tmp_path: Path) -> None:
    data = shard(tmp_path / "a.tar", ["0"])
    packed = gzip.compress((tmp_path / "a.tar").read_bytes())
    (tmp_path / "b.tar.gz").write_bytes(packed)
    (problem,) = check(data)
    assert "1 of 2 tar files are compressed ('b.tar.gz')" in problem
    assert "gunzip" in problem
    (tmp_path / "b.tar.gz").unlink()
    (tmp_path / "a.tar").write_bytes(packed)
    assert "'a.tar' is compressed" in check(data)[0]


@pytest.mark.parametrize(("name", "start"), [
    ("{tmp}/none", "data.path: '{tmp}/none' does not exist"), ("{tmp}/a-{0..9}.tar", "data.path: '{tmp}/a-{0..9}.tar'"),
    ("{tmp}/*.tar", "data.path: no file *.tar in"), ("{tmp}", "data.path: no file *.tar in '{tmp}' (it has 'notes')"),
    ("{tmp}/notes", "data.path: 'notes' is no tar")])
def test_what_is_no_tar_is_a_usage_error(tmp_path: Path, name: str, start: str) -> None:
    (tmp_path / "notes").write_bytes(b"x" * 600)
    (problem,) = check(DataConfig(source="webdataset", path=name.replace("{tmp}", str(tmp_path))))
    assert problem.startswith(start.replace("{tmp}", str(tmp_path)))
    assert "; " in problem


@pytest.mark.parametrize(("damage", "message"), [
    (lambda content: content[:-10240], "cut off"),  # at the end of a member, which tarfile takes for the end
    (lambda content: content[:content.index(b"000001.png") + 100], r"damaged at byte \d+ \(truncated"),
    (lambda content: content.replace(b"000001.png", b"000001.\xff\xff\xff"), r"damaged at byte \d+ \(bad checksum"),
    (lambda content: b"", "cut off")])
def test_damaged_shards_are_named_all_at_once(tmp_path: Path, damage: object, message: str) -> None:
    for number in range(4):
        data = shard(tmp_path / f"{number}.tar", ["0", "1"])
    whole = (tmp_path / "0.tar").read_bytes()
    cut = whole[:whole.rindex(b"000001.cls") + 1024] + bytes(10240)
    for number in (1, 3):
        (tmp_path / f"{number}.tar").write_bytes(damage(cut))  # type: ignore[operator]
    with pytest.raises(SeedDataError, match=rf"2 of 4 tar files cannot be listed: '1.tar' .*{message}.*'3.tar' "):
        build_index(data)


def test_replaced_shard_gives_refused_rows_not_other_images(tmp_path: Path) -> None:
    data = shard(tmp_path / "a.tar", ["0", "1", "0"])
    (tmp_path / "LICENSE").write_text("an empty folder would be a lost mount")
    reader = SeedReader(build_index(data), data)
    write_tar(tmp_path / "a.tar", [("0.txt", b"shifts all"), ("1.png", encoded(photo(9)))])
    found = reader.read(range(3))
    assert {getattr(seed, "reason", "good") for seed in found} == {Reason.UNREADABLE}
    shard(tmp_path / "a.tar", ["0", "1", "0"])
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:whole.index(b"000002.png") + 512 + 40])  # inside the last image
    assert [getattr(seed, "reason", "") for seed in reader.read(range(3))] == ["", "", Reason.UNREADABLE]
    (tmp_path / "a.tar").unlink()
    assert {getattr(seed, "reason", "good") for seed in reader.read(range(3))} == {Reason.MISSING}


def test_listing_reads_headers_and_labels_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "a.tar", [member for i in range(20) for member in (
        (f"{i}.jpg", np.random.Generator(np.random.Philox(key=i)).bytes(100_000)), (f"{i}.cls", b"1" if i else b"0"))])
    read = 0

    class Counting(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            nonlocal read
            read += len(got := super().read(size))
            return got

    monkeypatch.setattr(Place, "open", lambda place: Counting(place.root))
    assert len(build_index(tars(tmp_path))) == 20
    assert 0 < read < 50_000


def test_reading_an_image_is_one_ranged_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard(tmp_path / "set/a.tar", ["0", "1", "0"])
    with in_memory(tmp_path / "set") as url:
        data = DataConfig(source="webdataset", path=url)
        reader, asked = SeedReader(build_index(data), data), []
        original = Place.read_range
        monkeypatch.setattr(Place, "open", None)
        monkeypatch.setattr(Place, "read_range", lambda *args: asked.append(args[1:]) or original(*args))
        assert [seed.image for seed in reader.read([2, 0])] == [  # type: ignore[union-attr]
            encoded(photo(2)), encoded(photo(0))]
    assert [start for start, _ in asked] == sorted(start for start, _ in asked)
    assert len(asked) == 2


def test_offsets_beyond_4_gib(tmp_path: Path) -> None:
    """A sparse file stands for a big one: 5 GiB of something else before the image."""
    header = tarfile.TarInfo("big.bin")
    header.size = 5 << 30
    write_tar(tmp_path / "tail.tar", [("x.png", encoded(photo(3))), ("x.cls", b"0")])
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        file.seek(5 << 30, 1)
        file.write((tmp_path / "tail.tar").read_bytes())
    (tmp_path / "tail.tar").unlink()
    data = tars(tmp_path)
    (seed,) = SeedReader(index := build_index(data), data).read([0])
    assert seed.image == encoded(photo(3))  # type: ignore[union-attr]
    assert index.table["group"][0].as_py() * BLOCK > 5 << 30


# --- headers


@pytest.mark.parametrize("kind", FORMATS)
def test_headers_agree_with_tarfile(tmp_path: Path, kind: int) -> None:
    names = ["a.png", "d/" * 40 + "b.png", "empty.bin", "x" * 95 + ".bin", "folder/"]
    names += ["ünïcødé 🐧.png", "long/" * 60 + "ü.png"] if kind != tarfile.USTAR_FORMAT else []
    write_tar(tmp_path / "a.tar", [*((name, b"" if "empty" in name else name.encode() * 40) for name in names),
                                   ("link.png", "a.png"), ("long link.png", "t/" * 80 if kind else "t")], kind)
    hard = tarfile.TarInfo("hard link.png")  # states the size of its target, and has no content
    hard.type, hard.linkname, hard.size = tarfile.LNKTYPE, "a.png", 5000
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(hard.tobuf(kind) + whole)
    with tarfile.open(tmp_path / "a.tar") as tar, open(tmp_path / "a.tar", "rb") as file:
        want = [(member.name, member.offset_data // BLOCK, member.isreg(), member.size if member.isreg() else 0)
                for member in tar]
        assert [(m.name.rstrip("/"), m.block, m.is_file, m.size if m.is_file else 0) for m in members(file)] == want


def test_joined_tars_and_trailing_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.txt", b"x")])
    joined = b"".join((tmp_path / f"{name}.tar").read_bytes() for name in "ab")
    assert [member.name for member in members(io.BytesIO(joined))] == ["a.txt", "b.txt"]
    assert [member.name for member in members(io.BytesIO(joined + b"junk" * 300))] == ["a.txt", "b.txt"]
    assert list(members(io.BytesIO(bytes(1024)))) == []


@pytest.mark.parametrize("record", [b"999 path=x\n", b"x path=y\n", b"0 path=x\n"])
def test_damaged_pax_records(record: bytes) -> None:
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    content = header.tobuf() + record.ljust(512, b"\0") + tarfile.TarInfo("a.png").tobuf() + bytes(1024)
    with pytest.raises(DamagedTar, match="pax"):
        list(members(io.BytesIO(content)))


def test_names_that_are_not_utf8_keep_their_image(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, content in (("é.png", encoded(photo(1))), ("é.cls", b"0")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    data = tars(tmp_path)
    assert reasons(build_index(data), data) == {"a/\\xe9": ""}


def test_empty_dataset_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("README.md", b"nothing here")])
    with pytest.raises(SeedDataError, match="no class"):
        build_index(tars(tmp_path))
    shutil.rmtree(tmp_path)
