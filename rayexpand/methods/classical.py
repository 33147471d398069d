"""Classical augmentation, applied offline: the baselines without a generator.

Every sample is one augmented copy of its seed, at the size of the seed. Which operation, how strong and where is drawn
from the keyed stream "ops" of the row (classifier/augment.py holds the two learned policies). A copy of one colour
only, such as black on white after Solarize, is drawn again, the learned policies then without such operations.

    policy            source                                     what is drawn
    randaugment       Cubuk et al. 2020; torchvision             `num_ops` operations at one magnitude, signs
    autoaugment       Cubuk et al. 2019, ImageNet policy         one of 25 pairs of operations, whether, signs
    cutout            DeVries and Taylor 2017                    centre of a square hole, which may hang over the border
    random_erasing    Zhong et al. 2020; torchvision             whether, area, aspect and place of a rectangle
    gridmask          Chen et al. 2020, as DistDiff runs it      period, phase and rotation of a grid of square holes
    standard          DistDiff's default training transform      rotation, crop of 7/8 of each side

    here              meaning, unit
    magnitude         index into the bins of an operation's range
    d, hole           period of the grid and side of its holes, pixels
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from rayexpand.classifier import augment
from rayexpand.contract.protocols import Batch, Expansion, Tools
from rayexpand.contract.rng import PlanRng, RowRng
from rayexpand.contract.schema import ClassTable, Draw, SeedIndex, Start
from rayexpand.contract.settings import Section
from rayexpand.methods._copies import quota_copies, ratio_copies

Policy = Literal["randaugment", "autoaugment", "cutout", "random_erasing", "gridmask", "standard"]
Colour = tuple[int, int, int]
_TRIES = 10  # of drawing a copy again that had one colour only; then the row fails


class Classical(Section):
    """Settings of classical augmentation. A field that names a policy in its description has no effect on others."""

    name: Literal["classical"] = "classical"
    policy: Policy = Field("randaugment", description="which augmentation")
    ratio: float = Field(5.0, gt=0, le=65535, description="copies of each seed; 2.5 gives half of each class a third "
                         "copy (GIF: 5 on CIFAR100-S)")
    quota: int | None = Field(None, ge=1, description="samples per class, instead of `ratio`")
    probability: float | None = Field(None, ge=0, le=1, description="chance that a copy is augmented at all; none: 0.5 "
                                      "for random_erasing (torchvision), else 1, since a copy left alone adds nothing "
                                      "offline")
    flip: bool = Field(False, description="also mirror half of the copies left to right, whatever the policy; off "
                       "because digits and letters must not be mirrored")
    num_ops: int = Field(2, ge=1, le=10, description="randaugment: operations per copy (DistDiff: 2)")
    magnitude: int = Field(9, ge=0, description="randaugment: bin of the range, below `bins` (DistDiff: 9)")
    bins: int = Field(31, ge=2, description="randaugment: bins of a range (torchvision: 31)")
    cutout_size: float = Field(0.5, gt=0, le=1, description="cutout: side of the hole as a share of the shorter side "
                               "(16 of 32 pixels on CIFAR-10 in the paper)")
    gridmask_keep: float = Field(0.6, gt=0, lt=1, description="gridmask: share of the period that is kept (DistDiff: "
                                 "0.6)")
    fill: Colour = Field((0, 0, 0), description="colour of holes; (124, 116, 104) is what 0 is after ImageNet "
                         "normalisation")

    @model_validator(mode="after")
    def _checked(self) -> Classical:
        if self.magnitude >= self.bins:
            raise ValueError(f"magnitude {self.magnitude} must be below bins {self.bins}")
        if not all(0 <= value <= 255 for value in self.fill):
            raise ValueError(f"fill {self.fill} must be three numbers from 0 to 255")
        return self

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        images: list[np.ndarray | None] = [self._augment(image, rng("ops"))
                                           for image, rng in zip(batch.images, batch.rngs, strict=True)]
        return Expansion(images, [None] * len(batch))

    def _augment(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.flip and rng.random() < 0.5:
            image = np.ascontiguousarray(image[:, ::-1])
        default = 0.5 if self.policy == "random_erasing" else 1.0
        if rng.random() >= (default if self.probability is None else self.probability):
            return image
        changed = self._changed(image, rng)
        if not augment.is_blank(changed) or augment.is_blank(image):
            return changed
        for _ in range(_TRIES):
            if not augment.is_blank(changed := self._changed(image, rng, spare=True)):
                break
        return changed  # blank after every try: the row fails and is counted

    def _changed(self, image: np.ndarray, rng: np.random.Generator, spare: bool = False) -> np.ndarray:
        if self.policy == "randaugment":
            return augment.randaugment(image, rng, self.num_ops, self.magnitude, self.bins, spare=spare)
        if self.policy == "autoaugment":
            return augment.autoaugment(image, rng, spare=spare)
        if self.policy == "standard":
            return _standard(image, rng)
        if self.policy == "cutout":
            hole = _cutout(image.shape[:2], rng, self.cutout_size)
        elif self.policy == "gridmask":
            hole = augment.gridmask(image.shape[:2], rng, self.gridmask_keep)
        else:
            hole = _erased(image.shape[:2], rng)
        return np.where(hole[..., None], np.array(self.fill, np.uint8), image)

    def needs(self) -> frozenset[str]:
        return frozenset()

    def copies(self, index: SeedIndex, rng: PlanRng) -> np.ndarray:
        if self.quota is None:
            return ratio_copies(index, self.ratio, rng)
        return quota_copies(index, np.full(len(index.classes), self.quota), rng)

    def draw(self, seed_id: str, label: int, copy: int, row: int, classes: ClassTable, rng: RowRng) -> Draw:
        return Draw(sample_id=f"{seed_id}/{copy}", seed_id=seed_id, copy=copy, source_label=label, target_label=label,
                    prompt="", negative="", start=Start.IMAGE, strength=0.0, steps_run=0, attempt=0, row=row,
                    group=copy)

    def group(self, copies: int) -> int:
        return 1

    def batch_key(self, draw: Draw) -> tuple[Any, ...]:
        return ()

    def soft_label(self, source: np.ndarray, target: np.ndarray, strength: np.ndarray, n_classes: int,
                   **recipe: float) -> np.ndarray:
        return np.eye(n_classes, dtype=np.float32)[target]


def _standard(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rotation by up to 15 degrees, then a random crop of 7/8 of each side (224 of 256), back at the first size."""
    from torchvision.transforms.v2 import InterpolationMode, functional

    height, width = image.shape[:2]
    picture = functional.rotate(Image.fromarray(image), float(rng.uniform(-15, 15)), InterpolationMode.BILINEAR)
    crop_h, crop_w = max(1, round(height * 7 / 8)), max(1, round(width * 7 / 8))
    top, left = int(rng.integers(height - crop_h + 1)), int(rng.integers(width - crop_w + 1))
    return np.array(functional.resized_crop(picture, top, left, crop_h, crop_w, [height, width],
                                            InterpolationMode.BICUBIC))


def _rectangle(shape: tuple[int, ...], top: int, left: int, height: int, width: int) -> np.ndarray:
    """bool (H, W), True inside the rectangle; what lies outside the image is cut off."""
    hole = np.zeros(shape, bool)
    hole[max(top, 0):max(top + height, 0), max(left, 0):max(left + width, 0)] = True
    return hole


def _cutout(shape: tuple[int, ...], rng: np.random.Generator, size: float) -> np.ndarray:
    side = max(1, round(size * min(shape)))
    row, column = (int(rng.integers(length)) for length in shape)
    return _rectangle(shape, row - side // 2, column - side // 2, side, side)


def _erased(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Area uniform on 2 to 33 %, aspect log-uniform on 0.3 to 3.3; after ten that do not fit, nothing is erased."""
    height, width = shape
    for _ in range(10):
        area = height * width * rng.uniform(0.02, 0.33)
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            return _rectangle(shape, int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)
    return np.zeros(shape, bool)
