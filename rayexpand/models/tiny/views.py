"""Changed views of training images, on float32 (B, 3, H, W) batches in [0, 1] with keyed draws.

    drawings   ink on paper, where neither colour nor a small turn changes what is shown
    photos     natural images, where mirroring and light do not
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

View = Callable[[torch.Tensor, np.random.Generator], torch.Tensor]


def shift_and_turn(x_B3HW: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Turn by up to 15 degrees, scale by up to 15 %, shift by up to an eighth of the side."""
    angle, size, dx, dy = (_uniforms(rng, x_B3HW, 4, len(x_B3HW)) * 2 - 1) * torch.tensor(
        [[0.26], [0.15], [0.25], [0.25]], device=x_B3HW.device)
    cos, sin = torch.cos(angle) * (1 + size), torch.sin(angle) * (1 + size)
    theta = torch.stack([torch.stack([cos, -sin, dx], -1), torch.stack([sin, cos, dy], -1)], 1)
    grid = F.affine_grid(theta, list(x_B3HW.shape), align_corners=False)
    return F.grid_sample(x_B3HW, grid, align_corners=False)


def turn_and_flip(x_B3HW: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Turn each row by a random multiple of 90 degrees and mirror half of the rows."""
    turns, flips = rng.integers(4, size=len(x_B3HW)), rng.random(len(x_B3HW)) < 0.5
    rows = [torch.rot90(x, int(k), (1, 2)) for x, k in zip(x_B3HW, turns, strict=True)]
    return torch.stack([x.flip(2) if flip else x for x, flip in zip(rows, flips, strict=True)])


def recolour(x_B3HW: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """30 % of rows stay grey, 25 % are inverted, 45 % get a random ink and a random paper colour."""
    kind = _uniforms(rng, x_B3HW, len(x_B3HW), 1, 1, 1)
    ink, paper = _uniforms(rng, x_B3HW, 2, len(x_B3HW), 3, 1, 1)
    coloured = paper + x_B3HW * (ink - paper)
    return torch.where(kind < 0.3, x_B3HW, torch.where(kind < 0.55, 1 - x_B3HW, coloured))


def flip(x_B3HW: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Mirror half of the rows."""
    return torch.where(_uniforms(rng, x_B3HW, len(x_B3HW), 1, 1, 1) < 0.5, x_B3HW, x_B3HW.flip(3))


def shift(x_B3HW: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Move each row by whole pixels, up to an eighth of the side; what comes in is mirrored at the edge."""
    height, width = x_B3HW.shape[2:]
    by = max(1, width // 8)
    padded = F.pad(x_B3HW, (by, by, by, by), mode="reflect")
    corners = rng.integers(2 * by + 1, size=(len(x_B3HW), 2)).tolist()
    return torch.stack([x[:, top:top + height, left:left + width]
                        for x, (top, left) in zip(padded, corners, strict=True)])


def relight(x_B3HW: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Brightness, contrast and saturation of each row by factors of 0.6 to 1.4."""
    bright, contrast, saturation = 0.6 + 0.8 * _uniforms(rng, x_B3HW, 3, len(x_B3HW), 1, 1, 1)
    x = x_B3HW * bright
    x = x.mean((1, 2, 3), keepdim=True).lerp(x, contrast)
    return x.mean(1, keepdim=True).lerp(x, saturation).clamp(0, 1)


# What half of a batch is shown as, by `augment`, in the training of guide and autoencoder.
GUIDE: Mapping[str, tuple[View, ...]] = {
    "drawings": (shift_and_turn,), "photos": (flip, shift, relight), "none": ()}
AUTOENCODER: Mapping[str, tuple[View, ...]] = {
    "drawings": (turn_and_flip, recolour), "photos": (flip, relight), "none": ()}
MIRRORED = frozenset({"photos"})  # the generator too sees mirrored images


def half_changed(x_B3HW: torch.Tensor, views: tuple[View, ...], rng: np.random.Generator) -> torch.Tensor:
    """The first half of a batch as it is and the second changed by all `views`."""
    if not views:
        return x_B3HW
    half = len(x_B3HW) // 2
    changed = x_B3HW[half:]
    for view in views:
        changed = view(changed, rng)
    return torch.cat([x_B3HW[:half], changed])


def _uniforms(rng: np.random.Generator, like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.random(shape, dtype=np.float32)).to(like.device)
