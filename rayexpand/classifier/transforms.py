"""From a decoded image to the square a classifier sees, in training (keyed draws) and in tests (none).

Order in training: resize and crop with the rotation before the crop, horizontal flip, colour jitter, policy, erasing,
grid of holes. All of it is on uint8 pixels; the classifier scales and normalises. A row that is mixed with a real image
is mixed after the crop, which both images have with the same draws. Resizing is with antialiasing by the recipe's
`filter`, bicubic where it names none (torchvision's default is bilinear); rotation is nearest-neighbour on black,
torchvision's default.

    recipe            here, and its source
    crop none         both sides to size
    crop shift        both sides to size, then moved by whole pixels, edges repeated (ours)
    crop pad          both sides to size, zero-padded by crop_pad, a random square of size
    crop square_pad   both sides to resize, rotated, zero-padded by crop_pad, a random square of size: Diff-Mix with
                      padding 8; DistDiff and GIF with resize 256, rotation 15, padding 0, size 224
    crop resized      a rectangle of crop_scale of the area and an aspect of 3/4 to 4/3, to size (torchvision, timm)
    erasing           a rectangle of 2 to 33 % of the area and an aspect of 0.3 to 3.3 (torchvision) in the mean colour,
                      which is 0 after normalisation
    gridmask          DistDiff's grid of square holes (augment.py) in the mean colour, as its probability rises
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from rayexpand.classifier import augment
from rayexpand.classifier.recipe import Recipe
from rayexpand.contract.errors import UsageError

_TRIES = 10  # of a random rectangle before the fallback, as in torchvision


def train_transform(image: np.ndarray, rng: np.random.Generator, recipe: Recipe, gridmask: float = 0.0) -> np.ndarray:
    """uint8 (H, W, 3) to uint8 (size, size, 3); everything random about it comes from `rng`. `gridmask`: its
    probability at this step."""
    return finished(cropped(image, rng, recipe), rng, recipe, gridmask)


def finished(image: np.ndarray, rng: np.random.Generator, recipe: Recipe, gridmask: float = 0.0) -> np.ndarray:
    """What follows the crop in training."""
    if recipe.hflip and rng.random() < recipe.hflip:
        image = image[:, ::-1]
    if recipe.colour_jitter:
        image = _jittered(image, rng, recipe.colour_jitter)
    if recipe.augment == "randaugment":
        image = augment.randaugment(np.ascontiguousarray(image), rng)
    elif recipe.augment == "autoaugment":
        image = augment.autoaugment(np.ascontiguousarray(image), rng)
    elif recipe.augment == "timm":
        image = _timm_policy(np.ascontiguousarray(image), rng, recipe)
    elif recipe.augment == "augmix" and not recipe.jsd:
        image = augment.augmix(np.ascontiguousarray(image), rng)
    if recipe.erasing and rng.random() < recipe.erasing:
        image = _erased(image, rng, recipe.mean)
    if recipe.gridmask and rng.random() < gridmask:
        holes = augment.gridmask(image.shape[:2], rng)
        image = np.where(holes[..., None], _level(recipe.mean), image)
    return image


def augmix_views(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 (2, H, W, 3): two views of a finished image, which a classifier is to answer for as for the image."""
    return np.stack([augment.augmix(np.ascontiguousarray(image), rng) for _ in range(2)])


def test_transform(image: np.ndarray, recipe: Recipe) -> np.ndarray:
    """uint8 (H, W, 3) to uint8 (test_size, test_size, 3). With `resize`, the middle of the image resized to it: both
    sides where training squares them (crop square_pad), else the shorter side with the aspect kept."""
    size = recipe.test_size or recipe.size
    if recipe.resize is None:
        return _resized(image, size, size, recipe)
    height, width = image.shape[:2]
    if recipe.crop == "square_pad":
        height = width = recipe.resize
    else:
        short = min(height, width)
        height, width = recipe.resize * height // short, recipe.resize * width // short
    top, left = round((height - size) / 2), round((width - size) / 2)
    return _window(_resized(image, height, width, recipe), top, left, size)


def cropped(image: np.ndarray, rng: np.random.Generator, recipe: Recipe) -> np.ndarray:
    size, pad = recipe.size, recipe.crop_pad
    if recipe.crop == "resized":
        return _resized_crop(_rotated(image, rng, recipe.rotation), rng, recipe)
    side = (recipe.resize or size) if recipe.crop == "square_pad" else size
    image = _rotated(_resized(image, side, side, recipe), rng, recipe.rotation)
    if recipe.crop == "none":
        return image
    if recipe.crop == "shift":
        rows, columns = (np.clip(np.arange(size) + _below(rng, 2 * pad + 1) - pad, 0, size - 1) for _ in range(2))
        return image[rows[:, None], columns]
    room = side + 2 * pad - size + 1
    return _window(image, _below(rng, room) - pad, _below(rng, room) - pad, size)


def _below(rng: np.random.Generator, count: int) -> int:
    """Uniform on 0..count-1; several times faster than Generator.integers for one number."""
    return int(rng.random() * count)


def _resized(image: np.ndarray, height: int, width: int, recipe: Recipe) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling[recipe.filter.upper()]))


def _rotated(image: np.ndarray, rng: np.random.Generator, degrees: float) -> np.ndarray:
    if not degrees:
        return image
    return np.asarray(Image.fromarray(image).rotate((2 * rng.random() - 1) * degrees, Image.Resampling.NEAREST))


def _window(image: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
    """The square of `size` from (top, left), black where it leaves the image."""
    height, width = image.shape[:2]
    y0, y1, x0, x1 = max(top, 0), min(top + size, height), max(left, 0), min(left + size, width)
    if (y1 - y0, x1 - x0) == (size, size):
        return image[y0:y1, x0:x1]
    found = np.zeros((size, size, 3), np.uint8)
    found[y0 - top:y1 - top, x0 - left:x1 - left] = image[y0:y1, x0:x1]
    return found


def _resized_crop(image: np.ndarray, rng: np.random.Generator, recipe: Recipe) -> np.ndarray:
    size, (height, width) = recipe.size, image.shape[:2]
    for _ in range(_TRIES):
        tall, wide = _rectangle(rng, height * width, recipe.crop_scale, (3 / 4, 4 / 3))
        if 0 < tall <= height and 0 < wide <= width:
            break
    else:  # the largest central rectangle with an allowed aspect
        tall, wide = min(height, round(width / (3 / 4))), min(width, round(height * 4 / 3))
        top, left = (height - tall) // 2, (width - wide) // 2
        return _resized(np.ascontiguousarray(image[top:top + tall, left:left + wide]), size, size, recipe)
    top, left = _below(rng, height - tall + 1), _below(rng, width - wide + 1)
    return _resized(np.ascontiguousarray(image[top:top + tall, left:left + wide]), size, size, recipe)


def _rectangle(rng: np.random.Generator, area: int, scale: tuple[float, float], aspect: tuple[float, float]
               ) -> tuple[int, int]:
    """Height and width of a rectangle of a share of `area` and a log-uniform width over height."""
    wanted = area * rng.uniform(*scale)
    ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
    return round(math.sqrt(wanted / ratio)), round(math.sqrt(wanted * ratio))


_ENHANCERS: tuple[Callable[[Image.Image], Any], ...] = (ImageEnhance.Brightness, ImageEnhance.Contrast,
                                                        ImageEnhance.Color)


def _jittered(image: np.ndarray, rng: np.random.Generator, by: float) -> np.ndarray:
    """Brightness, contrast and saturation, each by a factor of 1 +- `by`, in a drawn order."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    factors = rng.uniform(1 - by, 1 + by, len(_ENHANCERS))
    for which in rng.permutation(len(_ENHANCERS)):
        picture = _ENHANCERS[which](picture).enhance(factors[which])
    return np.asarray(picture)


def _erased(image: np.ndarray, rng: np.random.Generator, mean: tuple[float, float, float]) -> np.ndarray:
    height, width = image.shape[:2]
    for _ in range(_TRIES):
        tall, wide = _rectangle(rng, height * width, (0.02, 0.33), (0.3, 3.3))
        if 0 < tall < height and 0 < wide < width:
            top, left = _below(rng, height - tall + 1), _below(rng, width - wide + 1)
            image = image.copy()
            image[top:top + tall, left:left + wide] = _level(mean)
            break
    return image


def _level(mean: tuple[float, float, float]) -> np.ndarray:
    """uint8 (3,): the colour that is 0 after normalisation."""
    return np.rint(np.array(mean) * 255).astype(np.uint8)


def _timm_policy(image: np.ndarray, rng: np.random.Generator, recipe: Recipe) -> np.ndarray:
    """A policy of timm, which draws from the global generators: they are set from `rng` and put back."""
    policy = _timm(str(recipe.timm_augment), recipe.size, recipe.mean)
    with _global_state(int(rng.integers(2**32))):
        return np.asarray(policy(Image.fromarray(image)))


@lru_cache(maxsize=8)
def _timm(name: str, size: int, mean: tuple[float, float, float]) -> Callable[[Image.Image], Image.Image]:
    """timm's policy with the settings that its own transform factory gives it. Raises UsageError."""
    from timm.data import auto_augment

    settings = {"translate_const": int(size * 0.45), "img_mean": tuple(min(255, round(255 * value)) for value in mean)}
    kinds = {"rand": auto_augment.rand_augment_transform, "augmix": auto_augment.augment_and_mix_transform}
    kind = name.split("-")[0]
    if kind == "augmix":
        settings["translate_pct"] = 0.3
    try:
        return kinds.get(kind, auto_augment.auto_augment_transform)(name, settings)
    except (AssertionError, KeyError, ValueError) as error:
        raise UsageError(f"recipe.timm_augment: timm has no policy '{name}' ({error}); write one such as "
                         "rand-m7-mstd0.5-inc1, augmix-m3-w3 or original-mstd0.5") from error


@contextmanager
def _global_state(seed: int) -> Iterator[None]:
    """`random` and `numpy.random` seeded with 32 bits inside, as they were before outside."""
    before, numpy_before = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)
