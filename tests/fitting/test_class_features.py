"""Features of classes and images: unnormalised means of drawn images, rows by seed, and `fit` around them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rayexpand.artifacts import store
from rayexpand.artifacts.columns import CLASS_FEATURES, feature_facts, open_image_features, read_class_features
from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.contract.schema import ClassTable, SeedIndex
from rayexpand.data import seeds
from rayexpand.data.batches import resized
from rayexpand.data.seeds import DataConfig
from rayexpand.fitting.class_features import ClassFeaturesFit, drawn, make_class_features, make_image_features
from rayexpand.fitting.config import parse_fit, preflight
from rayexpand.fitting.features import Block
from rayexpand.fitting.fit import fit, fit_for, with_artifacts
from rayexpand.fitting.guide import GuideFit
from rayexpand.models.guides import guide_hash, load_guide
from rayexpand.runs.config import parse
from tests.tiny import tiny_clip

torch.set_num_threads(1)
KEYS = ("ant", "bee", "cat", "dog")


def quiet(*said: object) -> None:
    """Nothing is shown."""


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("tiny") / "clip")


@pytest.fixture
def raw(image_folder: Path, tmp_path: Path, clip: Path) -> dict[str, Any]:
    return {"name": "ants", "out": str(tmp_path / "artifacts"), "guide": {"weights": str(clip)}, "device": "cpu",
            "data": {"source": "imagefolder", "path": str(image_folder)}}


@pytest.fixture
def index(image_folder: Path) -> SeedIndex:
    return seeds.build_index(DataConfig(source="imagefolder", path=str(image_folder)))


def encoded(clip: Path, image_folder: Path) -> np.ndarray:
    """(20, 16): projected, unnormalised, by open_clip itself."""
    pixels = np.stack([np.asarray(Image.open(file)) for file in sorted(image_folder.glob("*/*.png"))])
    guide = load_guide(str(clip), None, KEYS, device="cpu")
    with torch.no_grad():
        x = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - guide.mean) / guide.std
        return np.asarray(guide.model.encode_image(x, normalize=False).numpy())


# ---------------------------------------------------------------------------------------------------------- the numbers


def blocks_of(features_ND: np.ndarray, *parts: list[int], refused: dict[str, str] | None = None) -> Iterator[Block]:
    for rows in parts:
        yield Block(np.array(rows, np.int64), features_ND[rows], refused or {})


def means(tmp_path: Path, index: SeedIndex, blocks: Iterator[Block]) -> np.ndarray:
    make_class_features(tmp_path, [blocks], index, ClassFeaturesFit(images=None), ["0" * 64], quiet)
    return read_class_features(tmp_path, index.classes.key)


def of_two(index: SeedIndex) -> SeedIndex:
    """One class of two images."""
    return SeedIndex(index.table.slice(0, 2), ClassTable.of(["ant"], counts=[2]))


def test_the_mean_is_of_the_features_as_they_are(index: SeedIndex, tmp_path: Path) -> None:
    features = np.array([[1, 3], [3, 5]], np.float32)
    found = means(tmp_path, of_two(index), blocks_of(features, [1], [0]))
    assert found.tolist() == [[2, 4]]

    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    (tmp_path / "units").mkdir()
    wrong = means(tmp_path / "units", of_two(index), blocks_of(units, [0, 1]))
    assert np.abs(wrong - found).max() > 1
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["class_features.safetensors", "features.json"]


def test_images_that_cannot_be_read_are_left_out_and_a_class_of_them_is_refused(index: SeedIndex,
                                                                               tmp_path: Path) -> None:
    features = np.arange(40, dtype=np.float32).reshape(20, 2)
    made = ClassFeaturesFit()
    readable = blocks_of(features, [*range(1, 20)], refused={"ant/0.png": "decode_error"})
    facts = make_class_features(tmp_path, [readable], index, made, ["0" * 64], quiet)
    assert read_class_features(tmp_path, KEYS)[0].tolist() == [5, 6]
    assert (facts["images"], facts["fewest_of_a_class"], facts["refused_examples"]) == (
        19, 4, {"ant/0.png": "decode_error"})
    for rows, message in (([*range(5, 20)], "class 'ant' has no image that can be read, so it has no mean feature"),
                          ([*range(20)], "not finite for 1 of 5 images of class 'dog'")):
        features[19] = np.nan
        with pytest.raises(UsageError, match=message):
            make_class_features(tmp_path, [blocks_of(features, rows)], index, made, ["0" * 64], quiet)
    with pytest.raises(UsageError, match=r"none of the images .* the first: decode_error"):
        make_image_features(tmp_path, [blocks_of(features, [], refused={"ant/0.png": "decode_error"})], index,
                            ["0" * 64], quiet)


def test_images_are_drawn_without_replacement_and_fewer_lie_inside_more(index: SeedIndex) -> None:
    chosen = {k: drawn(index, k, seed=3) for k in (1, 2, 4, 5, 9, None)}
    assert {k: np.bincount(one.labels).tolist() for k, one in chosen.items()} == {
        1: [1] * 4, 2: [2] * 4, 4: [4] * 4, 5: [5] * 4, 9: [5] * 4, None: [5] * 4}
    assert all(len(set(one.seed_ids)) == len(one) for one in chosen.values())
    assert set(chosen[1].seed_ids) < set(chosen[2].seed_ids) < set(chosen[4].seed_ids)
    assert chosen[None].seed_ids == index.seed_ids
    assert drawn(index, 2, seed=4).seed_ids != chosen[2].seed_ids
    assert chosen[2].table.schema.metadata == index.table.schema.metadata, "images are read through it"


def test_images_with_a_known_fault_are_not_drawn(index: SeedIndex) -> None:
    faults = ["missing" if i % 5 < 3 else "" for i in range(20)]
    table = index.table.set_column(index.table.schema.get_field_index("fault"), "fault", [faults])
    assert drawn(SeedIndex(table, index.classes), 2, seed=0).seed_ids == [
        seed_id for i, seed_id in enumerate(index.seed_ids) if i % 5 >= 3]


def test_images_are_cropped_as_clip_does_or_squashed() -> None:
    image = np.zeros((16, 48, 3), np.uint8)
    image[:, 16:32] = 255
    assert resized(image, (8, 8), "crop").min() > 200, "the middle"
    assert 60 < resized(image, (8, 8), "squash").mean() < 110, "all of it"
    np.testing.assert_array_equal(resized(image, (16, 48), "crop"), image)


# ------------------------------------------------------------------------------------------------------------------ fit


def test_fit_makes_class_and_image_features_of_the_guide(raw: dict[str, Any], clip: Path, image_folder: Path,
                                                         index: SeedIndex) -> None:
    both = {"class_features": {"images": 3, "batch": 7}, "image_features": {"batch": 7}}
    made = fit(parse_fit({**raw, "fit": both}), quiet)
    expected = encoded(clip, image_folder)

    features = open_image_features(made["image_features"])
    np.testing.assert_allclose(features.rows(index.seed_ids), expected, atol=2e-3)
    assert np.abs(np.linalg.norm(expected, axis=1) - 1).min() > 0.05, "else nothing is said about their length"
    chosen = [index.seed_ids.index(seed_id) for seed_id in drawn(index, 3, seed=0).seed_ids]
    np.testing.assert_allclose(read_class_features(made["class_features"], KEYS),
                               expected[chosen].reshape(4, 3, 16).mean(axis=1), atol=1e-5)
    facts = feature_facts(made["class_features"], CLASS_FEATURES)
    assert (facts["encoder_sha256"], facts["images_per_class"]) == (guide_hash(str(clip), None), 3)

    again = fit(parse_fit({**raw, "fit": both}), quiet)
    other = fit(parse_fit({**raw, "seed": 1, "fit": both}), quiet)
    assert again == made
    assert other["class_features"] != made["class_features"], "other images are drawn"
    assert other["image_features"] == made["image_features"]
    assert {link.name for link in Path(raw["out"]).iterdir() if link.is_symlink()} == {
        "ants-class_features", "ants-image_features"}


def test_the_mean_of_all_images_does_not_depend_on_the_seed(raw: dict[str, Any], clip: Path,
                                                            image_folder: Path) -> None:
    flat = {"kind": "class_features", "images": None}
    made = [fit(parse_fit({**raw, "seed": seed, "fit": flat}), quiet)["class_features"] for seed in (0, 1)]
    assert made[0] == made[1]
    np.testing.assert_allclose(read_class_features(made[0], KEYS),
                               encoded(clip, image_folder).reshape(4, 5, 16).mean(axis=1), atol=1e-5)


def test_an_unreadable_image_has_no_feature_and_is_named(raw: dict[str, Any], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(raw["data"]["path"], tmp_path / "broken"))
    (broken / "bee/2.png").write_bytes(b"nothing")
    made = fit(parse_fit({**raw, "data": {**raw["data"], "path": str(broken)}, "fit": {"kind": "image_features"}}),
               quiet)["image_features"]
    assert open_image_features(made).missing(["bee/1.png", "bee/2.png"]) == ["bee/2.png"]
    assert list(store.read_facts(made)["refused_examples"]) == ["bee/2.png"]


def test_a_classifier_is_no_encoder(raw: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"fit\.guide: class_features and image_features are those of the CLIP model"):
        fit(parse_fit({**raw, "fit": {"guide": {"kind": "classifier"}, "image_features": {}}}), quiet)
    random = {"kind": "random", "recipe": {"backbone_args": {"width": 4}}}
    folder = fit(parse_fit({**raw, "fit": random}), quiet)["guide"]
    with pytest.raises(ConfigError, match="is a classifier; class_features and image_features need the image tower"):
        fit(parse_fit({**raw, "guide": {"weights": str(folder)}, "fit": {"kind": "class_features"}}), quiet)
    own = {"guide": {"weights": str(folder)}}
    for made, refused in (({"class_features": own}, True), ({"image_features": own}, False), (
            {"image_features": own, "adapter": {"recipe": {"visual_token": "instance"}}}, True)):
        found = preflight(parse_fit({**raw, "fit": made}))
        assert any("is a classifier; features beside a text" in one for one in found) is refused


@pytest.mark.parametrize(("visual_token", "role"), [("class_mean", "class_features"), ("instance", "image_features")])
def test_what_a_run_of_realfake_needs_is_made(raw: dict[str, Any], visual_token: str, role: str) -> None:
    config = parse({"name": "run", "data": raw["data"], "guide": raw["guide"], "prior": {"device": "cpu"},
                    "method": {"name": "realfake", "prompt": "photo of {name}", "visual_token": visual_token}})
    made = fit_for(config, quiet, GuideFit(), out=raw["out"])
    assert list(made) == [role]
    assert with_artifacts(config, made).artifacts[role] == str(made[role])
