"""What making an artifact will cost, before it starts: counted arithmetic, or what it took when it was made last."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rayexpand.artifacts.store import process_seconds
from rayexpand.classifier.recipe import Recipe, make_recipe
from rayexpand.contract.errors import ConfigError, StorageError, three_digits
from rayexpand.fitting.maker import FitBase
from rayexpand.models.cost import Cost, tower_of
from rayexpand.models.folders import EMBEDDED
from rayexpand.runs.config import EstimateConfig, GuideConfig, RuntimeConfig
from rayexpand.runs.fleet_hours import GPU, PROCESS
from rayexpand.runs.stages import PlanStage, Sizes, shares_of, unknown
from rayexpand.runs.work import PEAK, PEAKS

if TYPE_CHECKING:
    from rayexpand.classifier.flops import ClassifierWork
    from rayexpand.fitting.adapter.recipe import FinetuneConfig

DECODE_S = 2.2e-3  # CPU seconds to decode and shrink a photograph of 500 x 375 pixels, measured
TF32 = 156.0  # dense TFLOP/s of an A100 in TF32, in which torch convolves float32 by default


def unit_on(device: str, *cpu: bool) -> str:
    """What work is done on, as far as it is known before: `cpu` are reasons that it is done on a CPU."""
    return PROCESS if device == "cpu" or any(cpu) else GPU


def made_before(config: FitBase, role: str, stages: Sequence[PlanStage]) -> list[PlanStage]:
    """The stages of an artifact, where one was made under its name before in one: it is found again where nothing has
    changed since, else it takes about as long as it did."""
    link = Path(config.out) / f"{config.name}-{role}"
    try:
        hours = process_seconds(link) / 3600 if link.is_dir() else 0.0
    except StorageError:
        hours = 0.0
    if not hours:
        return list(stages)
    return [replace(stages[-1], hours=(0.0, hours), petaflop=None, saves=1, source=(
        f"measured: {link} took {three_digits(hours)} h, and nothing where neither data nor settings have changed"))]


def trained(name: str, what: str, recipe: Recipe, n_classes: int, shown: float, answered: float,
            asked: EstimateConfig, unit: str) -> PlanStage:
    """A classifier that is shown so many images and answers so many."""
    if unit != GPU:
        return unknown(name, what, "arithmetic says little of a CPU; `rayexpand bench` measures a study whose samples "
                                   "are there", unit)
    try:
        work = work_of(recipe, n_classes)
    except ConfigError as error:
        return unknown(name, what, error.problems[0])
    tflop = shown * work.train + answered * work.answer
    hours, source = shares_of(tflop, asked, _peak(asked, PEAK if recipe.amp else TF32,
                                                  "half precision" if recipe.amp else "TF32"), "training_share")
    return PlanStage(name, what, unit, hours, source, petaflop=tflop / 1000)


def work_of(recipe: Recipe, n_classes: int) -> ClassifierWork:
    """See classifier.flops. Networks that are alike are counted once."""
    said = {name: getattr(recipe, name) for name in ("backbone", "stem", "size", "test_size", "drop_path", "jsd")}
    return _counted(Recipe(**said, backbone_args=recipe.backbone_args, augment="augmix" if recipe.jsd else "none",
                           ).model_dump_json(), n_classes)


@functools.cache
def _counted(recipe: str, n_classes: int) -> ClassifierWork:
    from rayexpand.classifier.flops import count_classifier

    return count_classifier(Recipe.model_validate_json(recipe), n_classes)


def asked_of_guide(name: str, config: FitBase, sizes: Sizes, own: GuideConfig | None = None) -> PlanStage:
    """Every image asked of the guide of a section: its own, the one that the file trains, or that of the file."""
    made = None if own is not None else getattr(config.fit, "guide", None)
    guide, tflop = (own or config.guide).weights, None
    if made is not None and made.kind != "clip_head":
        guide, tflop = "fit.guide", work_of(make_recipe(made.recipe), sizes.classes).answer
    return features_pass(name, sizes.images, [guide], config.device, config.estimate, config.runtime.io_threads, tflop)


def features_pass(name: str, images: int, guides: Sequence[str], device: str, asked: EstimateConfig,
                  threads: int = RuntimeConfig().io_threads, tflop: float | None = None) -> PlanStage:
    """Every image asked of guides once: arithmetic, or decoding where that takes longer."""
    what = f"features of {images:,} images"
    unit = unit_on(device, *(one in EMBEDDED for one in guides))
    towers = [tower_of(one) for one in guides] if tflop is None else [tflop]
    if unit != GPU or None in towers:
        return unknown(name, what, "arithmetic says little of a CPU" if unit != GPU else
                       f"the network of {' or '.join(guides)} is none of those known", unit)
    total = images * sum(one or 0.0 for one in towers)
    (least, most), source = shares_of(total, asked, _peak(asked, PEAKS["float32"], "float32"), "peak_share")
    decoding = images * DECODE_S / threads / 3600
    if decoding > least:
        source += f"; decoding photographs takes {three_digits(decoding)} h with {threads} threads (runtime.io_threads)"
    return PlanStage(name, what, unit, (max(least, decoding), max(most, decoding)), source, tasks=-(-images // 1000),
                 petaflop=total / 1000)


def tuned(name: str, recipe: FinetuneConfig, cost: Cost, side: int, images: int, views: int, workers: int,
          saves: int, latent_bytes: int, asked: EstimateConfig) -> list[PlanStage]:
    """Latents once, then optimiser steps, of a fine-tuning whose images have `side` pixels."""
    each, words = step_tflop(recipe, cost, side)
    peak = _peak(asked, PEAKS["float32"] if recipe.precision == "fp32" else PEAK,
                 "float32" if recipe.precision == "fp32" else "half precision")
    encoded = images * views * cost.encode.at(side)
    hours, source = shares_of(encoded, asked, _peak(asked, TF32, "TF32"), "training_share")
    latents = PlanStage(f"{name}: latents", f"{images:,} images, {views} views each", GPU, hours, source,
                    tasks=-(-images // 1000), bytes=latent_bytes, petaflop=encoded / 1000)
    total = recipe.steps * recipe.batch * each
    hours, source = shares_of(total, asked, peak, "training_share")
    steps = PlanStage(name, f"{recipe.steps:,} steps of {recipe.batch} images", GPU, hours, f"{source}; {words}",
                  width=max(1, workers), saves=saves, petaflop=total / 1000)
    return [latents, steps]


def step_tflop(recipe: FinetuneConfig, cost: Cost, side: int) -> tuple[float, str]:
    """TFLOP of one image in an optimiser step, and how they come about: forward, backward to activations, and with
    `full` backward to the weights, which is another forward pass but for attention between pixels."""
    forward, back = cost.network.at(side), cost.network.back_at(side)
    constant, linear, _ = cost.network.forward
    weights = constant + linear * (side / 512) ** 2 if recipe.strategy == "full" else 0.0
    texts = cost.text * (1 + (recipe.has_tokens or recipe.strategy == "full") + (recipe.strategy == "full"))
    tflop = forward + back + weights + texts
    parts = [f"{forward:.3g} forward", f"{back:.3g} back", *([f"{weights:.3g} to the weights"] if weights else []),
             f"{texts:.2g} texts"]
    return tflop, f"{cost.name} ({cost.known}) at {side} px: {tflop:.3g} TFLOP an image and step, {' + '.join(parts)}"


def _peak(asked: EstimateConfig, peak: float, precision: str) -> tuple[float, str]:
    if asked.peak_tflops is not None:
        return asked.peak_tflops, "estimate.peak_tflops"
    return peak, f"an A100 in {precision}"
