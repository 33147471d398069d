from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayexpand.contract.errors import EnvironmentFault, SeedDataError
from rayexpand.contract.schema import Seed
from rayexpand.data.seeds import DataConfig, SeedReader, build_index, check, surveyed
from tests.data.published.official import batch, cifar10, cifar100, dump
from tests.data.seeds.outcomes import in_memory, reasons


def of(folder: Path, split: str | None = "train") -> DataConfig:
    return DataConfig(source="cifar", path=str(folder), split=split)


def test_every_pixel_survives(tmp_path: Path) -> None:
    cifar10(tmp_path)
    index, survey = surveyed(data := of(tmp_path))
    assert index.seed_ids[:4] == ["data_batch_1/0", "data_batch_1/1", "data_batch_1/2", "data_batch_2/0"]
    assert index.classes.key == ("airplane", "bird", "truck")
    assert survey["splits"] == ["train", "test"]
    order = [14, 0, 7]
    for row, seed in zip(order, SeedReader(index, data).read(order), strict=True):
        assert isinstance(seed, Seed)
        name, _, offset = index.seed_ids[row].partition("/")
        stored = pickle.loads((tmp_path / name).read_bytes())
        pixels = stored["data"][int(offset)].reshape(3, 32, 32).transpose(1, 2, 0)
        with Image.open(io.BytesIO(seed.image)) as image:
            np.testing.assert_array_equal(np.asarray(image), pixels)
        assert seed.label == stored["labels"][int(offset)]


def test_it_is_read_wherever_it_lies(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    cifar100(tmp_path / "set")
    here = build_index(of(tmp_path / "set", "test"))
    with in_memory(tmp_path / "set") as url:
        data = DataConfig(source="cifar", path=url, split="test")
        far = build_index(data)
        assert far.table.equals(here.table)
        assert [*reasons(far, data).values()] == ["", ""]


def test_labels_that_no_class_has_are_refused_rows(tmp_path: Path) -> None:
    cifar100(tmp_path)
    dump(tmp_path / "test", batch([0, 7, -1, 1], "fine_labels", 9))
    assert [*reasons(build_index(data := of(tmp_path, "test")), data).values()] == ["", "bad_label", "bad_label", ""]


@pytest.mark.parametrize(("change", "message"), [
    ({"data": np.zeros((2, 3072), np.int16)}, "no images, an array 'data' of uint8"),
    ({"data": np.zeros((2, 3071), np.uint8)}, "no images"), ({"data": [1, 2]}, "no images"),
    ({"fine_labels": [1]}, "one number for each of its 2 images"), ({"fine_labels": ["a", "b"]}, "one number for each"),
    ({"fine_labels": {1, 2}}, "is no pickle of plain values")])
def test_what_is_no_batch_is_an_error(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    cifar100(tmp_path)
    dump(tmp_path / "test", {**batch([0, 1], "fine_labels", 0), **change})
    with pytest.raises(SeedDataError, match=message):
        build_index(of(tmp_path, "test"))


def test_a_malicious_batch_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'mark'}",)

    cifar10(tmp_path)
    for name in ("batches.meta", "data_batch_4"):
        content = (tmp_path / name).read_bytes()
        dump(tmp_path / name, {"data": Evil()})
        with pytest.raises(SeedDataError, match=rf"'{name}' .*\(it asks for posix.system\).* nothing in it was run"):
            build_index(of(tmp_path))
        (tmp_path / name).write_bytes(content)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(("split", "message"), [
    (None, "data.split: missing, choose one of the splits"), ("val", "data.split: no 'val' in .*'train', 'test'")])
def test_the_split_must_be_one_of_two(tmp_path: Path, split: str | None, message: str) -> None:
    cifar10(tmp_path)
    with pytest.raises(SeedDataError, match=message):
        build_index(of(tmp_path, split))


def test_what_is_no_folder_of_batches(tmp_path: Path) -> None:
    cifar10(tmp_path)
    (tmp_path / "data_batch_5").unlink()
    (tmp_path / "empty").mkdir()
    for path, said in ((tmp_path, "no file 'data_batch_5'"), (tmp_path / "test_batch", "is a file"),
                       (tmp_path / "empty", "has neither 'batches.meta'"), (tmp_path / "none", "does not exist")):
        (problem,) = check(of(path))
        assert said in problem


def test_a_batch_that_is_lost_later_blames_no_row(tmp_path: Path) -> None:
    cifar10(tmp_path)
    index = build_index(data := of(tmp_path))
    reader = SeedReader(index, data)
    dump(tmp_path / "data_batch_1", batch([0], "labels", 0))
    with pytest.raises(EnvironmentFault, match="has 1 images, fewer than when it was listed"):
        reader.read([2])
    (tmp_path / "data_batch_2").write_bytes(b"x")
    with pytest.raises(EnvironmentFault, match="'data_batch_2'"):
        reader.read([3])
