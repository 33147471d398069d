from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayexpand.contract.errors import EnvironmentFault, SeedDataError
from rayexpand.contract.schema import Seed
from rayexpand.data.seeds import DataConfig, SeedReader, build_index, check, npz
from tests.corpus import NAMES, write_bad_npz
from tests.data.seeds.outcomes import in_memory, outcomes, reasons


def arrays(*shape: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=5)).integers(0, 256, shape, dtype=np.uint8)


def archive(file: Path, **content: Any) -> DataConfig:
    np.savez_compressed(file, **content)
    return DataConfig(source="npz", path=str(file), split="train")


@pytest.mark.parametrize(("shape", "mode"), [((5, 12, 10), "L"), ((5, 12, 10, 1), "L"), ((5, 12, 10, 3), "RGB")])
@pytest.mark.parametrize("column", [False, True])
def test_every_pixel_survives(tmp_path: Path, shape: tuple[int, ...], mode: str, column: bool) -> None:
    labels = np.array([0, 1, 2, 1, 0], np.uint8)
    data = archive(tmp_path / "blood.npz", train_images=(images := arrays(*shape)), test_images=images[:1],
                   train_labels=labels[:, None] if column else labels, test_labels=labels[:1])
    index = build_index(data)
    assert index.seed_ids == [f"blood/train/{row}" for row in range(5)]
    assert index.classes.key == ("0", "1", "2")
    order = [3, 0, 4, 1, 2]
    for row, seed in zip(order, SeedReader(index, data).read(order), strict=True):
        assert isinstance(seed, Seed)
        with Image.open(io.BytesIO(seed.image)) as opened:
            assert (opened.format, opened.mode) == ("PNG", mode)
            np.testing.assert_array_equal(np.asarray(opened), images[row].reshape(12, 10, *shape[3:]).squeeze())
        assert seed.label == labels[row]


def test_bad_labels_are_refused_rows(tmp_path: Path) -> None:
    expected = write_bad_npz(tmp_path / "set.npz")
    data = DataConfig(source="npz", path=str(tmp_path / "set.npz"), split="train", classes=str(tmp_path / "set.json"))
    index = build_index(data)
    assert reasons(index, data) == expected
    assert {note for reason, note in outcomes(index, data).values() if not reason} == {"grayscale"}
    assert (index.classes.name, index.classes.count) == (tuple(NAMES.values()), (2, 2, 1))


@pytest.mark.parametrize(("change", "message"), [
    ({"train_images": arrays(3, 8, 8).astype(np.float32)}, "is float32; images are uint8"),
    ({"train_images": arrays(3, 8, 8).astype(np.uint16)}, "is uint16; images are uint8"),
    ({"train_images": arrays(3, 8, 8, 8)}, "has shape"), ({"train_images": arrays(3, 8)}, "has shape"),
    ({"train_images": arrays(4, 8, 8)}, "one integer for each of the 4 images"),
    ({"train_labels": np.zeros((3, 14), int)}, "one integer for each"),
    ({"train_labels": np.zeros(3)}, "is float64"),
    ({"train_labels": np.array([0, 1, {}], object)}, "one integer for each"),
    ({"train_images": np.array([None] * 3, object)}, "is object; images are uint8")])
def test_wrong_arrays_are_usage_errors(tmp_path: Path, change: dict[str, np.ndarray], message: str) -> None:
    data = archive(tmp_path / "a.npz", **({"train_images": arrays(3, 8, 8), "train_labels": np.arange(3)} | change))
    (problem,) = check(data)
    assert message in problem


@pytest.mark.parametrize("split", [None, "validation"])
def test_split_must_be_one_that_is_there(tmp_path: Path, split: str | None) -> None:
    write_bad_npz(tmp_path / "set.npz")
    (problem,) = check(DataConfig(source="npz", path=str(tmp_path / "set.npz"), split=split))
    assert problem.startswith("data.split: ")
    assert "'train', 'val'" in problem


def test_what_is_no_npz(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("x")
    for name, message in (("text.npz", "cannot be read as .npz"), ("none.npz", "does not exist"), ("", "is a folder")):
        (problem,) = check(DataConfig(source="npz", path=str(tmp_path / name), split="train"))
        assert message in problem


def test_listing_loads_no_image_and_reading_loads_them_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bad_npz(tmp_path / "set.npz")
    data = DataConfig(source="npz", path=str(tmp_path / "set.npz"), split="train", classes=str(tmp_path / "set.json"))
    read, original = [], np.lib.format.read_array
    monkeypatch.setattr(np.lib.format, "read_array", lambda *args, **kw: read.append(original(*args, **kw)) or read[-1])
    index = build_index(data)
    assert [array.shape for array in read] == [(7, 1)]
    reader = SeedReader(index, data)
    for _ in range(2):
        reader.read([0, 2, 4])
    assert [array.shape[0] for array in read[1:]] == [7]


def test_behind_a_url(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    data = archive(tmp_path / "set/a.npz", train_images=arrays(3, 8, 8), train_labels=np.arange(3))
    with in_memory(tmp_path / "set") as url:
        far = data.model_copy(update={"path": f"{url}/a.npz"})
        index = build_index(far)
        assert index.table.equals(build_index(data).table)
        assert SeedReader(index, far).read(range(3)) == SeedReader(index, data).read(range(3))


@pytest.mark.parametrize("damage", ["gone", "cut", "bits", "objects", "floats", "fewer"])
def test_damage_after_planning_is_no_row_fault(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "a.npz"
    other = {"objects": np.array([{}] * 50), "floats": np.zeros((50, 16, 16)), "fewer": arrays(9, 16, 16)}
    data = archive(file, train_images=arrays(50, 16, 16), train_labels=np.arange(50) % 2)
    reader, content = SeedReader(build_index(data), data), file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage in other:
        archive(file, train_images=other[damage], train_labels=np.zeros(len(other[damage]), int))
    else:
        file.write_bytes(content[:3000] if damage == "cut" else content[:3000] + b"\xff" * 500 + content[3500:])
    with pytest.raises(EnvironmentFault, match=r"a\.npz"):
        reader.read([40])


@pytest.mark.parametrize("name", ["train_labels", "train_images"])
def test_pickled_arrays_are_never_loaded(tmp_path: Path, name: str) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "loaded",))

    content = {"train_images": arrays(3, 8, 8), "train_labels": np.arange(3), name: np.array([Trap()] * 3, object)}
    archive(tmp_path / "a.npz", **content)
    with npz._opened(DataConfig(source="npz", path=str(tmp_path / "a.npz"))) as opened, \
            pytest.raises(ValueError, match="pickle"):
        npz._array(opened, name)
    assert not (tmp_path / "loaded").exists()


def test_array_in_fortran_order(tmp_path: Path) -> None:
    images = arrays(4, 8, 9)
    data = archive(tmp_path / "a.npz", train_images=np.asfortranarray(images), train_labels=np.arange(4))
    with Image.open(io.BytesIO(SeedReader(build_index(data), data).read([2])[0].image)) as opened:  # type: ignore[union-attr]
        np.testing.assert_array_equal(np.asarray(opened), images[2])


def test_no_images_is_an_error(tmp_path: Path) -> None:
    data = archive(tmp_path / "a.npz", train_images=arrays(0, 8, 8), train_labels=np.zeros(0, int))
    with pytest.raises(SeedDataError, match="no class"):
        build_index(data)
