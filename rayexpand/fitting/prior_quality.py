"""How good a pretrained generator is, and whether its autoencoder is the limit.

The gate trains a small classifier on the real images and shows it real test images and what the autoencoder makes of
them ("VAE reconstruction only"). Points lost there are lost for every sample, however good the UNet.
"""

# n images, K classes

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from rayexpand.classifier.classifier import Classifier, TrainBatch
from rayexpand.classifier.recipe import Recipe
from rayexpand.classifier.transforms import test_transform, train_transform
from rayexpand.contract.protocols import Progress
from rayexpand.contract.rng import generator, row_key
from rayexpand.fitting.picture_grid import picture_grid
from rayexpand.models.tiny.pretrain import PROMPT, Trained, named, psnr_of, reconstructions, sample, to_bytes

CLASSES, SAMPLES = 10, 4  # of the contact sheet
NEAR = 0.8  # of the share of real images the guide names, from which samples count as recognisable (ours)


@dataclass(frozen=True)
class Quality:
    """Measured numbers with the images they were measured on; all images uint8 (n, H, W, 3)."""

    numbers: dict[str, float | int]
    real: np.ndarray
    labels: np.ndarray
    redrawn: np.ndarray  # reconstructions of `real`
    samples: np.ndarray
    asked: np.ndarray  # class of each sample


def measure(trained: Trained, x_nHWC: np.ndarray, labels: np.ndarray, class_names: Sequence[str], seed: int,
            report: Progress) -> Quality:
    """PSNR of reconstructions in dB, share the guide names right (zero-shot), share of samples it names as asked."""
    device = trained.guide.logit_scale.device
    x_n3HW = to_bytes(x_nHWC).to(device)
    redrawn_n3HW = reconstructions(trained.pipe.vae, x_n3HW)
    numbers: dict[str, float | int] = {
        "images": len(labels), "psnr_db": psnr_of(redrawn_n3HW, x_n3HW),
        "zero_shot": float((named(trained, x_n3HW, class_names) == labels).mean())}
    asked = np.arange(trained.setting.samples) % len(class_names)
    samples = np.zeros((0, *x_nHWC.shape[1:]), np.uint8)
    if len(asked):
        drawn_n3HW = sample(trained, [PROMPT.format(class_names[int(k)]) for k in asked], seed, report)
        numbers |= {"samples": len(asked),
                    "samples_named_right": float((named(trained, drawn_n3HW, class_names) == asked).mean())}
        samples = _pixels(drawn_n3HW)
    rounded = {name: round(value, 4) for name, value in numbers.items()}
    return Quality(rounded, x_nHWC, labels, _pixels(redrawn_n3HW), samples, asked)


def gate(quality: Quality, x_nHWC: np.ndarray, labels: np.ndarray, recipe: Recipe, max_loss: float, seed: int,
         device: torch.device, report: Progress) -> dict[str, Any]:
    """What a classifier of the real images `x_nHWC` names right, in shares of 1, of other real images, their
    reconstructions and the samples; points lost on reconstructions with their standard error over images (paired);
    whether these are no more than `max_loss`."""
    classifier = _classifier(x_nHWC, labels, recipe, seed, device, report)

    def right(x_nHWC: np.ndarray, labels: np.ndarray) -> np.ndarray:
        seen = np.stack([test_transform(one, recipe) for one in x_nHWC])
        return (classifier.logits(seen).argmax(1) == labels).astype(np.float64)

    real, redrawn = right(quality.real, quality.labels), right(quality.redrawn, quality.labels)
    lost, error = float((real - redrawn).mean()), float((real - redrawn).std() / math.sqrt(len(real)))
    found = {"accuracy_real": float(real.mean()), "accuracy_reconstructed": float(redrawn.mean())}
    if len(quality.asked):
        found["samples_classified_right"] = float(right(quality.samples, quality.asked).mean())
    return {**{name: round(value, 4) for name, value in found.items()}, "points_lost": round(100 * lost, 2),
            "points_lost_se": round(100 * error, 2), "points_allowed": max_loss, "gate_passed": 100 * lost <= max_loss}


def verdict(measured: dict[str, Any]) -> str:
    """What the numbers mean, in words."""
    if "gate_passed" not in measured:
        return ("no gate: measured on the training images alone, so nothing is known about others; name real test "
                "images in fit.pretrain.gate.test")
    real, redrawn = (100 * measured[f"accuracy_{kind}"] for kind in ("real", "reconstructed"))
    facts = (f"a classifier of the real images names {real:.1f} % of the test images right and {redrawn:.1f} % of "
             f"their reconstructions: {measured['points_lost']:.1f} ± {measured['points_lost_se']:.1f} points are "
             f"lost, {measured['points_allowed']:g} allowed")
    if abs(measured["points_lost"] - measured["points_allowed"]) < 2 * measured["points_lost_se"]:
        facts += " (within two standard errors: more test images would make it sure)"
    if measured["gate_passed"]:
        return f"gate passed: {facts}"
    return (f"gate not passed, THE PRIOR IS THE LIMIT: {facts}. No sample can be better than this autoencoder: train "
            "it for more steps (fit.pretrain.vae.steps), give it more latent channels (vae.latent_channels), or shrink "
            "images less (fewer vae.channels). The artifact can be used as it is, but expect no gain from it")


def summary(measured: dict[str, Any]) -> list[str]:
    """The numbers in lines for people."""
    lines = [f"autoencoder: {measured['psnr_db']:.1f} dB on {measured['images']:,} {measured['measured_on']}",
             f"guide: names {100 * measured['zero_shot']:.1f} % of them right without having been told"]
    if "samples" in measured:
        by = (f", the gate's classifier {100 * measured['samples_classified_right']:.1f} %"
              if "samples_classified_right" in measured else "")
        lines.append(f"samples: the guide sees the class that was asked for in "
                     f"{100 * measured['samples_named_right']:.1f} % of {measured['samples']:,}{by}")
        if measured["samples_named_right"] < NEAR * measured["zero_shot"]:
            lines.append("the UNet is not there yet, since the guide names real images more often: train it for more "
                         "steps (fit.pretrain.unet.steps), on more images, or give it more channels")
    spent = ", ".join(f"{stage} {one['cpu']:,.0f}" for stage, one in measured["seconds"].items())
    return [*lines, f"CPU seconds of training: {spent}"]


def sheet(quality: Quality, class_names: Sequence[str], measured_on: str) -> Image.Image:
    """One row for each of the first ten classes: a real image, its reconstruction, samples."""
    classes = np.unique(quality.labels)[:CLASSES].tolist()
    drawn = [np.flatnonzero(quality.asked == k)[:SAMPLES] for k in classes]
    count, rows = max(map(len, drawn)), []
    for k, found in zip(classes, drawn, strict=True):
        first = int(np.flatnonzero(quality.labels == k)[0])
        samples = [*(quality.samples[i] for i in found), *[None] * (count - len(found))]
        rows.append([quality.real[first], quality.redrawn[first], *samples])
    return picture_grid(rows, [class_names[k] for k in classes], [
        "real image", "reconstructed", *(f"sample {1 + n}" for n in range(count))], measured_on)


def _classifier(x_nHWC: np.ndarray, labels: np.ndarray, recipe: Recipe, seed: int, device: torch.device,
                report: Progress) -> Classifier:
    """A classifier of images of every class; order and augmentation are functions of seed, epoch and row."""
    batch, n_classes = min(recipe.batch, len(labels)), int(labels.max()) + 1
    per_epoch = len(labels) // batch
    total = recipe.updates or recipe.epochs * per_epoch
    classifier = Classifier(recipe, n_classes, seed, total, device=device)
    one_hot_KK = np.eye(n_classes, dtype=np.float32)
    order = np.zeros(0, np.int64)
    for step in range(total):
        epoch, within = divmod(step, per_epoch)
        if within == 0:
            order = generator(row_key(seed, "gate", "", epoch, 0, "order")).permutation(len(labels))
        rows = order[within * batch:(within + 1) * batch]
        x_BHWC = np.stack([train_transform(x_nHWC[row], generator(
            row_key(seed, "gate", str(row), epoch, 0, "augment")), recipe) for row in rows])
        classifier.update(TrainBatch(x_BHWC, one_hot_KK[labels[rows]], step))
        report("training the gate's classifier", step + 1, total)
    return classifier


def _pixels(x_n3HW: torch.Tensor) -> np.ndarray:
    """Floats in [0, 1] to uint8 (n, H, W, 3)."""
    return (x_n3HW * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()
