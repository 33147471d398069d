"""CIFAR-C: arrays by type, severities one after the other, mapped into memory."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayexpand.contract.errors import EnvironmentFault, SeedDataError
from rayexpand.contract.schema import Seed
from rayexpand.data.corruptions.tables import COMMON
from rayexpand.data.seeds import DataConfig, SeedReader, build_index, check, surveyed

LABELS = [7, 3, 0, 3]  # of one severity


def of(folder: Path, split: str | None = None) -> DataConfig:
    return DataConfig(source="cifar_c", path=str(folder), split=split)


def arrays(folder: Path, **changes: Any) -> Path:
    """Every value of an image says its type, severity and number."""
    folder.mkdir(exist_ok=True)
    for number, name in enumerate([*COMMON, "spatter"]):
        values = [10 * number + 2 * severity + 50 * (image % 2) for severity in range(5) for image in range(4)]
        pixels = np.repeat(np.array(values, np.uint8), 32 * 32 * 3).reshape(20, 32, 32, 3)
        np.save(folder / f"{name}.npy", changes.get(name, pixels))
    np.save(folder / "labels.npy", changes.get("labels", np.array(LABELS * 5, np.uint8)))
    return folder


@pytest.mark.parametrize(("split", "rows", "first", "last"), [
    (None, 300, "gaussian_noise/1/0", "jpeg_compression/5/3"), ("fog", 20, "fog/1/0", "fog/5/3"),
    ("3", 60, "gaussian_noise/3/0", "jpeg_compression/3/3"), ("fog/3", 4, "fog/3/0", "fog/3/3"),
    ("spatter/5", 4, "spatter/5/0", "spatter/5/3")])
def test_a_split_is_a_type_a_severity_or_both(tmp_path: Path, split: str | None, rows: int, first: str,
                                              last: str) -> None:
    index = build_index(of(arrays(tmp_path / "c"), split))

    assert (len(index), index.seed_ids[0], index.seed_ids[-1]) == (rows, first, last)
    assert index.classes.key == ("0", "3", "7")
    assert [int(index.classes.key[label]) for label in index.labels[:4]] == LABELS


def test_every_pixel_survives_and_nothing_is_loaded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, original = [], np.load
    monkeypatch.setattr(np, "load", lambda *a, **kw: opened.append(original(*a, **kw)) or opened[-1])
    data = of(arrays(tmp_path / "c"))
    index, survey = surveyed(data)
    order = [299, 0, 184, 5]
    for row, seed in zip(order, SeedReader(index, data).read(order), strict=True):
        assert isinstance(seed, Seed)
        kind, severity, image = seed.seed_id.split("/")
        with Image.open(io.BytesIO(seed.image)) as found:
            expected = 10 * COMMON.index(kind) + 2 * (int(severity) - 1) + 50 * (int(image) % 2)
            assert np.unique(np.asarray(found)).tolist() == [expected], row
    assert {type(one) for one in opened} == {np.memmap}
    assert survey["splits"] == [*COMMON, "1", "2", "3", "4", "5"]


@pytest.mark.parametrize(("change", "split", "message"), [
    ({"fog": np.zeros((20, 32, 32), np.uint8)}, None, r"'fog\.npy' of '.*' is uint8 of shape \(20, 32, 32\)"),
    ({"fog": np.zeros((15, 32, 32, 3), np.uint8)}, "fog", r"expected uint8 \(20, 32, 32, 3\)"),
    ({"fog": np.array([{}])}, "fog", "is no plain array"), ({"labels": np.zeros(7, np.uint8)}, None, "severities"),
    ({}, "fgo", "'fgo' is no part of CIFAR-C"), ({}, "3/4", "no part"), ({}, "6", "no part"),
    ({}, "saturate", r"no file 'saturate\.npy'")])
def test_what_cannot_be_read_is_said(tmp_path: Path, change: dict[str, Any], split: str | None, message: str) -> None:
    with pytest.raises(SeedDataError, match=message):
        raise SeedDataError("\n".join(check(of(arrays(tmp_path / "c", **change), split))))


def test_a_place_that_cannot_be_mapped_and_damage_after_planning(tmp_path: Path) -> None:
    assert "is not local" in check(DataConfig(source="cifar_c", path="memory://far"))[0]
    assert "is a file" in check(of(arrays(tmp_path / "c") / "fog.npy"))[0]
    data = of(tmp_path / "c", "fog")
    reader = SeedReader(build_index(data), data)
    (tmp_path / "c/fog.npy").write_bytes(b"gone")
    with pytest.raises(EnvironmentFault, match=r"fog\.npy"):
        reader.read([3])
