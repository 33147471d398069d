"""MixUp, CutMix, CMO and label smoothing of a training step, the same for any number of workers.

One draw of MixUp or CutMix per optimiser step, keyed by (seed, step), mixes image i of the global batch of B with image
B-1-i (timm's pairing). A worker's slice holds every image together with its partner, in an order in which flipping the
slice gives the partners, so W workers mix exactly what one process mixes and exchange nothing. With `mix_per: image`
each image has a draw of its own, which the loader keys by the image. The partners of CMO come from a second batch,
which the loader draws and pastes.

    here              meaning, unit
    lam               share of the image itself, and of its label; 1 - lam is the partner's
    box               top, bottom, left, right of the pasted rectangle, pixels
    s                 smoothing, share of the label mass
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from rayexpand.classifier.recipe import Recipe, cmo_is_on
from rayexpand.classifier.seed_mixing import clipped_box
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
    if not (recipe.mixup or recipe.cutmix) or recipe.mix_per == "image":
        return None
    return _drawn(recipe, generator(row_key(seed, "classifier", "", step, 0, "mix")), size)


def draw_image_mix(recipe: Recipe, rng: np.random.Generator, size: int) -> tuple[float, int, int, int, int]:
    """The mix of one image as its share and the box of its partner, which is empty for MixUp; 1 and an empty box leave
    it as it is."""
    mix = _drawn(recipe, rng, size)
    return (1.0, 0, 0, 0, 0) if mix is None else (mix.lam, *(mix.box or (0, 0, 0, 0)))


def _drawn(recipe: Recipe, rng: np.random.Generator, size: int) -> Mix | None:
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
    top, bottom, left, right = clipped_box(lam, center, size)
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


def apply_image_mixes(x_BCHW: torch.Tensor, y_BK: torch.Tensor, mix_B5: torch.Tensor
                      ) -> tuple[torch.Tensor, torch.Tensor]:
    """As `apply_mix`, each image by its own row of (share of itself, top, bottom, left, right)."""
    lam_B, (top, bottom, left, right) = mix_B5[:, 0], mix_B5[:, 1:].T[:, :, None, None, None]
    row_H1, column_W = (torch.arange(side, device=x_BCHW.device) for side in x_BCHW.shape[2:])
    is_box = (row_H1[:, None] >= top) & (row_H1[:, None] < bottom) & (column_W >= left) & (column_W < right)
    keeps = torch.where((bottom > top) & (right > left), 1.0, lam_B[:, None, None, None])
    x = torch.where(is_box, x_BCHW.flip(0), keeps * x_BCHW + (1 - keeps) * x_BCHW.flip(0))
    return x, lam_B[:, None] * y_BK + (1 - lam_B[:, None]) * y_BK.flip(0)


def mixed(recipe: Recipe, seed: int, step: int, x_BCHW: torch.Tensor, y_BK: torch.Tensor,
          mix_B5: np.ndarray | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of a slice as the network is shown them, before smoothing."""
    if mix_B5 is not None:
        x_BCHW, y_BK = apply_image_mixes(x_BCHW, y_BK, torch.from_numpy(mix_B5).to(x_BCHW.device))
    return apply_mix(x_BCHW, y_BK, draw_mix(recipe, seed, step, x_BCHW.shape[-1]))


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
