"""How images are brought to an extractor: against literal loops and against Pillow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rayexpand.evaluation.intake import IntakeConfig, bicubic_float, tf1_bilinear
from tests.evaluation.test_features import images


def literal(image: np.ndarray, size: int) -> np.ndarray:
    """TensorFlow 1's resize_bilinear, pixel by pixel, in float32."""
    height, width, _ = image.shape
    found = np.zeros((size, size, 3), np.float32)
    for i in range(size):
        for j in range(size):
            y, x = np.float32(i) * np.float32(height / size), np.float32(j) * np.float32(width / size)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            dy, dx = y - np.float32(top), x - np.float32(left)
            pixel = image.astype(np.float32)
            above = pixel[top, left] + (pixel[top, right] - pixel[top, left]) * dx
            below = pixel[bottom, left] + (pixel[bottom, right] - pixel[bottom, left]) * dx
            found[i, j] = above + (below - above) * dy
    return found


@pytest.mark.parametrize(("height", "width", "size"), [(20, 31, 13), (9, 7, 13), (13, 13, 13), (1, 5, 4)])
def test_tensorflow_1_pixel_by_pixel(height: int, width: int, size: int) -> None:
    image = images(1, 40)[0][:height, :width]

    assert np.array_equal(tf1_bilinear(image, size), literal(image, size))


def test_a_pattern_of_single_pixels_survives_tensorflow_1_alone() -> None:
    """On a checkerboard of one pixel the published intake keeps what antialiasing makes grey."""
    board = np.repeat((np.indices((512, 512)).sum(axis=0) % 2 * 255).astype(np.uint8)[:, :, None], 3, axis=2)

    assert tf1_bilinear(board, 299).std() == pytest.approx(42.5, abs=0.5)
    assert bicubic_float(board, 299).std() < 1


def test_bicubic_of_floats_is_not_rounded() -> None:
    image = images(1, 40)[0]
    channels = [Image.fromarray(image[:, :, c].astype(np.float32)) for c in range(3)]
    expected = [np.asarray(one.resize((16, 16), Image.Resampling.BICUBIC)) for one in channels]
    found = IntakeConfig(resize="squash", filter="bicubic_float")(image, 16)

    assert np.array_equal(found, np.stack(expected, axis=2).clip(0, 255))
    rounded = IntakeConfig(resize="squash", filter="bicubic")(image, 16)
    assert rounded.dtype == np.uint8
    assert 0.1 < np.abs(found - rounded).max() <= 1


def test_crop_takes_the_middle_and_squash_takes_all() -> None:
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 200
    for filter_ in ("tf1_bilinear", "bilinear", "bicubic", "bicubic_float"):
        cut = IntakeConfig(filter=filter_)(wide, 16)  # type: ignore[arg-type]
        assert (cut[:, 2:-2] > 190).all(), filter_
        squashed = IntakeConfig(resize="squash", filter=filter_)(wide, 16)  # type: ignore[arg-type]
        assert squashed[:, :4].max() < 20, filter_
        assert squashed.shape == cut.shape == (16, 16, 3)


def test_what_came_first_is_what_is_done_without_a_word(tmp_path: Path) -> None:
    assert IntakeConfig().model_dump() == {"resize": "crop", "filter": "bilinear"}
    assert IntakeConfig()(images(1, 16)[0], 16).dtype == np.uint8
