"""Counting what a classifier costs: its network is built as it is before it is trained, no weight is read, and it is
called on fake tensors, which have shapes and no content. Counted as torch's FlopCounterMode counts: matrix products,
convolutions and attention."""

from __future__ import annotations

from copy import deepcopy
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from rayexpand.classifier.backbones import build_backbone
from rayexpand.classifier.recipe import Recipe

VIEWS = 3  # of one image, where AugMix compares its answers for them


class ClassifierWork(NamedTuple):
    """TFLOP of one image: shown once in training, forward and backward to all weights; and answered in a test."""

    train: float
    answer: float


def count_classifier(recipe: Recipe, n_classes: int) -> ClassifierWork:
    """Raises ConfigError for a backbone or argument that does not exist."""
    built, mode = build_backbone(recipe.model_copy(update={"checkpoint": None}), n_classes, 0), FakeTensorMode()
    with FakeCopyMode(mode):
        model = deepcopy(built).train()
    with mode:
        with FlopCounterMode(display=False) as training:
            model(torch.zeros(2, 3, recipe.size, recipe.size)).sum().backward()
        model.eval()
        side = recipe.test_size or recipe.size
        with torch.no_grad(), FlopCounterMode(display=False) as answering:
            model(torch.zeros(2, 3, side, side))
    views = VIEWS if recipe.jsd else 1
    return ClassifierWork(views * training.get_total_flops() / 2e12, answering.get_total_flops() / 2e12)
