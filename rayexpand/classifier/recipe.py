"""How a classifier is trained: one frozen recipe, the learning rate at every step, and the published presets.

No torch here, so a study can be checked before anything heavy is imported. An epoch is one pass over the training set;
where `updates` is set, it is updates / epochs steps instead, so that arms of different size take the same number of
optimiser steps on the same schedule.

    here              meaning, unit
    lr                peak learning rate
    milestones        epochs (0-based) from which the rate is multiplied once more by decay_rate
    smoothing         share of the label mass taken from the true class
    size              side in pixels of the square the classifier sees in training; test_size the same in tests
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from rayexpand.contract.settings import Later, Section


class Recipe(Section):
    """One way to train a classifier. The defaults are ours, measured on 16-pixel digits with 20 to 200 images."""

    backbone: str = Field("small_resnet", description="small_resnet, preact_resnet18, preact_resnet34, or a timm name")
    backbone_args: dict[str, int | float | str | bool] = Field({}, description="arguments of the backbone, such as "
                                                               "width: 16, norm: group, or those of timm")
    stem: Literal["own", "small"] = Field("own", description="small: 3x3 stride-1 stem without max-pooling, for images "
                                          "of 64 pixels and less")
    checkpoint: str | None = Field(None, description="local safetensors file to start from (its head is kept only "
                                   "where the classes agree); null: from scratch")
    pretrained: str | None = Field(None, description="the public weights a published recipe starts from; checkpoint "
                                   "must then name their local file, or set this to null to train from scratch")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth")

    size: int = Field(16, ge=8, description="side of the square image in training, pixels")
    test_size: int | None = Field(None, ge=8, description="the same in tests; null: size")
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    crop: Literal["none", "shift", "pad", "square_pad", "resized"] = Field(
        "shift", description="none: resize to size; shift: translate by up to crop_pad pixels, edges repeated; pad: "
        "zero-pad by crop_pad and crop at random; square_pad: resize to resize x resize whatever the aspect, pad, crop "
        "(Diff-Mix); resized: random resized crop of crop_scale")
    crop_pad: int = Field(2, ge=0, description="pixels")
    crop_scale: tuple[float, float] = Field((0.08, 1.0), description="share of the area a resized crop takes")
    resize: int | None = Field(None, ge=8, description="side before cropping, training (square_pad) and tests; null: "
                               "test_size, no crop")
    filter: Annotated[Literal["bicubic", "bilinear"], Later("bicubic")] = Field(
        "bicubic", description="how images are resized, antialiased (bilinear: torchvision's default, Diff-Mix)")
    rotation: float = Field(0.0, ge=0, le=180, description="random rotation within +- degrees, before the crop")
    hflip: float = Field(0.0, ge=0, le=1, description="probability of a horizontal flip")
    colour_jitter: float = Field(0.0, ge=0, le=1, description="brightness, contrast, saturation, each 1 +- this")
    augment: Literal["none", "randaugment", "autoaugment", "timm", "augmix"] = Field(
        "none", description="randaugment: 2 operations at magnitude 9; timm: timm_augment; augmix: 3 chains of 1 to 3 "
        "operations, severity 3, as the paper's code")
    timm_augment: str | None = Field(None, description="timm policy, for example rand-m7-mstd0.5-inc1")
    jsd: Annotated[float, Later(0.0)] = Field(
        0.0, ge=0, description="with augmix: weight of the Jensen-Shannon divergence of the answers for the image and "
        "two augmented views of it, beside the loss of the image alone (AugMix: 12); 0: one view in its place")
    erasing: float = Field(0.0, ge=0, le=1, description="probability of random erasing")
    gridmask: Annotated[float, Later(0.0)] = Field(
        0.0, ge=0, le=1, description="probability of a grid of square holes at the end of its rise (DistDiff: 0.8); 0: "
        "off")
    gridmask_until: Annotated[float, Later(0.8)] = Field(
        0.8, gt=0, description="epoch (0-based) until which that probability rises from 0, linearly by whole epochs; "
        "up to 1 a share of the training. DistDiff: 80 of 100")

    optimiser: Literal["sgd", "nesterov", "adamw", "lamb"] = "adamw"
    lr: float = Field(0.01, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd and nesterov")
    weight_decay: float = Field(5e-3, ge=0)
    decay_all: bool = Field(False, description="weight decay also on biases and normalisation (torch's SGD as the "
                            "papers use it); false: on weights of two or more dimensions only (timm's habit)")
    clip_norm: float | None = Field(None, gt=0, description="largest norm of the gradient")
    schedule: Literal["constant", "cosine", "multistep", "one_cycle"] = "one_cycle"
    schedule_unit: Literal["step", "epoch"] = Field("step", description="how often the rate changes")
    milestones: tuple[float, ...] = Field((), description="epochs; may be fractions, for 10 % of training")
    decay_rate: float | tuple[float, ...] = Field(0.1, description="factor at each milestone, one or one for each")
    warmup_epochs: float = Field(0.0, ge=0)
    warmup_lr: float = Field(0.0, ge=0, description="rate at step 0 of the warm-up")
    warmup_scales: bool = Field(False, description="warm-up multiplies the schedule by (n + 1) / N in the n-th of N "
                                "warm-up steps (or epochs) instead of replacing it (Diff-Mix)")

    epochs: int = Field(1, ge=1)
    updates: int | None = Field(200, ge=1, description="optimiser steps in all, whatever the size of the training set; "
                                "null: epochs x images / batch")
    batch: int = Field(32, ge=1, description="images of one step over all workers; a smaller training set lowers it")

    loss: Literal["ce", "bce"] = "ce"
    smoothing: float = Field(0.1, ge=0, lt=1)
    smoothing_mode: Literal["others", "all", "reference"] = Field(
        "all", description="all: smoothing / K on every class (timm, torch); others: smoothing / (K - 1) on the other "
        "classes; reference: Diff-Mix's released code, whose labels sum to more than 1")
    mixup: float = Field(0.0, ge=0, description="alpha of MixUp; 0: off")
    cutmix: float = Field(0.0, ge=0, description="alpha of CutMix; 0: off. With both, one of them at even odds")
    mix_probability: float = Field(1.0, ge=0, le=1, description="share of the batches that are mixed")
    mix_per: Annotated[Literal["batch", "image"], Later("batch")] = Field(
        "batch", description="one draw of MixUp and CutMix for a batch (timm's default), or one for each image (timm's "
        "elem, CutMix as DistDiff compares it); mix_probability is then the share of the images")
    cmo: float = Field(0.0, ge=0, le=1, description="share of the batches on which boxes of images from a "
                       "tail-weighted batch are pasted (CMO: 0.5); 0: off")
    cmo_power: float = Field(1.0, ge=0, description="the tail-weighted batch draws a real image of a class of n with "
                             "weight 1 / n ** this")
    cmo_span: tuple[float, float] = Field((0.02, 0.985), description="from and before which epoch (0-based) CMO "
                                          "happens; up to 1 they are shares of the training. CMO: epochs 4 to 196 of "
                                          "200")
    drw: float = Field(0.0, ge=0, lt=1, description="deferred re-weighting: beta of the class weights "
                       "(1 - beta) / (1 - beta ** n), n real images, scaled to mean 1 (0.9999); 0: off")
    drw_from: float = Field(0.8, ge=0, description="first epoch (0-based) with these weights, below 1 as a share of "
                            "the training; ones before. Diff-Mix: 160 of 200")
    amp: bool = Field(False, description="autocast to bfloat16 on a GPU")

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        problems = []
        if self.schedule == "multistep" and not self.milestones:
            problems.append("schedule multistep needs milestones, for example [50, 100, 150]")
        if isinstance(self.decay_rate, tuple) and len(self.decay_rate) != len(self.milestones):
            problems.append(f"decay_rate has {len(self.decay_rate)} factors for {len(self.milestones)} milestones")
        if self.crop == "square_pad" and self.resize is None:
            problems.append("crop square_pad needs resize, the side before cropping")
        if self.crop == "square_pad" and self.resize is not None and self.resize + 2 * self.crop_pad < self.size:
            problems.append(f"resize {self.resize} with crop_pad {self.crop_pad} is smaller than size {self.size}")
        if self.resize is not None and self.resize < (self.test_size or self.size):
            problems.append(f"resize {self.resize} is smaller than {self.test_size or self.size}, the side that tests "
                            "crop from it")
        if (self.augment == "timm") != (self.timm_augment is not None):
            problems.append("augment timm and timm_augment go together")
        problems += self._augmix_problems()
        if self.gridmask and _epoch(self.gridmask_until, self.gridmask_until <= 1, self.epochs) > self.epochs:
            problems.append(f"gridmask_until {self.gridmask_until:g} is behind the last of {self.epochs} epochs; lower "
                            "it, or give a share of the training")
        if self.mix_per == "image" and not (self.mixup or self.cutmix):
            problems.append("mix_per says how MixUp and CutMix are drawn, and both are off; set mixup or cutmix, or "
                            "leave it out")
        if self.warmup_epochs >= self.epochs:
            problems.append(f"warmup_epochs {self.warmup_epochs:g} leaves nothing of {self.epochs} epochs")
        if self.optimiser == "nesterov" and not self.momentum:
            problems.append("optimiser nesterov needs momentum above 0; plain descent is sgd with momentum 0")
        start, stop = (_epoch(value, self.cmo_span[1] <= 1, self.epochs) for value in self.cmo_span)
        if not 0 <= start < stop <= self.epochs:
            problems.append(f"cmo_span {list(self.cmo_span)} is no part of {self.epochs} epochs")
        if self.cmo and (self.mixup or self.cutmix):
            problems.append("cmo pastes boxes itself; leave mixup and cutmix at 0, or cmo")
        if self.drw and self.loss != "ce":
            problems.append(f"drw weighs the terms of the cross-entropy, which loss {self.loss} has not; take loss ce")
        if self.drw and _epoch(self.drw_from, self.drw_from < 1, self.epochs) >= self.epochs:
            problems.append(f"drw_from {self.drw_from:g} is behind the last of {self.epochs} epochs")
        if self.pretrained is not None and self.checkpoint is None:
            problems.append(f"checkpoint is missing: this recipe starts from {self.pretrained}; save those weights as "
                            "safetensors and name the file, or set pretrained: null to train from scratch")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _augmix_problems(self) -> list[str]:
        if not self.jsd:
            return []
        problems = [] if self.augment == "augmix" else ["jsd compares views of AugMix; set augment: augmix, or jsd: 0"]
        problems += [f"jsd compares three views of an image, which {name} would mix with others; leave {name} at 0, or "
                     "jsd" for name in ("mixup", "cutmix", "cmo") if getattr(self, name)]
        return problems if self.loss == "ce" else [*problems, "jsd stands beside the cross-entropy; take loss: ce"]


def gridmask_probability(recipe: Recipe, step: int, total_steps: int) -> float:
    """Probability of GridMask at an optimiser step: 0 in the first epoch, then rising linearly by whole epochs."""
    until = _epoch(recipe.gridmask_until, recipe.gridmask_until <= 1, recipe.epochs)
    return recipe.gridmask * min(1.0, math.floor(step * recipe.epochs / total_steps + 1e-9) / until)


def cmo_is_on(recipe: Recipe, step: int, total_steps: int) -> bool:
    """Whether optimiser step `step` (0-based) of `total_steps` lies where boxes are pasted with probability `cmo`."""
    start, stop = (_epoch(value, recipe.cmo_span[1] <= 1, recipe.epochs) for value in recipe.cmo_span)
    return recipe.cmo > 0 and start - 1e-9 <= step * recipe.epochs / total_steps < stop - 1e-9


def drw_is_on(recipe: Recipe, step: int, total_steps: int) -> bool:
    """Whether the class weights of deferred re-weighting count at a step."""
    start = _epoch(recipe.drw_from, recipe.drw_from < 1, recipe.epochs)
    return recipe.drw > 0 and step * recipe.epochs / total_steps >= start - 1e-9


def drw_weights(counts: np.ndarray, beta: float) -> np.ndarray:
    """float64 (K,): class weights (1 - beta) / (1 - beta ** n), scaled to sum K (effective numbers, Cui et al. 2019).
    beta 0 gives ones. A class without images counts as one of a single image."""
    weights = (1 - beta) / (1 - np.power(beta, np.maximum(np.asarray(counts, np.float64), 1)))
    return weights * len(weights) / weights.sum()


def _epoch(value: float, is_share: bool, epochs: int) -> float:
    return value * epochs if is_share else value


def lr_at(recipe: Recipe, step: int, total_steps: int) -> float:
    """Learning rate of optimiser step `step` (0-based) of `total_steps`.

    Multistep drops at the first step of a milestone's epoch, as torch's MultiStepLR and the papers do; timm 1.0 drops
    one epoch earlier. One cycle is 30 % cosine rise from lr / 25, then cosine fall to lr / 250,000 (Smith and Topin
    2018 in torch's settings, without its cycling of momentum).
    """
    per_epoch = total_steps / recipe.epochs
    at = step / per_epoch
    epoch = math.floor(at + 1e-9) if recipe.schedule_unit == "epoch" else at
    warm = recipe.warmup_epochs
    if epoch < warm and not recipe.warmup_scales:
        return recipe.warmup_lr + (recipe.lr - recipe.warmup_lr) * epoch / warm
    tick = 1 if recipe.schedule_unit == "epoch" else 1 / per_epoch
    scale = min(1.0, (epoch + tick) / warm) if recipe.warmup_scales and warm else 1.0
    return recipe.lr * scale * _decay(recipe, epoch, step, total_steps)


def _decay(recipe: Recipe, epoch: float, step: int, total_steps: int) -> float:
    if recipe.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * epoch / recipe.epochs))
    if recipe.schedule == "multistep":
        rates = recipe.decay_rate if isinstance(recipe.decay_rate, tuple) else (recipe.decay_rate,) * len(
            recipe.milestones)
        return math.prod(rate for rate, milestone in zip(rates, recipe.milestones, strict=True)
                         if epoch >= milestone - 1e-9)
    if recipe.schedule == "one_cycle":
        peak = 0.3 * total_steps - 1
        if step <= peak:
            return _cosine(1 / 25, 1.0, step / peak)
        return _cosine(1.0, 1 / 250_000, (step - peak) / (total_steps - 1 - peak))
    return 1.0


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


def make_recipe(fields: dict[str, Any]) -> Recipe:
    """Recipe of a mapping: `preset` names one of PRESETS, the other fields override it. Raises ValueError."""
    own = dict(fields)
    preset = own.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        from difflib import get_close_matches

        near = get_close_matches(str(preset), PRESETS, n=3)
        raise ValueError(f"preset {preset!r} is unknown; {'did you mean ' + ', '.join(near) if near else 'known: '}"
                         f"{'' if near else ', '.join(PRESETS)}")
    return Recipe(**{**(PRESETS[preset] if preset else {}), **own})


# Fields shared by published recipes. They all count in epochs, and normalise as ImageNet where their weights do not
# want it otherwise.
_PAPER: dict[str, Any] = {"updates": None, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
                          "smoothing": 0.0, "hflip": 0.5}
_HALF: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_IMAGENET_R50 = "timm/resnet50.tv_in1k (torchvision's ResNet-50, IMAGENET1K_V1)"


def _multistep(milestones: Sequence[float], decay_rate: float) -> dict[str, Any]:
    return {"schedule": "multistep", "schedule_unit": "epoch", "milestones": tuple(milestones),
            "decay_rate": decay_rate}


def _squashed(size: int, resize: int, pad: int = 0) -> dict[str, Any]:
    """Both sides to `resize` whatever the aspect, zero-padded by `pad` pixels, cropped at random to `size`."""
    return {"size": size, "crop": "square_pad", "resize": resize, "crop_pad": pad}


def _resized_crop(size: int, resize: int) -> dict[str, Any]:
    """Random crops of 8 to 100 % of the area, to `size`; in tests the shorter side to `resize`, middle square."""
    return {"size": size, "crop": "resized", "crop_scale": (0.08, 1.0), "resize": resize}


# DistDiff, experimental details, and its released training code: 100 epochs, batch 64, lr 0.1 on a cosine by epochs,
# Nesterov momentum, weight decay 1e-4; 256 squashed, rotated within 15 degrees, random 224.
_DISTDIFF: dict[str, Any] = {
    **_PAPER, **_squashed(224, 256), "backbone": "resnet50", "rotation": 15,
    "optimiser": "nesterov", "lr": 0.1, "weight_decay": 1e-4, "decay_all": True, "schedule": "cosine",
    "schedule_unit": "epoch", "epochs": 100, "batch": 64}

# GIF: as DistDiff's, but batch 256. Its released code runs the cosine with Nesterov momentum on CIFAR and medical
# sets, and two drops without it on the natural ones (and Caltech-101 in grey, which is left out here). Caltech-101 has
# random resized crops of at least 80 % of the area, DTD none, and neither is turned. That code normalises CIFAR,
# Caltech-101, Cars, Flowers and the medical sets with other numbers than ImageNet's, which are used here.
_GIF: dict[str, Any] = {**_DISTDIFF, "batch": 256}
_GIF_SMALL = {**_GIF, **_squashed(224, 224)}  # CIFAR: resized to 224; ours for the 28-pixel medical images
_GIF_NATURAL = {**_GIF, **_multistep((21, 31), 0.1), "optimiser": "sgd"}


def _diffmix(size: int, lr: float) -> dict[str, Any]:
    """Diff-Mix's conventional classification: lr falls on a cosine over all steps, multiplied by a linear rise over
    the first tenth. Batches and crops by resolution, bilinear, smoothing over the other classes, as in its released
    code. Its ViT weights and what they are fed with differ from the ones here, which were trained on 0.5."""
    vit = size == 384
    return {**_PAPER, **(_HALF if vit else {}), "filter": "bilinear",
            **_squashed(size, {224: 256, 384: 440, 448: 512}[size], 8),
            "backbone": "vit_base_patch16_384" if vit else "resnet50",
            "pretrained": "timm/vit_base_patch16_384.augreg_in21k_ft_in1k" if vit else _IMAGENET_R50,
            "optimiser": "sgd", "lr": lr, "weight_decay": 5e-4, "decay_all": True, "schedule": "cosine",
            "warmup_epochs": 12, "warmup_scales": True, "epochs": 120, "batch": {224: 256, 384: 32, 448: 64}[size],
            "smoothing": 0.1, "smoothing_mode": "others", "amp": True}


_DIFFMIX_LR = {  # released scripts for R50 at 224 and ViT, their older driver for R50 at 448
    ("r50", 224): {"cub": 0.05, "aircraft": 0.1, "flower": 0.05, "car": 0.1, "dog": 0.005, "pet": 0.01},
    ("r50", 448): {"cub": 0.025, "aircraft": 0.05, "flower": 0.05, "car": 0.05, "dog": 0.005},
    ("vit", 384): {"cub": 1e-3, "aircraft": 1e-3, "flower": 5e-4, "car": 1e-3, "dog": 1e-5}}
_DIFFMIX_LONG_TAIL: dict[str, Any] = {  # released long-tail trainer: warm-up 1/5..5/5, x 0.01 and x 1e-4, plain CE
    **_PAPER, "filter": "bilinear", **_resized_crop(224, 256), **_multistep((160, 180), 0.01), "backbone": "resnet50",
    "pretrained": _IMAGENET_R50,  # not stated; its 79 % on classes of 29 images are out of reach from scratch
    "colour_jitter": 0.4, "optimiser": "sgd", "lr": 5e-3, "weight_decay": 2e-4, "decay_all": True,
    "warmup_epochs": 5, "warmup_scales": True, "epochs": 200, "batch": 128}


def _realfake(size: int, pretrained: bool = False) -> dict[str, Any]:
    """Real-Fake, table 8, all sets but IN-1K. What the table leaves open is timm's habit, with which it was run:
    random resized crops and flips, tests at crop share 0.95, no decay on biases and normalisation; and the table's SGD
    is timm's `sgd`, which has Nesterov momentum. timm also draws bilinear or bicubic for each training crop; here it
    is always bicubic."""
    return {**_PAPER, **_resized_crop(size, int(size / 0.95)), **_multistep((50, 100, 150), 0.2),
            "backbone": "resnet50", "pretrained": _REALFAKE_R50 if pretrained else None,
            "optimiser": "nesterov", "lr": 0.1, "weight_decay": 5e-4, "epochs": 200, "batch": 1024, "amp": True}


_REALFAKE_R50 = "an ImageNet-1k ResNet-50 (which weights is not published), such as timm/resnet50.a1_in1k"
_REALFAKE_IN1K: dict[str, Any] = {  # table 8, column IN-1K; batch 512 on each of 8 GPUs; warm-up from timm's 1e-5
    **_realfake(224), "optimiser": "lamb", "lr": 5e-3, "weight_decay": 0.02, "schedule": "cosine", "milestones": (),
    "warmup_epochs": 5, "warmup_lr": 1e-5, "drop_path": 0.05, "augment": "timm",
    "timm_augment": "rand-m7-mstd0.5-inc1", "mixup": 0.2, "cutmix": 1.0, "smoothing": 0.1, "loss": "bce",
    "epochs": 300, "batch": 4096}
_REALFAKE_TRAIN_SH: dict[str, Any] = {  # what the released script really does on IN-10: 128 on each of 4 GPUs
    **_realfake(224), **_multistep((49, 99, 149), 0.2), "warmup_epochs": 5,  # timm drops an epoch early
    "warmup_lr": 1e-5, "colour_jitter": 0.4, "smoothing": 0.1, "batch": 512}

# DiffCoRe-Mix, implementation details: 300 epochs, SGD, lr 0.01 divided by 10 at 150 and 225, weight decay 5e-4,
# batch 16. It gives no crop: random resized crops at 224 pixels, padding of 4 below, and flips are ours.
_DIFFCOREMIX: dict[str, Any] = {
    **_PAPER, **_resized_crop(224, 256), **_multistep((150, 225), 0.1), "backbone": "resnet50", "optimiser": "sgd",
    "lr": 0.01, "weight_decay": 5e-4, "decay_all": True, "epochs": 300, "batch": 16}
_PREACT18: dict[str, Any] = {"backbone": "preact_resnet18", "crop": "pad", "crop_pad": 4, "resize": None}
_WIDE101: dict[str, Any] = {"backbone": "wide_resnet101_2", "pretrained": "timm/wide_resnet101_2.tv_in1k"}

# name -> fields; sources at the parts above
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 5},  # ours, measured: the defaults of Recipe, tested five times on the way

    "distdiff": _DISTDIFF,  # ResNet-50, all datasets
    "distdiff/resnext50": {**_DISTDIFF, "backbone": "resnext50_32x4d"},  # table of backbones, with the next two
    "distdiff/wrn50-2": {**_DISTDIFF, "backbone": "wide_resnet50_2"},
    "distdiff/mobilenetv2": {**_DISTDIFF, "backbone": "mobilenetv2_100"},

    "gif": _GIF,  # the paper's one cosine schedule for all sets; lr of its CIFAR script
    "gif/cifar100s": _GIF_SMALL,  # lr here and below: the released scripts
    "gif/organsmnist": _GIF_SMALL,
    "gif/pathmnist": {**_GIF_SMALL, "lr": 0.01},
    "gif/breastmnist": {**_GIF_SMALL, "lr": 0.01},
    "gif/caltech101": {**_GIF_NATURAL, "lr": 0.01, "rotation": 0, "crop": "resized", "crop_scale": (0.8, 1.0)},
    "gif/cars": {**_GIF_NATURAL, "lr": 0.01},
    "gif/dtd": {**_GIF_NATURAL, "lr": 0.01, "rotation": 0, "crop": "none", "resize": None},
    "gif/flowers": {**_GIF_NATURAL, "lr": 0.1},
    "gif/pets": {**_GIF_NATURAL, "lr": 0.01},

    **{f"diffmix/{net}-{size}-{data}": _diffmix(size, lr)  # tables 1 and 6, figure 7
       for (net, size), rates in _DIFFMIX_LR.items() for data, lr in rates.items()},
    "diffmix/few-shot": _diffmix(224, 0.05),  # CUB, 1, 5, 10 or all shots; the batch shrinks to the set by itself
    "diffmix/waterbird": {**_diffmix(224, 0.05), "epochs": 128, "warmup_epochs": 12.8},  # table 4; older driver
    "diffmix/long-tail": _DIFFMIX_LONG_TAIL,  # CUB-LT and Flower-LT, tables 2 and 3
    "diffmix/long-tail-cmo": {**_DIFFMIX_LONG_TAIL, "cmo": 0.5},  # the baselines of these tables
    "diffmix/long-tail-drw": {**_DIFFMIX_LONG_TAIL, "drw": 0.9999},
    "diffmix/long-tail-cmo-drw": {**_DIFFMIX_LONG_TAIL, "cmo": 0.5, "drw": 0.9999},

    "realfake/in10": _realfake(224),
    "realfake/in100": _realfake(224),
    "realfake/in1k": _REALFAKE_IN1K,
    "realfake/cub": _realfake(448, pretrained=True),
    "realfake/cars": _realfake(448, pretrained=True),
    "realfake/pets": _realfake(224, pretrained=True),
    "realfake/eurosat": _realfake(448),
    # published: from scratch, 30 epochs; ours: size and batch of IN-10, drops at the same shares of the training
    "realfake/celeba": {**_realfake(224), **_multistep((7.5, 15, 22.5), 0.2), "epochs": 30, "schedule_unit": "step"},
    "realfake/official_train_sh": _REALFAKE_TRAIN_SH,

    "diffcoremix": _DIFFCOREMIX,  # ResNet-50: ImageNet-1K as published, and the ablation on Cars
    "diffcoremix/in1k": {**_DIFFCOREMIX, "batch": 1024, "lr": 0.64, "warmup_epochs": 5,  # ours: lr scaled with batch
                         "schedule_unit": "step"},
    "diffcoremix/cifar100": {**_DIFFCOREMIX, **_PREACT18, "size": 32},
    "diffcoremix/tiny-imagenet": {**_DIFFCOREMIX, **_PREACT18, "size": 64},
    "diffcoremix/fine-grained": {**_DIFFCOREMIX, "backbone": "densenet121"},  # CUB, Cars, Caltech; init not stated
    "diffcoremix/scarcity": {**_DIFFCOREMIX, "backbone": "resnetv2_34"},  # Flowers-102; PreAct ResNet-34 for 224 px
    "diffcoremix/transfer": {**_DIFFCOREMIX, **_WIDE101},  # CUB, Flowers-102
    "diffcoremix/mobilevit": {**_DIFFCOREMIX, "backbone": "mobilevit_s"},  # appendix; the sizes of the three are ours
    "diffcoremix/fastvit": {**_DIFFCOREMIX, "backbone": "fastvit_t8"},
    "diffcoremix/efficientvit": {**_DIFFCOREMIX, "backbone": "efficientvit_m0"},
}
