"""Mixing a training row with a real image: its own seed, or another one of its class (Islam and Akhtar 2025,
DiffCoRe-Mix, equations 6 to 8).

Both images are brought to the square the classifier sees, then mixed, then flipped and coloured; numpy only. A row has
one stream for it, from which everything is drawn in one order, used or not: whether, pixel or patch, which image gives
the box, its size, row and column, which partner, and last lambda, whose law takes a varying number of numbers.

    paper             here              meaning, unit
    I, G              real, sample      the real image; the row that is trained
    eta               is_pixel          1: pixel mixing, 0: patch mixing
    lambda            lam               share of the real image in a pixel mix: lambda I + (1 - lambda) G
    M_p               box               top, bottom, left, right of a rectangle, pixels: of the real image on the
                                        sample, or of the sample on the real image
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from rayexpand.contract.settings import Section

Box = tuple[int, int, int, int]


class SeedMix(Section):
    """How rows are mixed with a real image. The paper gives neither the law of lambda nor that of the mask."""

    pixel: float = Field(0.5, ge=0, le=1, description="share of the mixed rows that are blended pixel by pixel, the "
                         "rest by patch (DiffCoRe-Mix: a fair coin)")
    alpha: float = Field(1.0, gt=0, description="of Beta(alpha, alpha), from which the weight of the real image is "
                         "drawn in a blend (the paper gives no law; 1, uniform: ours)")
    patch: Literal["clipped", "inside"] = Field(
        "clipped", description="clipped: the box of CutMix about any pixel, cut at the borders, 0.32 of the area in "
        "the mean (ours; the paper: of varying size); inside: placed whole, 0.5")
    partner: Literal["seed", "class"] = Field(
        "seed", description="seed: the real image a sample was made from; class: another real image of its class, also "
        "for an arm of real rows alone (ours, for the ablation's mixing without generated images)")
    probability: float = Field(
        1.0, gt=0, le=1, description="share of these rows that are mixed, others in each epoch (the paper mixes all "
        "that it generates)")

    def draw(self, rng: np.random.Generator, size: int) -> tuple[Mixture | None, float]:
        """How a row is mixed on a canvas of `size` pixels, None where it is not; and a number on [0, 1) that says with
        which real image of its class."""
        mixes, is_pixel, is_real, lam_p, row, column, which = rng.random(7).tolist()
        lam = float(rng.beta(self.alpha, self.alpha))
        if mixes >= self.probability:
            return None, which
        if is_pixel < self.pixel:
            return Mixture(lam, None), which
        box = (clipped_box(lam_p, (int(row * size), int(column * size)), size) if self.patch == "clipped" else
               inside_box(lam_p, (row, column), size))
        share = (box[1] - box[0]) * (box[3] - box[2]) / size**2
        return Mixture(share if is_real < 0.5 else 1 - share, box, is_real < 0.5), which


@dataclass(frozen=True, slots=True)
class Mixture:
    """One mix; `lam` is the share of the real image, of its pixels where there is a box."""

    lam: float
    box: Box | None
    is_real_inside: bool = True

    def of(self, sample_HWC: np.ndarray, real_HWC: np.ndarray) -> np.ndarray:
        """The mix of two images of one shape; blends of uint8 are rounded to the nearest level."""
        if self.box is None:
            found = np.float32(self.lam) * real_HWC + np.float32(1 - self.lam) * sample_HWC
            return np.rint(found).astype(np.uint8) if sample_HWC.dtype == np.uint8 else found
        inside, outside = (real_HWC, sample_HWC) if self.is_real_inside else (sample_HWC, real_HWC)
        top, bottom, left, right = self.box
        found = outside.copy()
        found[top:bottom, left:right] = inside[top:bottom, left:right]
        return found


def clipped_box(lam: float, center: tuple[int, int], size: int) -> Box:
    """CutMix (Yun et al. 2019): side size x sqrt(1 - lam) about `center` (row, column), clipped to the image."""
    side = int(size * math.sqrt(1 - lam))
    (top, bottom), (left, right) = ((max(0, at - side // 2), min(size, at + (side + 1) // 2)) for at in center)
    return top, bottom, left, right


def inside_box(lam: float, place: tuple[float, float], size: int) -> Box:
    """A box of the same side wholly in the image; `place` on [0, 1)^2 says where among the places it can have."""
    side = int(size * math.sqrt(1 - lam))
    top, left = (int(at * (size - side + 1)) for at in place)
    return top, top + side, left, left + side
