"""MixUp, CutMix, CMO and label smoothing of a training step, the same for any number of workers.

One draw of MixUp or CutMix per optimiser step, keyed by (seed, step), mixes image i of the global batch of B with image
B-1-i (timm's pairing). A worker's slice holds every image together with its partner, in an order in which flipping the
slice gives the partners, so W workers mix exactly what one process mixes and exchange nothing. The partners of CMO come
from a second batch, which the loader draws and pastes.

    here              meaning, unit
    lam               share of the image itself, and of its label; 1 - lam is the partner's
    box               top, bottom, left, right of the pasted rectangle, pixels
    s                 smoothing, share of the label mass
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from rayexpand.classifier.recipe import Recipe, cmo_is_on
from rayexpand.contract.rng import generator, row_key


@dataclass(frozen=True, slots=True)
class Mix:
    """How one batch is mixed. With a box: CutMix, and `lam` is the share of pixels outside the box as clipped."""

    lam: float
    box: tuple[int, int, int, int] | None


def worker_rows(batch: int, rank: int, world: int) -> np.ndarray:
    """int64 positions in a global batch of `batch` that worker `rank` of `world` holds, in its order: all of them for
    one worker, else two runs mirrored about the middle, [r h, (r+1) h) and [B-(r+1) h, B-r h) with h = B / 2W."""
    if world == 1:
        return np.arange(batch)
    assert batch % (2 * world) == 0, "a batch is dealt in pairs"
    half = batch // (2 * world)
    return np.concatenate([np.arange(rank * half, (rank + 1) * half),
                           np.arange(batch - (rank + 1) * half, batch - rank * half)])


def draw_mix(recipe: Recipe, seed: int, step: int, size: int) -> Mix | None:
    """The mix of optimiser step `step` for images of `size` pixels square; None where the batch stays as it is.

    With both alphas set MixUp and CutMix take even odds (timm's switch_prob). Everything is drawn, used or not, so
    that the settings of one do not move the draws of another.
    """
    if not recipe.mixup and not recipe.cutmix:
        return None
    rng = generator(row_key(seed, "classifier", "", step, 0, "mix"))
    mixes, cuts = rng.random() < recipe.mix_probability, rng.random() < 0.5
    top, left = (int(v) for v in rng.integers(size, size=2))
    if not mixes:
        return None
    use_box = bool(recipe.cutmix) and (cuts or not recipe.mixup)
    alpha = recipe.cutmix if use_box else recipe.mixup
    lam = float(rng.beta(alpha, alpha))
    return cut(lam, (top, left), size) if use_box else Mix(lam, None)


def draw_paste(recipe: Recipe, seed: int, step: int, total_steps: int, size: int) -> Mix | None:
    """CMO (Park et al. 2022) at an optimiser step: the box, of Beta(1, 1), that is filled from a tail-weighted batch;
    None where the batch stays as it is."""
    if not cmo_is_on(recipe, step, total_steps):
        return None
    rng = generator(row_key(seed, "classifier", "", step, 0, "cmo"))
    pastes, lam = rng.random() < recipe.cmo, float(rng.beta(1, 1))
    top, left = (int(v) for v in rng.integers(size, size=2))
    return cut(lam, (top, left), size) if pastes else None


def cut(lam: float, center: tuple[int, int], size: int) -> Mix:
    """CutMix (Yun et al. 2019): box of side size x sqrt(1 - lam) about `center` (row, column), clipped to the image."""
    side = int(size * math.sqrt(1 - lam))
    (top, bottom), (left, right) = ((max(0, at - side // 2), min(size, at + (side + 1) // 2)) for at in center)
    return Mix(1 - (bottom - top) * (right - left) / size**2, (top, bottom, left, right))


def apply_mix(x_BCHW: torch.Tensor, y_BK: torch.Tensor, mix: Mix | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels mixed with their partners: the slice itself, flipped."""
    if mix is None:
        return x_BCHW, y_BK
    y = mix.lam * y_BK + (1 - mix.lam) * y_BK.flip(0)
    if mix.box is None:
        return mix.lam * x_BCHW + (1 - mix.lam) * x_BCHW.flip(0), y
    top, bottom, left, right = mix.box
    x = x_BCHW.clone()
    x[:, :, top:bottom, left:right] = x_BCHW.flip(0)[:, :, top:bottom, left:right]
    return x, y


def smooth(y_BK: torch.Tensor, smoothing: float, mode: str) -> torch.Tensor:
    """Smoothed labels (B, K) of one-hot or soft ones.

    all: s / K everywhere (timm, torch). others: s / (K - 1) on the mass a label does not hold, so one-hot rows keep
    1 - s; sums to 1. reference: Diff-Mix's released code, s / (K - 1) everywhere; sums to 1 + s / (K - 1).
    """
    if not smoothing:
        return y_BK
    classes = y_BK.shape[1]
    kept = (1 - smoothing) * y_BK
    if mode == "all":
        return kept + smoothing / classes
    rest = 1 - y_BK if mode == "others" else torch.ones_like(y_BK)
    return kept + smoothing * rest / (classes - 1)
