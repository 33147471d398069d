"""The fifteen corruptions: a uint8 image, its parameters and a generator -> float values, not yet cut to 0..255.

Severities do not draw in another order or shape, so that those of one image share angle, crop and pattern; only the
reach of glass blur and the counts of shot noise depend on them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from rayexpand.data.corruptions import pieces

FROST_STEP = 5  # the CIFAR table has frost at 0.2 of its size: linear reading at 5 i + 2, exactly every fifth pixel


@dataclass(frozen=True)
class Extras:
    """What some types need beside image and parameters."""

    exchange: str = "copy"  # or swap: see pieces.exchanged
    frost: tuple[np.ndarray, ...] = ()  # pictures, uint8 (H, W, 3)
    small_frost: bool = False  # the CIFAR table


Corruption = Callable[[np.ndarray, Any, np.random.Generator, Extras], np.ndarray]


def gaussian_noise(x: np.ndarray, sd: float, rng: np.random.Generator, _: Extras) -> np.ndarray:
    return 255 * (x / 255 + sd * rng.standard_normal(x.shape))


def shot_noise(x: np.ndarray, photons: float, rng: np.random.Generator, _: Extras) -> np.ndarray:
    return 255 * (rng.poisson(x / 255 * photons) / photons)


def impulse_noise(x: np.ndarray, share: float, rng: np.random.Generator, _: Extras) -> np.ndarray:
    """Values replaced by black or white at even odds."""
    is_hit, is_white = rng.random(x.shape) <= share, rng.random(x.shape) <= .5
    return np.where(is_hit, 255.0 * is_white, x)


def defocus_blur(x: np.ndarray, c: tuple[float, float], _: np.random.Generator, __: Extras) -> np.ndarray:
    return 255 * pieces.filtered(x / 255, pieces.disk(*c))


def glass_blur(x: np.ndarray, c: tuple[float, int, int], rng: np.random.Generator, extras: Extras) -> np.ndarray:
    sd, reach, passes = c
    inner = len(x) - 2 * reach
    draws = rng.integers(-reach, reach, (passes, inner, inner, 2))
    blurred = (255 * pieces.gaussian(x / 255, sd)).astype(np.uint8)
    moved = pieces.exchanged(blurred, reach, passes, draws, copy=extras.exchange == "copy")
    return 255 * pieces.gaussian(moved / 255, sd)


def motion_blur(x: np.ndarray, c: tuple[int, float], rng: np.random.Generator, _: Extras) -> np.ndarray:
    return pieces.motion(x, *c, rng.uniform(-45, 45))


def zoom_factors(c: tuple[float, float]) -> np.ndarray:
    """numpy.arange, whose rounding decides whether the last factor is in."""
    stop, step = c
    return np.arange(1, stop, step)


def zoom_blur(x: np.ndarray, c: tuple[float, float], _: np.random.Generator, __: Extras) -> np.ndarray:
    clean, factors = (x / 255).astype(np.float32), zoom_factors(c)
    total = np.zeros_like(clean)
    for factor in factors:
        total += pieces.zoomed(clean, factor)
    return 255 * ((clean + total) / (len(factors) + 1))


def snow(x: np.ndarray, c: tuple[float, ...], rng: np.random.Generator, _: Extras) -> np.ndarray:
    """Flakes of normal noise (mean, sd), enlarged, cut below a threshold, blurred along their fall (radius, sd), laid
    on the image and on its other end, over an image that is whitened (share left)."""
    mean, sd, zoom, threshold, radius, blur, left = c
    noise, angle = rng.standard_normal(x.shape[:2]), rng.uniform(-135, -45)
    flakes = pieces.zoomed(mean + sd * noise, zoom)
    flakes = (255 * np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)).astype(np.uint8)
    flakes = pieces.motion(flakes, int(radius), blur, angle)[..., None] / 255
    clean = x / 255
    white = np.maximum(clean, (clean * pieces.GREY).sum(axis=2, keepdims=True) * 1.5 + .5)
    return 255 * (left * clean + (1 - left) * white + flakes + np.rot90(flakes, 2))


def frost(x: np.ndarray, c: tuple[float, float], rng: np.random.Generator, extras: Extras) -> np.ndarray:
    """A square of a picture of frost added to the image."""
    picture = extras.frost[rng.integers(len(extras.frost))]
    if extras.small_frost:
        picture = picture[FROST_STEP // 2::FROST_STEP, FROST_STEP // 2::FROST_STEP]
    side = len(x)
    top, start = (int(rng.integers(0, length - side)) for length in picture.shape[:2])
    return c[0] * x + c[1] * picture[top:top + side, start:start + side]


def fog(x: np.ndarray, c: tuple[float, float], rng: np.random.Generator, _: Extras) -> np.ndarray:
    amount, decay = c
    side, clean = len(x), x / 255
    haze = pieces.plasma(1 << (side - 1).bit_length(), decay, rng)[:side, :side, None]
    return 255 * (clean + amount * haze) * clean.max() / (clean.max() + amount)


def brightness(x: np.ndarray, more: float, _: np.random.Generator, __: Extras) -> np.ndarray:
    """HSV value v raised to v' = min(v + more, 1). Hue and saturation stay, so every channel is times v' / v; black has
    no hue and becomes grey."""
    clean = x / 255
    value = clean.max(axis=2, keepdims=True)
    raised = np.minimum(value + more, 1)
    return 255 * np.where(value > 0, clean * (raised / np.where(value > 0, value, 1)), raised)


def contrast(x: np.ndarray, factor: float, _: np.random.Generator, __: Extras) -> np.ndarray:
    clean = x / 255
    means = clean.mean(axis=(0, 1), keepdims=True)
    return 255 * ((clean - means) * factor + means)


def elastic_transform(x: np.ndarray, c: tuple[float, ...], rng: np.random.Generator, _: Extras) -> np.ndarray:
    """Three points of a square moved at random, then every pixel by a smooth field of amplitude alpha."""
    alpha, sd, most = c
    side, clean = len(x), (x / 255).astype(np.float32)
    middle, square = side // 2, side // 3
    before = np.array([[middle + square, middle + square], [middle + square, middle - square],
                       [middle - square, middle - square]], np.float32)
    moved = pieces.affine(clean, before, before + (most * rng.uniform(-1, 1, (3, 2))).astype(np.float32))
    across, down = (alpha * pieces.gaussian(rng.uniform(-1, 1, (side, side)), sd, mode="reflect", truncate=3)
                    for _ in range(2))
    rows, columns = np.mgrid[:side, :side]
    at = np.stack([rows + down, columns + across])
    return 255 * np.stack([ndimage.map_coordinates(moved[..., one], at, order=1, mode="reflect")
                           for one in range(3)], axis=-1)


def pixelate(x: np.ndarray, share: float, _: np.random.Generator, __: Extras) -> np.ndarray:
    side, small = len(x), max(1, int(len(x) * share))
    box = Image.Resampling.BOX
    return np.asarray(Image.fromarray(x).resize((small, small), box).resize((side, side), box))


def jpeg_compression(x: np.ndarray, quality: int, _: np.random.Generator, __: Extras) -> np.ndarray:
    return through_jpeg(x, quality)


def through_jpeg(x: np.ndarray, quality: int) -> np.ndarray:
    """uint8 image as a JPEG file has it."""
    sink = io.BytesIO()
    Image.fromarray(x).save(sink, "JPEG", quality=quality)
    with Image.open(sink) as found:
        return np.asarray(found)


TYPES: Mapping[str, Corruption] = {one.__name__: one for one in (
    gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, snow, frost, fog,
    brightness, contrast, elastic_transform, pixelate, jpeg_compression)}
