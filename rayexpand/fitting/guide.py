"""Guides fitted on a dataset: a classifier, or CLIP with a tuned head."""

from __future__ import annotations

import hashlib
import logging
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from rayexpand.artifacts.store import publish
from rayexpand.classifier.recipe import Recipe, make_recipe
from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.contract.metrics import record_training
from rayexpand.contract.protocols import Progress
from rayexpand.contract.schema import SeedIndex
from rayexpand.contract.settings import Section
from rayexpand.fitting.costs import features_pass, trained, unit_on
from rayexpand.fitting.maker import FitBase, Maker, World, data_facts
from rayexpand.loader.loader import Loader
from rayexpand.loader.training_set import TrainingSet
from rayexpand.models.cost import tower_of
from rayexpand.models.guide_files import CLASSIFIER, CLIP_HEAD, guide_folder, save_classifier, save_clip_head
from rayexpand.models.guides import ClipGuide, guide_hash, load_guide
from rayexpand.runs.config import GuideConfig
from rayexpand.runs.fleet_hours import PROCESS
from rayexpand.runs.stages import PlanStage, Sizes, unknown
from rayexpand.storage.position import Position

log = logging.getLogger(__name__)

KIND = 1  # raised when the code below makes something else of the same configuration

# CLIP fine-tuned on a dataset: the usual low rate, for the weights are good already (ours).
CLIP_RECIPE: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.1, "smoothing": 0.0, "schedule": "cosine", "crop": "none"}


class GuideFit(Section):
    kind: Literal["classifier", "clip_head", "random", "pretrained"] = "classifier"
    recipe: dict[str, Any] = Field({}, description="preset and fields of the training recipe, docs/studies.md")

    @field_validator("recipe")
    @classmethod
    def _is_a_recipe(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        make_recipe(recipe)
        return recipe


class GuideMaker(Maker):
    kind = "guide"
    text = "train a guide; null: the one `guide` names"
    section = GuideFit

    def make(self, section: GuideFit, config: FitBase, world: World) -> Path:
        return fit_guide(config, section, world)

    def problems(self, section: GuideFit, config: FitBase, *, on_ray: bool) -> list[str]:
        problem = _checkpoint_problem(section)
        problems = [f"fit.guide.recipe.checkpoint: {problem}"] if problem else []
        if section.kind == CLIP_HEAD:
            recipe, plain = make_recipe(section.recipe), Recipe()
            problems += [f"fit.guide.recipe.{name}: has no effect on kind clip_head; take it out"
                         for name in ("jsd", "mix_per") if getattr(recipe, name) != getattr(plain, name)]
        return problems

    def stages(self, section: GuideFit, config: FitBase, sizes: Sizes) -> list[PlanStage]:
        recipe, name = make_recipe(section.recipe), f"fit {section.kind}"
        if section.kind in ("random", "pretrained"):
            return [PlanStage(name, "no training", PROCESS, (0.0, 0.0), "its weights are given, or random")]
        batch = min(recipe.batch, sizes.images)
        steps = recipe.updates or recipe.epochs * (sizes.images // batch)
        what, unit = f"{steps:,} steps of {batch} images", unit_on(config.device, config.data.source == "digits")
        if section.kind == CLIP_HEAD:
            tower = tower_of(config.guide.weights)
            return [unknown(name, what, "the network of guide.weights is none of those known", unit) if tower is None
                    else features_pass(name, steps * batch, (), config.device, config.estimate, tflop=3 * tower)]
        return [trained(name, what, recipe, sizes.classes, steps * batch, 0, config.estimate, unit)]

    def is_here(self, section: GuideFit) -> bool:
        return True

    def applied(self, config: FitBase, folder: Path) -> FitBase:
        return config.model_copy(update={"guide": GuideConfig(weights=str(folder))})


def not_applied(recipe: Recipe) -> list[str]:
    """Fields of a recipe that are set and that fine-tuning CLIP does not look at. They are said and not refused, for
    files with them are in use."""
    plain = Recipe()
    return [name for name in ("mixup", "cutmix", "drw", "clip_norm", "amp", "drop_path")
            if getattr(recipe, name) != getattr(plain, name)]


def _checkpoint_problem(made: GuideFit) -> str:
    checkpoint = make_recipe(made.recipe).checkpoint
    if made.kind == "pretrained" and checkpoint is None:
        return "is missing; kind pretrained takes its weights from a local safetensors file"
    if made.kind in ("random", CLIP_HEAD) and checkpoint is not None:
        return f"has no effect on kind {made.kind}; take it out, or use kind pretrained or classifier"
    if checkpoint is not None and not Path(checkpoint).expanduser().is_file():
        return f"there is no file {checkpoint}"
    return ""


def fit_guide(config: FitBase, made: GuideFit, world: World) -> Path:
    """The folder of a guide, trained, tuned, or of random or given weights. Raises ConfigError, UsageError."""
    index, progress = world.index, world.progress
    made_from: dict[str, Any] = {"version": KIND, "seed": config.seed, "data": data_facts(config, index)}
    if made.kind == CLIP_HEAD:
        guide = load_fit_guide(config.model_copy(update={"device": "cpu"}), index)  # it is only looked at
        if not isinstance(guide, ClipGuide):
            raise ConfigError(config.name, [f"guide.weights: {config.guide.weights} is a classifier; kind clip_head "
                                            "fine-tunes a CLIP guide, such as 'digits' or an open_clip folder"])
        usual = {} if "preset" in made.recipe else CLIP_RECIPE
        recipe = make_recipe({**usual, **made.recipe, "size": guide.size[0], "test_size": None})
        made_from |= {"recipe": recipe.model_dump(mode="json"),
                      "guide_sha256": guide_hash(config.guide.weights, config.guide.checkpoint, progress)}
        return publish(config.out, made.kind, made_from, lambda folder: world.engine.alone(
            partial(_tune_clip, config, recipe, index), progress, folder))
    recipe = make_recipe(made.recipe)
    made_from["recipe"] = recipe.model_dump(mode="json")
    if recipe.checkpoint is not None:
        made_from["checkpoint_sha256"] = _file_hash(Path(recipe.checkpoint).expanduser())
    return publish(config.out, made.kind, made_from, lambda folder: world.engine.alone(
        partial(_train_classifier, config, made.kind, recipe, index), progress, folder))


def _train_classifier(config: FitBase, kind: str, recipe: Recipe, index: SeedIndex, progress: Progress,
                      folder: Path) -> dict[str, Any]:
    from rayexpand.classifier.backbones import build_backbone
    from rayexpand.classifier.classifier import Classifier
    from rayexpand.contract.device import choose_device

    if kind != CLASSIFIER:
        model = build_backbone(recipe, len(index.classes), config.seed)
        save_classifier(folder, model, recipe, index.classes.key)
        saw_others = "its weights come from recipe.checkpoint and may have seen other images than these"
        return {"note": saw_others} if kind == "pretrained" else {}
    feed, device = _feed(config, recipe, index), choose_device(config.device)
    classifier = Classifier(recipe, len(index.classes), config.seed, feed.total_steps, device=device,
                            class_counts=np.asarray(index.classes.count))
    loss, position = 0.0, Position(folder)
    for batch in feed.batches(0, feed.total_steps):
        loss = classifier.update(batch)
        progress("training the guide", classifier.step, feed.total_steps)
        record_training("guide", len(batch.x_BHWC), classifier.step, loss)
        position("training the guide", classifier.step, feed.total_steps, lambda: {"loss": loss})  # noqa: B023
    position.remove()
    save_classifier(folder, classifier.module, recipe, index.classes.key)
    return {"device": device.type, "updates": feed.total_steps, "last_loss": loss}


def _tune_clip(config: FitBase, recipe: Recipe, index: SeedIndex, progress: Progress,
               folder: Path) -> dict[str, Any]:
    """Fine-tunes image tower and head. The head starts as the class texts of unit length, so at the start it gives the
    zero-shot logits; the logit scale and the text tower stay."""
    import torch

    from rayexpand.classifier.classifier import loss_of, make_optimiser
    from rayexpand.classifier.mixing import smooth
    from rayexpand.classifier.recipe import lr_at

    guide: ClipGuide = load_fit_guide(config, index)
    feed = _feed(config, recipe, index)
    head = torch.nn.Parameter(guide.texts_KD.clone())
    tuned = torch.nn.ModuleDict({"visual": guide.model.visual})
    tuned.register_parameter("head", head)
    optimiser = make_optimiser(tuned.requires_grad_(True), recipe)
    loss, guide.texts_KD, position = torch.zeros(()), head, Position(folder)
    for batch in feed.batches(0, feed.total_steps):
        x_BCHW = torch.from_numpy(batch.x_BHWC).to(guide.device).permute(0, 3, 1, 2) / 255
        y_BK = smooth(torch.from_numpy(batch.y_BK).to(guide.device), recipe.smoothing, recipe.smoothing_mode)
        tuned.train()
        optimiser.zero_grad(set_to_none=True)
        loss = loss_of(guide.logits(x_BCHW), y_BK, recipe.loss)
        loss.backward()
        loss = loss.detach()
        for group in optimiser.param_groups:
            group["lr"] = lr_at(recipe, batch.step, feed.total_steps)
        optimiser.step()
        progress("fine-tuning the guide", batch.step + 1, feed.total_steps)
        record_training("guide", len(batch.x_BHWC), batch.step + 1)
        position("fine-tuning the guide", batch.step + 1, feed.total_steps, lambda: {"loss": float(loss)})  # noqa: B023
    position.remove()
    tuned.requires_grad_(False).eval()
    if not torch.isfinite(loss):
        raise UsageError(f"fine-tuning diverged: the loss is {float(loss)} at the end. Lower fit.guide.recipe.lr")
    source = str(guide_folder(config.guide.weights) or config.guide.weights)
    save_clip_head(folder, guide.model, head, source, index.classes.key)
    facts = {"device": guide.device.type, "updates": feed.total_steps, "last_loss": float(loss)}
    if unused := not_applied(recipe):
        log.warning("guide of kind clip_head: %s of its recipe had no effect", ", ".join(unused))
    return facts | ({"not_applied": unused} if unused else {})


def _feed(config: FitBase, recipe: Recipe, index: SeedIndex) -> Loader:
    return Loader(TrainingSet.of_seeds(index, config.data), recipe, config.seed)


def load_fit_guide(config: FitBase, index: SeedIndex) -> Any:
    return load_guide(config.guide.weights, config.guide.checkpoint, index.classes.asked, device=config.device,
                      class_keys=index.classes.key)


def _file_hash(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
