from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayexpand.classifier import augment, transforms
from rayexpand.classifier.recipe import Recipe, gridmask_probability
from rayexpand.classifier.transforms import augmix_views, train_transform
from rayexpand.contract.errors import UsageError
from rayexpand.contract.rng import generator, row_key

POLICY = {"augment": "timm", "timm_augment": "rand-m7-mstd0.5-inc1"}
KINDS: dict[str, dict[str, Any]] = {
    "shift": {}, "pad": {"crop": "pad", "crop_pad": 4, "hflip": 0.5},
    "square_pad": {"crop": "square_pad", "resize": 40, "crop_pad": 2, "rotation": 15},
    "resized": {"crop": "resized", "rotation": 10}, "jitter": {"colour_jitter": 0.4}, "erasing": {"erasing": 1.0},
    "randaugment": {"augment": "randaugment"}, "autoaugment": {"augment": "autoaugment"}, "timm": POLICY,
    "augmix": {"augment": "timm", "timm_augment": "augmix-m3-w3"}, "own augmix": {"augment": "augmix"},
    "gridmask": {"gridmask": 0.8},
    "auto": {"augment": "timm", "timm_augment": "original-mstd0.5"}}


def recipe(**fields: Any) -> Recipe:
    return Recipe(**{"size": 32, **fields})


def rng(key: int = 0) -> np.random.Generator:
    return generator(row_key(key, "test", "", 0, 0, "transform"))


def photo(height: int = 32, width: int = 32) -> np.ndarray:
    """uint8 (H, W, 3): red holds the row, green the column, blue a texture; no zero and no two equal pixels."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([1 + y, 1 + x, 50 + (7 * y + 11 * x) % 150], -1).astype(np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_a_function_of_its_key(kind: str) -> None:
    chosen = recipe(**KINDS[kind])
    image = photo(48, 37) if chosen.crop != "shift" else photo()
    before = image.copy()

    made = [[train_transform(image, rng(key), chosen) for key in range(6)] for _ in range(2)]

    assert all(one.shape == (32, 32, 3) and one.dtype == np.uint8 for one in made[0])
    np.testing.assert_array_equal(made[0], made[1])
    assert len({one.tobytes() for one in made[0]}) > 3
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("fields", [
    {"crop": "none"}, {"crop": "shift", "crop_pad": 0}, {"crop": "pad", "crop_pad": 0},
    {"crop": "square_pad", "resize": 32, "crop_pad": 0}, {"crop": "none", "hflip": 0.0, "rotation": 0.0}])
def test_settings_that_do_nothing_change_no_byte(fields: dict[str, Any]) -> None:
    image = photo()
    for key in range(5):
        np.testing.assert_array_equal(train_transform(image, rng(key), recipe(**fields)), image)
    np.testing.assert_array_equal(transforms.test_transform(image, recipe(**fields)), image)


@pytest.mark.parametrize(("fields", "how"), [({}, Image.Resampling.BICUBIC),
                                             ({"filter": "bilinear"}, Image.Resampling.BILINEAR)])
def test_resizing_is_by_the_filter_of_the_recipe(fields: dict[str, Any], how: Image.Resampling) -> None:
    image = generator(row_key(0, "test", "", 0, 0, "noise")).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    wanted = np.asarray(Image.fromarray(image).resize((32, 32), how))
    whole = recipe(crop="resized", crop_scale=(1.0, 1.0), **fields)

    np.testing.assert_array_equal(transforms.test_transform(image, recipe(crop="none", **fields)), wanted)
    np.testing.assert_array_equal(train_transform(image, rng(), recipe(crop="none", **fields)), wanted)
    square = np.ascontiguousarray(image[:, 10:60])
    resized = np.asarray(Image.fromarray(square).resize((32, 32), how))
    assert any(np.array_equal(train_transform(square, rng(key), whole), resized) for key in range(200))


def test_bilinear_is_what_torchvision_does_by_default() -> None:
    from torchvision import transforms as theirs

    image = generator(row_key(0, "test", "", 0, 0, "noise")).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    ours = transforms.test_transform(image, Recipe(size=224, crop="square_pad", resize=256, filter="bilinear"))
    found = theirs.Compose([theirs.Resize((256, 256)), theirs.CenterCrop(224)])(Image.fromarray(image))

    np.testing.assert_array_equal(ours, np.asarray(found))


def test_a_shift_repeats_the_edges_and_reaches_every_offset() -> None:
    image, chosen = photo(), recipe(crop="shift", crop_pad=2)
    seen = set()
    for key in range(400):
        made = train_transform(image, rng(key), chosen)
        dy, dx = int(made[16, 16, 0]) - 17, int(made[16, 16, 1]) - 17
        seen.add((dy, dx))
        rows, columns = np.clip(np.arange(32) + dy, 0, 31), np.clip(np.arange(32) + dx, 0, 31)
        np.testing.assert_array_equal(made, image[rows][:, columns])
    assert seen == {(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)}


@pytest.mark.parametrize(("fields", "offsets"), [
    ({"size": 32, "crop": "pad", "crop_pad": 4}, range(-4, 5)),
    ({"size": 24, "crop": "square_pad", "resize": 32, "crop_pad": 8}, range(-8, 17)),  # Diff-Mix: padding 8 around 32
    ({"size": 28, "crop": "square_pad", "resize": 32, "crop_pad": 0}, range(5))])  # DistDiff: 224 of 256, as 28 of 32
def test_a_padded_crop_is_black_outside_and_reaches_every_offset(fields: dict[str, Any], offsets: range) -> None:
    image, size = photo(), fields["size"]
    seen: set[int] = set()
    for key in range(600):
        made = train_transform(image, rng(key), Recipe(**fields))
        assert made.shape == (size, size, 3)
        y, x = (int(i[0]) for i in np.nonzero(made[:, :, 0]))
        top, left = int(made[y, x, 0]) - 1 - y, int(made[y, x, 1]) - 1 - x
        expected = np.zeros((size, size, 3), np.uint8)
        y0, x0 = max(top, 0), max(left, 0)
        inside = image[y0:top + size, x0:left + size]
        expected[y0 - top:y0 - top + inside.shape[0], x0 - left:x0 - left + inside.shape[1]] = inside
        np.testing.assert_array_equal(made, expected)
        seen |= {top, left}
    assert seen == set(offsets)


@pytest.mark.parametrize(("resize", "size", "pad"), [(256, 224, 8), (440, 384, 8), (512, 448, 8), (256, 224, 0)])
def test_published_square_crops_ignore_the_aspect(resize: int, size: int, pad: int) -> None:
    chosen = Recipe(size=size, crop="square_pad", resize=resize, crop_pad=pad, rotation=15 if pad == 0 else 0, hflip=.5)
    image = np.full((300, 600, 3), 200, np.uint8)
    image[:, :300] = 40  # the left half is dark, whatever the aspect

    made = transforms.test_transform(image, chosen)

    assert made.shape == (size, size, 3)
    assert abs(int((made[size // 2, :, 0] < 120).sum()) - size // 2) <= 1
    assert train_transform(image, rng(), chosen).shape == (size, size, 3)


def test_rotation_comes_before_the_crop_and_stays_within_its_bound() -> None:
    """A rotation about the centre of the resized image, so the corners that a crop keeps may be black."""
    chosen = Recipe(size=64, crop="square_pad", resize=64, crop_pad=0, rotation=15)
    line = np.zeros((64, 64, 3), np.uint8)
    line[31:33] = 255
    slopes = []
    for key in range(300):
        made = train_transform(line, rng(key), chosen)[:, :, 0].astype(float)
        heights = [np.average(np.arange(64), weights=made[:, x]) for x in (12, 51)]
        slopes.append(np.degrees(np.arctan((heights[1] - heights[0]) / 39)))
    assert 13 < max(slopes) < 16.5
    assert -16.5 < min(slopes) < -13
    assert abs(np.mean(slopes)) < 1.5


def test_tests_take_the_middle_of_the_resized_image() -> None:
    image = photo(40, 80)

    kept = transforms.test_transform(image, recipe(crop="resized", resize=40, test_size=32))
    squared = transforms.test_transform(image, recipe(crop="square_pad", resize=40, test_size=32))

    np.testing.assert_array_equal(kept, image[4:36, 24:56])
    assert squared[16, 16, 1] in range(38, 44)
    assert squared[0, 31, 1] - squared[0, 0, 1] in range(60, 65)  # 31 of 40 columns cover 62 of 80
    assert transforms.test_transform(photo(20, 60), recipe(test_size=48)).shape == (48, 48, 3)
    assert transforms.test_transform(photo(235, 300), Recipe(size=224, crop="resized", resize=235)).shape[:2] \
        == (224, 224)


def test_flips_happen_at_their_rate() -> None:
    image = photo()
    flipped = [bool(train_transform(image, rng(key), recipe(crop="none", hflip=0.3))[0, 0, 1] != 1)
               for key in range(3000)]
    assert abs(np.mean(flipped) - 0.3) < 3 * np.sqrt(0.3 * 0.7 / 3000)
    np.testing.assert_array_equal(train_transform(image, rng(), recipe(crop="none", hflip=1.0)), image[:, ::-1])


def test_a_resized_crop_takes_its_share_of_the_area() -> None:
    image, shares, aspects = photo(120, 120), [], []
    for key in range(500):
        made = train_transform(image, rng(key), Recipe(size=96, crop="resized", crop_scale=(0.25, 0.64))).astype(float)
        tall = (made[90, 48, 0] - made[6, 48, 0]) / 84 * 96
        wide = (made[48, 90, 1] - made[48, 6, 1]) / 84 * 96
        shares.append(tall * wide / 120**2)
        aspects.append(wide / tall)
    assert min(shares) > 0.22
    assert max(shares) < 0.68
    assert abs(np.mean(shares) - 0.445) < 0.02
    assert min(aspects) > 0.7
    assert max(aspects) < 1.4


def test_an_image_too_long_for_the_crop_gives_its_middle() -> None:
    image = photo(10, 200)
    made = train_transform(image, rng(), Recipe(size=16, crop="resized", crop_scale=(1.0, 1.0)))
    assert made.shape == (16, 16, 3)
    assert abs(float(made[:, :, 1].mean()) - 100.5) < 2


def test_erasing_puts_the_mean_colour_in_a_rectangle() -> None:
    chosen = recipe(crop="none", erasing=0.5, mean=(0.485, 0.456, 0.406))
    areas = []
    for key in range(1000):
        image = photo()
        made = train_transform(image, rng(key), chosen)
        changed = (made != photo()).any(-1)
        assert np.array_equal(image, photo())
        areas.append(changed.mean())
        if changed.any():
            np.testing.assert_array_equal(made[changed], np.tile([124, 116, 104], (changed.sum(), 1)))
            rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
            assert changed.sum() >= 0.9 * (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    assert abs(np.mean(np.array(areas) > 0) - 0.5) < 0.05
    assert max(areas) < 0.36


def test_jitter_stays_within_its_factor() -> None:
    grey = np.full((32, 32, 3), 100, np.uint8)  # contrast and saturation leave a grey image alone
    values = [int(train_transform(grey, rng(key), recipe(crop="none", colour_jitter=0.4))[0, 0, 0])
              for key in range(300)]
    assert 59 <= min(values) < 65
    assert 135 < max(values) <= 140


def test_timm_policies_leave_the_global_generators_alone() -> None:
    random.seed(5)
    np.random.seed(6)
    expected = (random.random(), np.random.random())
    random.seed(5)
    np.random.seed(6)

    made = [train_transform(photo(), rng(3), recipe(**POLICY))]
    assert (random.random(), np.random.random()) == expected
    made.append(train_transform(photo(), rng(3), recipe(**POLICY)))

    np.testing.assert_array_equal(made[0], made[1])


@pytest.mark.parametrize("name", ["rand-m7-x3", "no-such-policy", "augmix-y1"])
def test_a_policy_timm_does_not_know_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"recipe.timm_augment: timm has no policy '{name}'"):
        train_transform(photo(), rng(), recipe(augment="timm", timm_augment=name))


# --- AugMix and GridMask


OPS = {  # op, level as a share of its range: which pixel of the photo is shown at (10, 20)
    ("TranslateX", 0.3): (10, 20 + 3), ("TranslateY", 0.3): (10 + 3, 20), ("Rotate", 0.03): (10, 20)}


@pytest.mark.parametrize(("op", "level"), OPS)
def test_geometry_of_augmix(op: str, level: float) -> None:
    """A translation by a third of the side times the level, in whole pixels; a rotation by whole degrees."""
    found = np.asarray(augment._augmix_op(Image.fromarray(photo()), op, level, is_mirrored=False))
    row, column = OPS[op, level]
    np.testing.assert_array_equal(found[10, 20], photo()[row, column])


@pytest.mark.parametrize(("op", "level", "pixel", "wanted"), [
    ("Posterize", 0.3, 0b10111111, 0b10110000 & 0b11100000), ("Posterize", 0.2, 0b10111111, 0b10110000),
    ("Solarize", 0.3, 180, 75), ("Solarize", 0.3, 178, 178), ("AutoContrast", 0.1, 100, 0)])
def test_levels_of_augmix(op: str, level: float, pixel: int, wanted: int) -> None:
    """4 - int(4 level) bits are kept; what is 256 - int(256 level) and more is inverted."""
    image = np.full((4, 4, 3), 250, np.uint8)
    image[0, 0] = pixel
    assert np.asarray(augment._augmix_op(Image.fromarray(image), op, level, is_mirrored=True))[0, 0, 0] == wanted


def test_augmix_is_a_mixture_of_three_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    """One to three of nine operations in each of three chains, at levels of 0.1 to 3 of 10, mirrored half of the time;
    without a change the image stays."""
    calls: list[tuple[str, float, bool]] = []
    monkeypatch.setattr(augment, "_augmix_op", lambda picture, *drawn: calls.append(drawn) or picture)
    lengths = []
    for key in range(400):
        before = len(calls)
        np.testing.assert_array_equal(augment.augmix(photo(), rng(key)), photo())
        lengths.append(len(calls) - before)

    assert (min(lengths), max(lengths)) == (3, 9)
    assert np.mean(lengths) == pytest.approx(6, abs=0.22)  # 3 sigma
    names, counts = np.unique([op for op, _, _ in calls], return_counts=True)
    assert set(names) == set(augment.AUGMIX_OPS)
    assert len(names) == 9
    assert counts == pytest.approx(len(calls) / 9, rel=0.2)
    levels = np.array([level for _, level, _ in calls])
    assert (levels.min(), levels.max()) == pytest.approx((0.01, 0.3), abs=0.01)
    assert np.mean([is_mirrored for _, _, is_mirrored in calls]) == pytest.approx(0.5, abs=0.04)


def test_shares_of_augmix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains that paint all white: the share of the mixture is uniform, and weights sum to 1."""
    monkeypatch.setattr(augment, "_augmix_op", lambda picture, *_: Image.new("RGB", picture.size, (255, 255, 255)))
    black = np.zeros((2, 2, 3), np.uint8)
    shares = np.array([augment.augmix(black, rng(key))[0, 0, 0] for key in range(1500)]) / 255
    assert np.quantile(shares, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.045)


def test_with_jsd_the_image_itself_stays_clean() -> None:
    chosen = recipe(crop="none", augment="augmix", jsd=12.0)
    np.testing.assert_array_equal(train_transform(photo(), rng(), chosen), photo())
    views = augmix_views(photo(), rng())
    assert views.shape == (2, 32, 32, 3)
    assert len({photo().tobytes(), views[0].tobytes(), views[1].tobytes()}) == 3


@pytest.mark.parametrize(("fields", "epochs", "wanted"), [
    ({"gridmask_until": 80}, [0, 40, 80, 99], [0, 0.4, 0.8, 0.8]), ({}, [0, 40, 80, 99], [0, 0.4, 0.8, 0.8]),
    ({"gridmask_until": 1.0}, [0, 50], [0, 0.4]), ({"gridmask": 0.0}, [99], [0])])
def test_the_probability_of_gridmask_rises(fields: dict[str, Any], epochs: list[int], wanted: list[float]) -> None:
    chosen = Recipe(epochs=100, **{"gridmask": 0.8, **fields})
    assert [gridmask_probability(chosen, 7 * epoch, 700) for epoch in epochs] == pytest.approx(wanted)
    assert [gridmask_probability(chosen, 7 * epoch + 6, 700) for epoch in epochs] == pytest.approx(wanted)  # by epochs


def test_holes_have_the_mean_colour_at_their_probability() -> None:
    chosen = recipe(crop="none", gridmask=0.8, mean=(1.0, 0.0, 0.0))
    grey = np.full((32, 32, 3), 7, np.uint8)
    made = [train_transform(grey, rng(key), chosen, 0.4) for key in range(400)]
    holed = [image for image in made if (image != 7).any()]

    assert len(holed) / 400 == pytest.approx(0.4, abs=0.075)
    for image in holed:
        assert {tuple(pixel) for pixel in image.reshape(-1, 3).tolist()} <= {(7, 7, 7), (255, 0, 0)}
    np.testing.assert_array_equal(train_transform(grey, rng(), chosen), grey)  # in the first epoch


def test_fields_of_mixing_that_do_not_go_together() -> None:
    for fields, words in (({"jsd": 12}, "set augment: augmix"),
                          ({"augment": "augmix", "jsd": 12, "cutmix": 1.0}, "leave cutmix at 0"),
                          ({"augment": "augmix", "jsd": 12, "loss": "bce"}, "take loss: ce"),
                          ({"mix_per": "image"}, "both are off"),
                          ({"gridmask": 0.8, "gridmask_until": 80, "epochs": 20}, "behind the last of 20 epochs")):
        with pytest.raises(ValueError, match=words):
            recipe(**fields)
