"""Classical augmentation: the tables are torchvision's, the masks are the papers', every draw is keyed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pydantic import ValidationError
from torchvision.transforms import v2

from rayexpand.classifier import augment
from rayexpand.contract.protocols import Tools
from rayexpand.contract.rng import RowRng
from rayexpand.contract.schema import ClassTable
from rayexpand.methods import classical
from rayexpand.methods.classical import Classical
from tests.methods.fakes import batch_of

CLASSES = ClassTable.of(["a", "b"])
POLICIES = ("randaugment", "autoaugment", "cutout", "random_erasing", "gridmask", "standard")


def photo(height=40, width=48, seed=0):
    """Smooth colours plus a little texture, so that every operation shows."""
    y, x = np.mgrid[:height, :width]
    base = np.stack([x * 255 / width, y * 200 / height, 255 - x * 200 / width], axis=-1)
    return np.clip(base + RowRng(seed, "photo", "p", 0).normals("n", (height, width, 3)) * 8, 0, 255).astype(np.uint8)


def streams(n):
    return [RowRng(0, "classical", f"s{i}", 0)("ops") for i in range(n)]


@pytest.mark.parametrize(("reference", "bins"), [(v2.RandAugment(), 31), (v2.AutoAugment(), 10)])
@pytest.mark.parametrize("size", [(32, 32), (224, 300)])
def test_magnitudes_are_those_of_torchvision(reference, bins, size):
    for op, (function, signed) in reference._AUGMENTATION_SPACE.items():
        theirs, ours = function(bins, *size), augment.magnitudes(op, bins, *size)
        assert (theirs is None) == (ours is None)
        assert signed == (op in augment.SIGNED)
        if theirs is not None:
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6, atol=1e-6)


def test_operations_and_policies_are_those_of_torchvision():
    assert tuple(v2.RandAugment()._AUGMENTATION_SPACE) == augment.RANDAUGMENT_OPS
    ours = [list(pair) for pair in augment.AUTOAUGMENT_IMAGENET]
    assert ours == [list(pair) for pair in v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET)._policies]


@pytest.mark.parametrize("op", [*augment.RANDAUGMENT_OPS, "Invert"])
@pytest.mark.parametrize("sign", [1, -1])
def test_pixels_of_an_operation_are_those_of_torchvision(op, sign):
    reference = v2.RandAugment()
    picture = Image.fromarray(photo())
    strengths = augment.magnitudes(op, 31, 40, 48)
    for bin_ in (0, 9, 30):
        strength = 0.0 if strengths is None else float(strengths[bin_]) * (sign if op in augment.SIGNED else 1)
        theirs = reference._apply_image_or_video_transform(picture, op, strength, reference.interpolation,
                                                           reference._fill)
        np.testing.assert_array_equal(np.asarray(augment.apply_op(picture, op, strength)), np.asarray(theirs))


def recorded(monkeypatch, n=400, **fields):
    """(operation, strength) of every operation applied to n images of 331 x 331."""
    applied = []
    monkeypatch.setattr(augment, "apply_op", lambda picture, *op: applied.append(op) or picture)
    image = np.zeros((331, 331, 3), np.uint8)
    for rng in streams(n):
        Classical(**fields)._augment(image, rng)
    return applied


def test_randaugment_draws_operations_evenly_and_signs_by_a_coin(monkeypatch):
    applied = recorded(monkeypatch)
    assert len(applied) == 2 * 400
    counts = [sum(op == name for op, _ in applied) for name in augment.RANDAUGMENT_OPS]
    assert min(counts) > 30
    assert max(counts) < 90
    strengths = {name: {s for op, s in applied if op == name} for name in augment.RANDAUGMENT_OPS}
    assert strengths["TranslateX"] == {-45.0, 45.0}
    assert strengths["Rotate"] == {-9.0, 9.0}
    assert strengths["Posterize"] == {7.0}
    assert np.mean([s > 0 for op, s in applied if op in augment.SIGNED]) == pytest.approx(0.5, abs=0.08)


@pytest.mark.slow
def test_autoaugment_keeps_to_its_probabilities(monkeypatch):
    applied = recorded(monkeypatch, n=2000, policy="autoaugment")
    expected = np.sum([p for pair in augment.AUTOAUGMENT_IMAGENET for _, p, _ in pair]) / 25
    assert len(applied) / 2000 == pytest.approx(expected, abs=0.05)
    assert {op for op, _ in applied} == {op for pair in augment.AUTOAUGMENT_IMAGENET for op, _, _ in pair}
    assert {s for op, s in applied if op == "ShearX"} == {-0.3 * 5 / 9, 0.3 * 5 / 9}


def line_drawings(n, size=105):
    """Binary images: a black line on white, another one each."""
    images = []
    for i in range(n):
        picture = Image.new("1", (size, size), 1)
        ImageDraw.Draw(picture).line([(5 + i % 40, 10), (90 - i % 30, 80)], fill=0, width=3)
        images.append(np.array(picture.convert("RGB")))
    return images


@pytest.mark.parametrize("policy", POLICIES)
def test_a_binary_image_is_not_destroyed(policy):
    images = line_drawings(60)
    method = Classical(policy=policy)
    rows = batch_of(method, CLASSES, [(f"s{i}", 0, 0) for i in range(60)])
    batch = replace(rows, images=tuple(images))
    whole = method.expand(batch, Tools(CLASSES)).images
    assert not any(augment.is_blank(image) for image in whole)
    again = method.expand(batch, Tools(CLASSES)).images
    assert all(np.array_equal(one, other) for one, other in zip(whole, again, strict=True))


def test_only_a_copy_that_would_be_blank_is_drawn_again():
    method, image = Classical(), line_drawings(1)[0]
    blank = 0
    for rng, same in zip(streams(200), streams(200), strict=True):
        same.random()  # the coin of `probability`
        plain, made = augment.randaugment(image, same), method._augment(image, rng)
        blank += augment.is_blank(plain)
        assert augment.is_blank(plain) or np.array_equal(plain, made)
        assert not augment.is_blank(made)
    assert blank > 5
    white = np.full((16, 16, 3), 255, np.uint8)  # a seed that is blank itself stays a fault of the seed
    same, rng = streams(1)[0], streams(1)[0]
    same.random()
    assert np.array_equal(method._augment(white, rng), augment.randaugment(white, same))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", [(16, 16), (33, 21), (8, 60)])
def test_size_and_type_are_kept_and_copies_differ(policy, size):
    method = Classical(policy=policy, probability=1)
    image = photo(*size)
    before = image.copy()
    made = [method._augment(image, rng) for rng in streams(12)]
    np.testing.assert_array_equal(image, before)
    assert all(m.shape == image.shape and m.dtype == np.uint8 for m in made)
    assert len({m.tobytes() for m in made}) > 4


def test_rows_of_one_batch_may_have_different_sizes():
    method = Classical()
    batch = batch_of(method, CLASSES, [("a", 0, 0), ("b", 1, 0)])
    batch = type(batch)(batch.draws, (photo(20, 30), photo(50, 10)), batch.rngs, batch.filler)
    assert [m.shape for m in method.expand(batch, Tools(CLASSES)).images] == [(20, 30, 3), (50, 10, 3)]


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_drawn_from_a_global_generator(policy):
    method, image = Classical(policy=policy, flip=True), photo()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = [method._augment(image, rng) for rng in streams(8)]
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
    np.testing.assert_array_equal(first, [method._augment(image, rng) for rng in streams(8)])


def test_probability_defaults():
    image = photo()

    def unchanged(n=200, **fields):
        method = Classical(**fields)
        return sum(np.array_equal(method._augment(image, rng), image) for rng in streams(n)) / n

    assert unchanged(policy="cutout") == 0
    assert unchanged(policy="random_erasing") == pytest.approx(0.5, abs=0.1)
    assert unchanged(policy="random_erasing", probability=1) == 0
    assert unchanged(policy="standard", probability=0) == 1


def test_flip_is_off_and_mirrors_half_when_on():
    image = photo()
    assert not Classical().flip
    made = [Classical(policy="cutout", probability=0, flip=True)._augment(image, rng) for rng in streams(200)]
    mirrored = [np.array_equal(m, image[:, ::-1]) for m in made]
    assert np.mean(mirrored) == pytest.approx(0.5, abs=0.1)
    assert all(flipped or np.array_equal(m, image) for flipped, m in zip(mirrored, made, strict=True))


def test_cutout_is_one_square_that_may_hang_over():
    holes = [classical._cutout((32, 32), rng, 0.5) for rng in streams(300)]
    areas = np.array([hole.sum() for hole in holes])
    assert areas.max() == 16 * 16
    assert areas.min() < 16 * 16 * 0.45  # the centre is anywhere in the image
    cover = np.mean(holes, axis=0)
    np.testing.assert_allclose(cover, cover[::-1, ::-1], atol=0.12)
    for hole in holes[:50]:
        rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
        assert hole.sum() == len(rows) * len(columns)
        assert max(len(rows), len(columns)) <= 16


def test_erased_rectangles_keep_to_area_and_aspect():
    for hole in [classical._erased((100, 80), rng) for rng in streams(300)]:
        height, width = hole.any(axis=1).sum(), hole.any(axis=0).sum()
        assert hole.sum() == height * width
        assert 0.015 < hole.mean() < 0.35
        assert 0.26 < height / width < 3.8


def test_gridmask_period_and_share():
    masks = [augment.gridmask((224, 224), rng, 0.6) for rng in streams(60)]
    assert np.mean(masks) == pytest.approx(0.4**2, abs=0.03)  # holes of 0.4 d by 0.4 d
    small = [augment.gridmask((32, 32), rng, 0.6) for rng in streams(200)]
    share = np.mean([((d - np.ceil(0.6 * d)) / d) ** 2 for d in range(14, 32)])
    assert np.mean(small) == pytest.approx(share, abs=0.02)


def test_gridmask_by_hand():
    class Fixed:
        """Period 10, phase (0, 0), no rotation."""

        def integers(self, low, high=None, size=None):
            return np.zeros(2, int) if size else 10 if high else 0

    hole = augment.gridmask((21, 21), Fixed(), 0.6)
    expected = np.isin(np.mod(np.arange(21) - 10, 10), [6, 7, 8, 9])
    np.testing.assert_array_equal(hole, expected[:, None] & expected[None, :])


def test_fill_and_seed_pixels():
    image = photo()
    method = Classical(policy="cutout", fill=(124, 116, 104))
    for made, rng in zip([method._augment(image, rng) for rng in streams(20)], streams(20), strict=True):
        rng.random()
        hole = classical._cutout(image.shape[:2], rng, 0.5)
        np.testing.assert_array_equal(made[~hole], image[~hole])
        assert (made[hole] == (124, 116, 104)).all()


@pytest.mark.parametrize(("fields", "message"), [
    ({"magnitude": 31}, "magnitude 31 must be below bins 31"), ({"fill": (0, 0, 256)}, "from 0 to 255"),
    ({"policy": "mixup"}, "randaugment"), ({"gridmask_keep": 1.0}, "gridmask_keep"), ({"probability": 2}, "probab")])
def test_settings_that_cannot_work_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        Classical(**fields)


def test_what_stays_blank_is_blank_and_not_the_seed():
    image = np.zeros((16, 16, 3), np.uint8)
    image[8, 8] = 255
    method = Classical(policy="cutout", cutout_size=0.99)
    made = [method._augment(image, rng) for rng in streams(50)]
    assert any(augment.is_blank(one) for one in made)
    assert not any(np.array_equal(one, image) for one in made if augment.is_blank(one))
