"""Training a small image classifier on labelled uint8 images, in process.

Every run takes the same number of optimiser steps whatever the size of its training set, so arms that differ only in
data compare fairly. Images are drawn by epochs over keyed permutations, and each image's augmentation is keyed by
(seed, image, epoch).

    here              meaning, unit
    x_BCHW            images in [0, 1], minus 0.5
    shift             largest translation of the standard augmentation, pixels
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the customary name)

from rayexpand.core import augment
from rayexpand.rng import RowRng, generator, row_key


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train. Defaults are ours, measured on 16-pixel digits with 20 to 120 images."""

    steps: int = 200
    batch: int = 32
    lr: float = 0.01  # peak of a one-cycle schedule
    weight_decay: float = 5e-3
    label_smoothing: float = 0.1
    shift: int = 2
    randaugment: bool = False  # 2 operations at magnitude 9, after the shift
    width: int = 16


class SmallResNet(nn.Module):
    """3x3 stem and three residual blocks of width w, 2w, 4w; global average pooling. For images of 8 to 64 pixels."""

    def __init__(self, n_classes: int, width: int, rng: np.random.Generator) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(_Block(width, width, 1), _Block(width, 2 * width, 2),
                                    _Block(2 * width, 4 * width, 2))
        self.head = nn.Linear(4 * width, n_classes)
        _initialise(self, rng)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x_BCHW)).mean(dim=(2, 3)))


class _Block(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU(),
            nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer))
        self.skip = nn.Identity() if inner == outer and stride == 1 else nn.Sequential(
            nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(self.body(x_BCHW) + self.skip(x_BCHW))


def train(images: np.ndarray, labels: np.ndarray, n_classes: int, seed: int, recipe: Recipe) -> SmallResNet:
    """Classifier trained on uint8 (N, H, W, 3) `images` and int (N,) `labels`, in eval mode."""
    model = SmallResNet(n_classes, recipe.width, generator(row_key(seed, "classifier", "", 0, 0, "weights")))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW([{"params": decayed, "weight_decay": recipe.weight_decay},
                                   {"params": plain, "weight_decay": 0.0}], lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.lr, total_steps=recipe.steps)
    model.train()
    for x_BCHW, y_B in _batches(images, labels, seed, recipe):
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(model(x_BCHW), y_B, label_smoothing=recipe.label_smoothing).backward()
        optimiser.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of uint8 (N, H, W, 3) `images` that `model` labels right."""
    predicted = torch.cat([model(_tensor(images[i:i + 256])).argmax(1) for i in range(0, len(images), 256)])
    return float((predicted.numpy() == labels).mean())


def _batches(images: np.ndarray, labels: np.ndarray, seed: int, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """`recipe.steps` batches, drawn without replacement within each epoch."""
    queue: list[tuple[int, int]] = []
    epoch = 0
    for _ in range(recipe.steps):
        while len(queue) < recipe.batch:
            order = generator(row_key(seed, "classifier", "", epoch, 0, "order")).permutation(len(images))
            queue += [(int(i), epoch) for i in order]
            epoch += 1
        chosen, queue = queue[:recipe.batch], queue[recipe.batch:]
        batch = np.stack([_augmented(images[i], RowRng(seed, "classifier", str(i), epoch_of), recipe)
                          for i, epoch_of in chosen])
        yield _tensor(batch), torch.from_numpy(labels[[i for i, _ in chosen]].astype(np.int64))


def _augmented(image: np.ndarray, rng: RowRng, recipe: Recipe) -> np.ndarray:
    dy, dx = rng("shift").integers(-recipe.shift, recipe.shift + 1, size=2)
    padded = np.pad(image, ((recipe.shift,) * 2, (recipe.shift,) * 2, (0, 0)), mode="edge")
    height, width = image.shape[:2]
    shifted = padded[recipe.shift + dy:recipe.shift + dy + height, recipe.shift + dx:recipe.shift + dx + width]
    return augment.randaugment(shifted, rng("ops")) if recipe.randaugment else shifted


def _tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float().div_(255).sub_(0.5)


def _initialise(model: nn.Module, rng: np.random.Generator) -> None:
    """He-normal convolutions, uniform head; from `rng`, in parameter order."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 4:
            scale = math.sqrt(2 / (parameter.shape[0] * parameter.shape[2] * parameter.shape[3]))
            values = rng.standard_normal(parameter.shape, dtype=np.float32) * scale
        elif parameter.ndim == 2:
            bound = 1 / math.sqrt(parameter.shape[1])
            values = rng.uniform(-bound, bound, parameter.shape).astype(np.float32)
        else:
            values = np.full(parameter.shape, 1.0 if name.endswith("weight") else 0.0, np.float32)
        parameter.data.copy_(torch.from_numpy(values))
