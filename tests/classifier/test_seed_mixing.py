"""A row mixed with a real image: the laws of what is drawn, and every pixel of the result."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from pydantic import ValidationError

from rayexpand.classifier.seed_mixing import Box, Mixture, SeedMix, clipped_box, inside_box
from rayexpand.contract.rng import generator, row_key

SIZE = 224


def rng(key: int = 0) -> np.random.Generator:
    return generator(row_key(key, "test", "", 0, 0, "mix"))


def images(seed: int = 0, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """A sample and a real image, uint8 (size, size, 3)."""
    sample, real = np.random.default_rng(seed).integers(0, 256, (2, size, size, 3)).astype(np.uint8)
    return sample, real


def drawn(mix: SeedMix, count: int = 10_000, size: int = SIZE) -> list[Mixture | None]:
    stream = rng()
    return [mix.draw(stream, size)[0] for _ in range(count)]


def row_of(*levels: int) -> np.ndarray:
    return np.array(levels, np.uint8)[None, :, None].repeat(3, 2)


@pytest.mark.parametrize(("lam", "levels"), [(1.0, (100, 200)), (0.0, (0, 50)), (0.3, (30, 95)), (0.5, (50, 125))])
def test_lambda_weighs_the_real_image(lam: float, levels: tuple[int, int]) -> None:
    """At 0.3 swapped weights would give 70 and 155."""
    np.testing.assert_array_equal(Mixture(lam, None).of(row_of(0, 50), row_of(100, 200)), row_of(*levels))


@pytest.mark.parametrize(("lam", "center", "box"), [
    (0.75, (4, 4), (2, 6, 2, 6)), (0.75, (0, 0), (0, 2, 0, 2)), (1.0, (4, 4), (4, 4, 4, 4)),
    (0.0, (4, 4), (0, 8, 0, 8))])
def test_a_clipped_box_by_hand(lam: float, center: tuple[int, int], box: Box) -> None:
    """25 %, 6.25 %, nothing and all of 8 x 8 pixels."""
    assert clipped_box(lam, center, 8) == box


def test_a_box_at_224_pixels() -> None:
    assert clipped_box(0.75, (112, 112), SIZE) == (56, 168, 56, 168)
    assert inside_box(0.75, (0.0, 0.999999), SIZE) == (0, 112, 112, 224)
    assert inside_box(0.0, (0.5, 0.5), SIZE) == (0, 224, 0, 224)


@pytest.mark.parametrize(("box", "is_real_inside", "wanted"), [
    ((0, 8, 0, 8), True, "real"), ((0, 8, 0, 8), False, "sample"), ((3, 3, 2, 5), True, "sample"),
    ((3, 3, 2, 5), False, "real")])
def test_masks_of_ones_and_of_zeros(box: Box, is_real_inside: bool, wanted: str) -> None:
    sample, real = images()
    found = Mixture(0.5, box, is_real_inside).of(sample, real)
    np.testing.assert_array_equal(found, real if wanted == "real" else sample)


def test_every_pixel_of_a_patch_is_of_one_image_and_the_orientations_are_complements() -> None:
    sample, real = images()
    one, other = (Mixture(0.5, (1, 5, 2, 8), inside).of(sample, real).astype(int) for inside in (True, False))
    is_real, is_sample = (one == real).all(-1), (one == sample).all(-1)

    assert (is_real | is_sample).all()
    assert (is_real.sum(), is_sample.sum()) == (24, 40)
    np.testing.assert_array_equal(one + other, sample.astype(int) + real)


def test_laws_of_what_is_drawn() -> None:
    found = [one for one in drawn(SeedMix()) if one is not None]
    pixel, patch = [one for one in found if one.box is None], [one for one in found if one.box is not None]

    assert len(found) == 10_000
    assert len(pixel) / len(found) == pytest.approx(0.5, abs=0.015)
    assert np.mean([one.lam for one in pixel]) == pytest.approx(0.5, abs=0.0125)  # 3 sigma of 5,000 uniform numbers
    assert np.quantile([one.lam for one in pixel], [0.1, 0.9]) == pytest.approx([0.1, 0.9], abs=0.02)
    assert np.mean([one.is_real_inside for one in patch]) == pytest.approx(0.5, abs=0.0213)  # 3 sigma of 5,000 coins
    for one in patch:
        assert one.lam == pytest.approx(area(one) if one.is_real_inside else 1 - area(one))


@pytest.mark.parametrize(("patch", "share", "tolerance"), [("clipped", 0.318, 0.01), ("inside", 0.5, 0.01)])
def test_mean_area_of_a_box(patch: str, share: float, tolerance: float) -> None:
    boxes = [one for one in drawn(SeedMix(pixel=0.0, patch=patch)) if one is not None]  # type: ignore[arg-type]
    assert np.mean([area(one) for one in boxes]) == pytest.approx(share, abs=tolerance)


def area(mixture: Mixture) -> float:
    assert mixture.box is not None
    top, bottom, left, right = mixture.box
    assert 0 <= top <= bottom <= SIZE
    assert 0 <= left <= right <= SIZE
    return (bottom - top) * (right - left) / SIZE**2


def test_an_image_mixed_with_itself_stays() -> None:
    _, real = images(size=16)
    assert all((one.of(real, real) == real).all() for one in drawn(SeedMix(), 200, 16) if one is not None)


def test_normalisation_and_mixing_commute() -> None:
    sample, real = (image / 255 for image in images(size=16))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for one in drawn(SeedMix(), 50, 16):
        assert one is not None
        np.testing.assert_allclose((one.of(sample, real) - mean) / std,
                                   one.of((sample - mean) / std, (real - mean) / std), atol=1e-6)


CHANGES: dict[str, Callable[[Mixture], object]] = {  # what may change with a field, all else of a draw may not
    "alpha": lambda one: (one.box, one.is_real_inside), "probability": lambda one: one,
    "pixel": lambda one: one, "patch": lambda one: (one.lam if one.box is None else None, one.is_real_inside)}


@pytest.mark.parametrize(("field", "value"), [("alpha", 4.0), ("probability", 0.3), ("pixel", 0.2),
                                              ("patch", "inside")])
def test_a_field_moves_no_other_draw(field: str, value: object) -> None:
    pairs = []
    for key in range(300):
        one, other = SeedMix().draw(rng(key), SIZE), SeedMix(**{field: value}).draw(rng(key), SIZE)
        assert one[1] == other[1]
        pairs.append((one[0], other[0]))
    same = [(one, other) for one, other in pairs if one and other and (one.box is None) == (other.box is None)]

    assert {CHANGES[field](one) == CHANGES[field](other) for one, other in same} == {True}
    mixed = sum(other is not None for _, other in pairs)
    assert mixed == (pytest.approx(90, abs=24) if field == "probability" else 300)


def test_alpha_draws_lambda_to_the_middle() -> None:
    spreads = [np.std([one.lam for one in drawn(SeedMix(pixel=1.0, alpha=alpha), 2000) if one])
               for alpha in (0.2, 1, 8)]
    assert all(more > less for more, less in pairwise(spreads))


@pytest.mark.parametrize(("fields", "words"), [({"pixel": 1.5}, "pixel"), ({"alpha": 0}, "alpha"),
                                               ({"patch": "cut"}, "inside"), ({"partner": "own"}, "class"),
                                               ({"probability": 0}, "probability")])
def test_fields_that_mean_nothing(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        SeedMix(**fields)  # type: ignore[arg-type]
