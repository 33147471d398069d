"""Captions and features on disk: what is written is read, and files that are not what they say are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from rayexpand.artifacts.columns import (
    CAPTIONS,
    CLASS_FEATURES,
    FILES,
    IMAGE_FEATURES,
    captions_for,
    columns_hash,
    columns_problem,
    feature_facts,
    open_image_features,
    read_captions,
    read_class_features,
    write_captions,
    write_class_features,
    write_image_features,
)
from rayexpand.contract.errors import ModelError

SHA = "ab" * 32
IDS = ["cat/2.png", "ant/1.png", "ü n", "ant/10.png"]
KEYS = ("ant", "bee")


def rows(count: int, width: int = 3) -> np.ndarray:
    return np.arange(count * width, dtype=np.float32).reshape(count, width)


def captions(folder: Path) -> None:
    write_captions(folder, IDS, ["a cat", "", "a “dog”", "an ant "])


def class_features(folder: Path) -> None:
    write_class_features(folder, rows(2), class_keys=KEYS, encoder_sha256=SHA, images_per_class=64)


def image_features(folder: Path) -> None:
    write_image_features(folder, IDS, rows(4), encoder_sha256=SHA)


def read(kind: str, folder: Path) -> object:
    return {CAPTIONS: read_captions, IMAGE_FEATURES: open_image_features,
            CLASS_FEATURES: lambda folder: read_class_features(folder, KEYS)}[kind](folder)  # type: ignore[operator]


def test_captions_follow_seed_ids_and_empty_ones_are_named(tmp_path: Path) -> None:
    captions(tmp_path)
    assert read_captions(tmp_path).to_pylist()[2] == {"seed_id": "ü n", "caption": "a “dog”"}

    found = captions_for(tmp_path, pa.array(["ü n", "gone", "cat/2.png", "ant/1.png"]))
    assert found.to_pylist() == ["a “dog”", None, "a cat", ""]


def test_class_features_are_those_of_the_classes_in_their_order(tmp_path: Path) -> None:
    class_features(tmp_path)
    np.testing.assert_array_equal(read_class_features(tmp_path, KEYS), rows(2))
    assert feature_facts(tmp_path, CLASS_FEATURES) == {
        "kind": CLASS_FEATURES, "encoder_sha256": SHA, "normalised": False, "classes": list(KEYS),
        "images_per_class": 64}
    for others in (KEYS[::-1], ("ant",), ("ant", "bee", "cat")):
        with pytest.raises(ModelError, match="made for other classes than the dataset has"):
            read_class_features(tmp_path, others)


def test_image_features_are_found_by_seed_id_wherever_they_lie(tmp_path: Path) -> None:
    image_features(tmp_path)
    features = open_image_features(tmp_path)
    found = features.rows(["ant/10.png", "filler", "cat/2.png", "cat/2.png", "ü n"])

    assert (len(features), features.dim, features.encoder_sha256) == (4, 3, SHA)
    assert found.dtype == np.float32
    assert found.tolist() == [[9, 10, 11], [0, 0, 0], [0, 1, 2], [0, 1, 2], [6, 7, 8]]
    assert isinstance(features.features_nD, np.memmap), "two gigabytes are not read to take a row"
    assert features.missing(["a", "ant/1.png", "zz"]) == ["a", "zz"]
    with pytest.raises(ModelError, match=r"have none of seed 'ant/3.png': its image could not be read"):
        features.rows(["ant/1.png", "ant/3.png"])


def test_rows_may_be_picked_from_an_array_and_float16_bounds_them(tmp_path: Path) -> None:
    write_image_features(tmp_path, ["b", "a"], rows(5) + 1 / 3, np.array([4, 1]), encoder_sha256=SHA)
    np.testing.assert_allclose(open_image_features(tmp_path).rows(["a", "b"]), (rows(5) + 1 / 3)[[1, 4]], rtol=5e-4)
    for bad in (np.nan, 70_000.0):
        broken = rows(2)
        broken[1, 2] = bad
        with pytest.raises(ModelError, match=r"numbers for seed .y. that"):
            write_image_features(tmp_path, ["x", "y"], broken, encoder_sha256=SHA)


def test_the_hash_is_of_the_content(tmp_path: Path) -> None:
    for number, (kind, write) in enumerate([(CAPTIONS, captions), (CLASS_FEATURES, class_features),
                                            (IMAGE_FEATURES, image_features)]):
        one, two = tmp_path / f"a{number}", tmp_path / f"b{number}"
        for folder in (one, two):
            folder.mkdir()
            write(folder)
        (two / "artifact.json").write_text("{}")
        assert columns_hash(one, kind) == columns_hash(two, kind)
        assert columns_problem(one, kind) == ""
        read(kind, one)
        last = two / FILES[kind][0]
        last.write_bytes(last.read_bytes() + b" ")
        assert columns_hash(one, kind) != columns_hash(two, kind)


def replaced_ids(ids: list[str]) -> Callable[[Path], None]:
    return lambda folder: pq.write_table(pa.table({"seed_id": ids}), folder / "ids.parquet")


def facts(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "features.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return change


def table(**columns: list[str | None]) -> Callable[[Path], None]:
    return lambda folder: pq.write_table(pa.table(columns), folder / "captions.parquet")


def numbers(values: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: save_file({"features": values}, folder / "class_features.safetensors")


@pytest.mark.parametrize(("kind", "damage", "message"), [
    (CAPTIONS, lambda folder: (folder / "captions.parquet").unlink(), "artifacts.captions: .* has no captions.parquet"),
    (CAPTIONS, lambda folder: (folder / "captions.parquet").write_text("x"), "cannot be read"),
    (CAPTIONS, table(seed_id=["a"], text=["b"]), "no column caption"),
    (CAPTIONS, table(seed_id=["a", "a"], caption=["b", "c"]), "there twice"),
    (CAPTIONS, table(seed_id=["a", "b"], caption=["b", None]), "1 empty cells"),
    (CLASS_FEATURES, lambda folder: (folder / "class_features.safetensors").write_bytes(b"x"), "cannot be read"),
    (CLASS_FEATURES, numbers(np.full((2, 3), np.inf, np.float32)), "not finite float32"),
    (CLASS_FEATURES, numbers(rows(2).astype(np.float16)), "not finite float32"),
    (CLASS_FEATURES, numbers(rows(3)), "made for other classes"),
    (CLASS_FEATURES, facts(normalised=True), "of unit length.*make them again with `rayexpand fit`"),
    (CLASS_FEATURES, facts(kind=IMAGE_FEATURES), "does not describe class features"),
    (CLASS_FEATURES, lambda folder: (folder / "features.json").write_text("{"), "cannot be read"),
    (IMAGE_FEATURES, facts(features=4), "features.json 4 features"),
    (IMAGE_FEATURES, facts(encoder_sha256=None), "does not describe image features"),
    (IMAGE_FEATURES, replaced_ids(["a", "b", "c"]), "ids.parquet has 3 seeds"),
    (IMAGE_FEATURES, replaced_ids(["a", "c", "b", "d"]), "not sorted"),
    (IMAGE_FEATURES, replaced_ids(["a", "b", "b", "d"]), "there twice"),
    (IMAGE_FEATURES, lambda folder: np.save(folder / "features.npy", rows(4)), "float32"),
    (IMAGE_FEATURES, lambda folder: np.save(folder / "features.npy", np.array([{}], object)), "cannot be read"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_damaged_files_are_refused_with_a_remedy(tmp_path: Path, kind: str, damage: Callable[[Path], None],
                                                 message: str) -> None:
    {CAPTIONS: captions, CLASS_FEATURES: class_features, IMAGE_FEATURES: image_features}[kind](tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelError, match=message) as error:
        read(kind, tmp_path)
    assert "rayexpand fit" in str(error.value)


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    assert "make it with `rayexpand fit`, kind captions" in columns_problem(tmp_path / "gone", CAPTIONS)
    assert "has no features.npy, ids.parquet, features.json" in columns_problem(tmp_path, IMAGE_FEATURES)
    with pytest.raises(ModelError, match=r"artifacts\.class_features: "):
        columns_hash(tmp_path, CLASS_FEATURES)
