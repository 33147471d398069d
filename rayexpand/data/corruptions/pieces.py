"""Filters and maps that corruptions are made of, with numpy, SciPy and Pillow.

    symbol    here      meaning, unit
    r         radius    pixels
    s         sd        standard deviation, pixels
    a         angle     degrees, 0 along a row
    i         i         tap of a one-sided blur, 0 .. 2r

Images are float (H, W, 3) or (H, W) unless a function says otherwise. Where the released code calls OpenCV, borders are
mirrored without repeating the edge (`mirror` of SciPy, reflect-101 of OpenCV).
"""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

GREY = np.array([.299, .587, .114])  # of red, green, blue
ALONE = 8  # up to this radius the disk lies on a grid of 17 x 17 and its edge is blurred by 3 x 3 taps, else by 5 x 5


def gaussian(x: np.ndarray, sd: float, *, mode: str = "nearest", truncate: float = 4.0) -> np.ndarray:
    """Gaussian blur of each channel; as it is for sd 0. The defaults are those of scikit-image."""
    sds = (sd, sd, 0)[:x.ndim]
    return ndimage.gaussian_filter(x, sds, mode=mode, truncate=truncate) if sd > 0 else x


def disk(radius: float, sd: float) -> np.ndarray:
    """float (n, n): a disk of weight 1 whose edge is blurred."""
    reach, taps = (ALONE, 3) if radius <= ALONE else (int(radius), 5)
    grid = np.arange(-reach, reach + 1)
    flat = (grid[:, None] ** 2 + grid ** 2 <= radius ** 2).astype(np.float64)
    weights = np.exp(-(np.arange(taps) - taps // 2) ** 2 / (2 * sd ** 2))
    weights /= weights.sum()
    return ndimage.correlate(flat / flat.sum(), np.outer(weights, weights), mode="mirror")


def filtered(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Each channel correlated with a kernel; rows and columns without weight are not read."""
    rows, columns = np.flatnonzero(kernel.any(axis=1)), np.flatnonzero(kernel.any(axis=0))
    reach = len(kernel) // 2
    inner = max(reach - min(rows[0], columns[0]), max(rows[-1], columns[-1]) - reach)
    kernel = kernel[reach - inner:reach + inner + 1, reach - inner:reach + inner + 1]
    return ndimage.correlate(x, kernel[..., None] if x.ndim == 3 else kernel, mode="mirror")


def motion(x: np.ndarray, radius: int, sd: float, angle: float) -> np.ndarray:
    """Values 0..255 blurred to one side, as ImageMagick does, which rounds: weights w_i = exp(-i^2 / 2 s^2) of sum 1,
    tap i read at (x + ceil(i cos a - 1/2), y + ceil(i sin a - 1/2)), edges repeated."""
    i, turned = np.arange(2 * radius + 1), math.radians(angle)
    weights = np.exp(-i ** 2 / (2 * sd ** 2))
    weights /= weights.sum()
    across = np.ceil(i * math.cos(turned) - .5).astype(int)
    down = np.ceil(i * math.sin(turned) - .5).astype(int)
    pad, (height, width) = 2 * radius + 1, x.shape[:2]
    padded = np.pad(x.astype(np.float64), [(pad, pad), (pad, pad), (0, 0)][:x.ndim], mode="edge")
    total = np.zeros(x.shape)
    for weight, dx, dy in zip(weights, across, down, strict=True):
        total += weight * padded[pad + dy:pad + dy + height, pad + dx:pad + dx + width]
    return np.floor(total + .5)


def zoomed(x: np.ndarray, factor: float) -> np.ndarray:
    """The middle of a square image enlarged to its size: linear, corners onto corners (SciPy's `zoom` of order 1)."""
    side = len(x)
    cut = math.ceil(side / factor)
    top, large = (side - cut) // 2, round(cut * factor)
    trim, found = (large - side) // 2, x[top:top + cut, top:top + cut]
    for axis in (0, 1):
        found = _enlarged(found, axis, large)
    return found[trim:trim + side, trim:trim + side]


def _enlarged(x: np.ndarray, axis: int, large: int) -> np.ndarray:
    at = np.arange(large) * ((x.shape[axis] - 1) / max(1, large - 1))
    low = np.minimum(at.astype(int), x.shape[axis] - 1)
    share = (at - low).astype(x.dtype).reshape([-1 if one == axis else 1 for one in range(x.ndim)])
    below, above = x.take(low, axis), x.take(np.minimum(low + 1, x.shape[axis] - 1), axis)
    return below + share * (above - below)


def plasma(side: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """float (side, side) in 0..1: a map by diamonds and squares that repeats at its edges; `side` is a power of two.
    Wobble falls by `decay` with each halving; the draws do not depend on it."""
    assert side & (side - 1) == 0
    found, step, wobble = np.zeros((side, side)), side, 100.0

    def wobbled(total: np.ndarray) -> np.ndarray:
        return total / 4 + wobble * rng.uniform(-1, 1, total.shape) * wobble

    while step >= 2:
        half = step // 2
        corners = found[::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=0)
        found[half::step, half::step] = wobbled(pairs + np.roll(pairs, -1, axis=1))
        middles = found[half::step, half::step]
        found[::step, half::step] = wobbled(middles + np.roll(middles, 1, axis=0) + corners
                                            + np.roll(corners, -1, axis=1))
        found[half::step, ::step] = wobbled(middles + np.roll(middles, 1, axis=1) + corners
                                            + np.roll(corners, -1, axis=0))
        step, wobble = half, wobble / decay
    found -= found.min()
    return found / found.max()


def affine(x: np.ndarray, before_32: np.ndarray, after_32: np.ndarray) -> np.ndarray:
    """The image moved so that three points (x, y) come from `before` to `after`; linear, borders mirrored."""
    to_before = np.linalg.solve(np.c_[after_32, np.ones(3)], before_32).T  # (2, 3): where each pixel is read
    matrix, offset = to_before[::-1, 1::-1], to_before[::-1, 2]  # of (y, x)
    return np.stack([ndimage.affine_transform(x[..., one], matrix, offset, order=1, mode="mirror")
                     for one in range(x.shape[-1])], axis=-1)


def exchanged(x: np.ndarray, reach: int, passes: int, draws: np.ndarray, *, copy: bool) -> np.ndarray:
    """Pixels moved about: from the last to the first, each takes a pixel at most `reach` away. `copy`: that pixel stays
    where it is too, as in the released code, whose exchange writes one view over another; else both change places.

    `draws` is int (passes, n, n, 2), columns and rows in -reach .. reach - 1, for the n x n pixels that have all of
    their surroundings.
    """
    side = len(x)
    inner = np.arange(side - reach, reach, -1)
    at = (inner[:, None] * side + inner).ravel().tolist()
    source = list(range(side * side))
    for step in range(passes):
        beside = (draws[step, ..., 1] * side + draws[step, ..., 0]).ravel().tolist()
        for here, shift in zip(at, beside, strict=True):
            there = here + shift
            source[here], source[there] = source[there], source[there] if copy else source[here]
    return x.reshape(side * side, -1)[source].reshape(x.shape)
