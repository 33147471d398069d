"""Pieces of corruptions against what they mean, written out: loops over pixels, or a formula of another library."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from scipy import ndimage

from rayexpand.contract.rng import generator, row_key
from rayexpand.data.corruptions import pieces, types
from rayexpand.data.corruptions.tables import TABLES

LEVEL = .002 / 255  # of a grey level, in values 0..1
PLAIN = types.Extras()


def rng(name: str = "x") -> np.random.Generator:
    return generator(row_key(0, "test", name, 0, 0, "corruptions"))


def noise(side: int = 20, channels: int = 3) -> np.ndarray:
    return rng("image").random((side, side, channels))


def mirrored(i: int, size: int) -> int:
    """... 2 1 0 1 2 ..., size - 1, size - 2 ... (OpenCV's reflect-101)."""
    i = abs(i) % (2 * (size - 1))
    return i if i < size else 2 * (size - 1) - i


def correlated(x: np.ndarray, kernel: np.ndarray, border: Callable[[int, int], int]) -> np.ndarray:
    """Each pixel as the sum that correlation is."""
    reach, (height, width) = len(kernel) // 2, x.shape[:2]
    found = np.zeros(x.shape)
    for row in range(height):
        for column in range(width):
            for i, j in np.argwhere(kernel):
                found[row, column] += kernel[i, j] * x[border(row + i - reach, height), border(column + j - reach,
                                                                                               width)]
    return found


def literal_disk(radius: float, sd: float) -> np.ndarray:
    reach, taps = (8, 3) if radius <= 8 else (int(radius), 5)
    flat = np.array([[float(i * i + j * j <= radius * radius) for j in range(-reach, reach + 1)]
                     for i in range(-reach, reach + 1)])
    weights = np.array([math.exp(-(i - taps // 2) ** 2 / (2 * sd * sd)) for i in range(taps)])
    weights /= weights.sum()
    return correlated(flat / flat.sum(), np.outer(weights, weights), mirrored)


@pytest.mark.parametrize(("radius", "sd"), sorted({*TABLES["imagenet"]["defocus_blur"],
                                                   *TABLES["cifar"]["defocus_blur"]}))
def test_defocus_is_a_disk_with_a_soft_edge(radius: float, sd: float) -> None:
    disk, x = pieces.disk(radius, sd), noise(9)

    np.testing.assert_allclose(disk, literal_disk(radius, sd), atol=1e-12)
    assert disk.sum() == pytest.approx(1, abs=.02), "one that touches its grid gains what is mirrored, as published"
    if radius <= 4:  # the loop is slow
        np.testing.assert_allclose(pieces.filtered(x, disk), correlated(x, disk, mirrored), atol=LEVEL)
    else:
        wide = noise(30)
        np.testing.assert_allclose(pieces.filtered(wide, disk), ndimage.correlate(wide, disk[..., None],
                                                                                  mode="mirror"), atol=LEVEL)


@pytest.mark.parametrize("sd", [.05, .4, .9, 2.44])
def test_gaussian_blur_repeats_edges_and_ends_at_four_deviations(sd: float) -> None:
    x, reach = noise(12, 2), int(4 * sd + .5)
    weights = np.exp(-np.arange(-reach, reach + 1) ** 2 / (2 * sd * sd))
    weights /= weights.sum()
    expected = correlated(x, np.outer(weights, weights), lambda i, size: min(max(i, 0), size - 1))

    np.testing.assert_allclose(pieces.gaussian(x, sd), expected, atol=LEVEL)


@pytest.mark.parametrize("more", TABLES["imagenet"]["brightness"])
def test_brightness_raises_the_value_of_hsv(more: float) -> None:
    x = rng("colours").integers(0, 256, (30, 30, 3)).astype(np.uint8)
    x[0, :3] = [[0, 0, 0], [255, 255, 255], [255, 0, 7]]
    hsv = rgb_to_hsv(x / 255)
    hsv[..., 2] = np.clip(hsv[..., 2] + more, 0, 1)

    np.testing.assert_allclose(types.brightness(x, more, rng(), PLAIN) / 255, hsv_to_rgb(hsv), atol=LEVEL)


def test_grey_is_that_of_television() -> None:
    x = noise(4)
    expected = .299 * x[..., 0] + .587 * x[..., 1] + .114 * x[..., 2]

    np.testing.assert_allclose((x * pieces.GREY).sum(axis=2), expected, atol=LEVEL)


def test_an_affine_map_brings_three_points_onto_three_points() -> None:
    """Each pixel is read where the inverse map says, linearly between its four neighbours, borders mirrored."""
    x, side = noise(16), 16
    before = np.array([[13, 13], [13, 3], [3, 3]], np.float32)
    after = before + rng("points").uniform(-2, 2, (3, 2)).astype(np.float32)
    to_before = np.linalg.solve(np.c_[after, np.ones(3)].astype(float), before.astype(float)).T
    expected = np.zeros_like(x)
    for row in range(side):
        for column in range(side):
            at_x, at_y = to_before @ [column, row, 1]
            left, top = math.floor(at_x), math.floor(at_y)
            for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
                weight = abs(1 - dx - (at_x - left)) * abs(1 - dy - (at_y - top))
                expected[row, column] += weight * x[mirrored(top + dy, side), mirrored(left + dx, side)]

    np.testing.assert_allclose(to_before @ np.c_[after, np.ones(3)].T, before.T, atol=1e-5)
    np.testing.assert_allclose(pieces.affine(x, before, after), expected, atol=LEVEL)


@pytest.mark.parametrize("size", [40, 41, 42, 43, 44])
def test_a_fifth_of_a_picture_is_every_fifth_pixel(size: int) -> None:
    """Linear reading at (i + 1/2) 5 - 1/2 = 5 i + 2, a whole pixel; round(0.2 n) of them."""
    x = rng("picture").integers(0, 256, (size, size)).astype(float)
    at = (np.arange(round(.2 * size)) + .5) / .2 - .5
    expected = ndimage.map_coordinates(x, np.meshgrid(at, at, indexing="ij"), order=1)

    np.testing.assert_allclose(x[2::types.FROST_STEP, 2::types.FROST_STEP], expected, atol=1e-9)


@pytest.mark.parametrize(("radius", "sd", "angle"), [(6, 1, 0.0), (10, 3, 30.0), (8, 2.5, -45.0), (12, 4, -100.0)])
def test_motion_blur_reads_to_one_side(radius: int, sd: float, angle: float) -> None:
    x = rng("image").integers(0, 256, (14, 14, 3)).astype(np.uint8)
    a, expected = math.radians(angle), np.zeros(x.shape)
    weights = [math.exp(-i * i / (2 * sd * sd)) for i in range(2 * radius + 1)]
    for row in range(14):
        for column in range(14):
            for i, weight in enumerate(weights):
                across, down = math.ceil(i * math.cos(a) - .5), math.ceil(i * math.sin(a) - .5)
                there = x[min(max(row + down, 0), 13), min(max(column + across, 0), 13)]
                expected[row, column] += weight / sum(weights) * there
    found = pieces.motion(x, radius, sd, angle)

    assert np.abs(found - expected).max() <= .5 + 1e-9
    assert (found == np.floor(found)).all()


@pytest.mark.parametrize(("table", "counts"), [("imagenet", [12, 16, 11, 13, 11]), ("cifar", [7, 12, 16, 21, 26])])
def test_how_many_zoom_factors_there_are(table: str, counts: list[int]) -> None:
    ends = {"imagenet": [1.11, 1.15, 1.20, 1.24, 1.30], "cifar": [1.06, 1.11, 1.15, 1.20, 1.25]}[table]
    factors = [types.zoom_factors(c) for c in TABLES[table]["zoom_blur"]]

    assert [len(one) for one in factors] == counts
    assert [one[-1] for one in factors] == pytest.approx(ends)


@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("factor", [1.0, 1.02, 1.11, 1.3, 2.25, 3.0, 4.5])
def test_zoom_is_that_of_scipy(side: int, factor: float) -> None:
    x = noise(side)
    cut = math.ceil(side / factor)
    top = (side - cut) // 2
    large = ndimage.zoom(x[top:top + cut, top:top + cut], (factor, factor, 1), order=1)
    trim = (len(large) - side) // 2

    np.testing.assert_allclose(pieces.zoomed(x, factor), large[trim:trim + side, trim:trim + side], atol=1e-9)


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize(("reach", "passes"), [(1, 1), (2, 3), (4, 2)])
def test_glass_blur_copies_where_the_released_code_means_to_exchange(reach: int, passes: int, copy: bool) -> None:
    """`x[h, w], x[h2, w2] = x[h2, w2], x[h, w]` on views writes the first pixel and then reads it for the second."""
    side = 15
    inner = side - 2 * reach
    draws = rng("glass").integers(-reach, reach, (passes, inner, inner, 2))
    x = rng("image").integers(0, 256, (side, side, 3)).astype(np.uint8)
    expected = x.copy()
    for step in range(passes):
        for number, (i, j) in enumerate((i, j) for i in range(side - reach, reach, -1)
                                        for j in range(side - reach, reach, -1)):
            dx, dy = draws[step].reshape(-1, 2)[number]
            here, there = expected[i, j], expected[i + dy, j + dx]
            if not copy:
                here, there = here.copy(), there.copy()
            expected[i, j], expected[i + dy, j + dx] = there, here
    found = pieces.exchanged(x, reach, passes, draws, copy=copy)

    np.testing.assert_array_equal(found, expected)
    pixels = sorted(map(tuple, x.reshape(-1, 3).tolist()))
    assert (sorted(map(tuple, found.reshape(-1, 3).tolist())) == pixels) == (not copy), "an exchange loses no pixel"


def literal_plasma(side: int, decay: float, uniform: Any) -> np.ndarray:
    """Diamonds and squares, point by point."""
    found, step, wobble = np.zeros((side, side)), side, 100.0
    while step >= 2:
        half = step // 2
        fields = {name: wobble * wobble * uniform(-1, 1, (side // step, side // step)) for name in "abc"}

        def at(row: int, column: int, field: str, corners: list[tuple[int, int]], step: int = step,
               fields: dict[str, np.ndarray] = fields) -> None:
            total = sum(found[r % side, c % side] for r, c in corners)
            found[row, column] = total / 4 + fields[field][row // step, column // step]

        blocks = [(r, c) for r in range(0, side, step) for c in range(0, side, step)]
        for r, c in blocks:
            at(r + half, c + half, "a", [(r, c), (r + step, c), (r, c + step), (r + step, c + step)])
        for r, c in blocks:
            at(r, c + half, "b", [(r + half, c + half), (r - half, c + half), (r, c), (r, c + step)])
        for r, c in blocks:
            at(r + half, c, "c", [(r + half, c + half), (r + half, c - half), (r, c), (r + step, c)])
        step, wobble = half, wobble / decay
    found -= found.min()
    return found / found.max()


@pytest.mark.parametrize(("side", "decay"), [(8, 3.0), (32, 1.75)])
def test_fog_is_a_plasma_map_that_repeats(side: int, decay: float) -> None:
    found = pieces.plasma(side, decay, rng("plasma"))

    np.testing.assert_allclose(found, literal_plasma(side, decay, rng("plasma").uniform), atol=1e-9)
    assert (found.min(), found.max()) == (0, 1)


def test_noise_is_that_of_its_table() -> None:
    grey, many = np.full((200, 200, 3), 128, np.uint8), SimpleNamespace(sd=.18, photons=12, share=.17)
    normal = types.gaussian_noise(grey, many.sd, rng("a"), PLAIN) / 255
    photons = types.shot_noise(grey, many.photons, rng("b"), PLAIN) / 255 * many.photons
    hit = types.impulse_noise(grey, many.share, rng("c"), PLAIN)

    assert normal.std() == pytest.approx(many.sd, rel=.02)
    assert np.allclose(photons, np.rint(photons))
    assert photons.var() == pytest.approx(128 / 255 * many.photons, rel=.02)
    assert (hit != 128).mean() == pytest.approx(many.share, rel=.03)
    assert (hit == 255).sum() == pytest.approx((hit == 0).sum(), rel=.05)
