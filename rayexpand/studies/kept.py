"""Finished classifiers of a study, loaded again from the weights it kept: for corrupted test sets, maps of what a
network looks at, scores of membership."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rayexpand.classifier.recipe import Recipe
from rayexpand.contract.errors import UsageError
from rayexpand.loader.config import TrainingConfig
from rayexpand.storage.files import Files
from rayexpand.storage.tables import read_json
from rayexpand.studies.parts import Trial
from rayexpand.studies.trial import Answering, open_work
from rayexpand.studies.weights import read_weights

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class KeptClassifier:
    """A finished classifier. `answering.logits` takes uint8 (B, H, W, 3) as `test_transform(image, view)` makes them
    and returns float32 (B, K); `module` takes float32 (B, 3, H, W), normalised by `view.mean` and `view.std`, and is
    None for a baseline in which no network is trained step by step."""

    trial: Trial
    view: Recipe
    answering: Answering
    module: nn.Module | None


def read_trial(files: Files, name: str) -> Trial:
    """A trial by its name. Raises UsageError where the study has none of that name, DamagedFile."""
    found = read_json(files, f"trials/{name}.json")
    if found is None:
        known = ", ".join(sorted(one.removesuffix(".json") for one in files.list("trials"))) or "none"
        raise UsageError(f"{files.root}: no trial is called '{name}'; known: {known}")
    return Trial(**{key: value for key, value in found.items() if key != "digest"})


def load_classifier(files: Files, trial: Trial, device: str = "cpu") -> KeptClassifier:
    """The classifier that a trial left, in evaluation mode. A baseline without a network of its own is made again.
    Raises UsageError where its weights were not kept, DamagedFile, ModelError."""
    from rayexpand.classifier.classifier import Classifier
    from rayexpand.studies import baseline_models

    if not trial.is_trained:
        answering = baseline_models.frozen(trial.baseline, open_work(files, trial, TrainingConfig()).feed, device)
        return KeptClassifier(trial, answering.view, answering, None)
    state, said = read_weights(files, trial)
    recipe, module = Recipe(**{**trial.recipe, "checkpoint": None, "pretrained": None}), None
    if trial.baseline.get("kind") == "clip_finetune":
        classes = open_work(files, trial, TrainingConfig()).feed.rows.classes
        module = baseline_models.ClipNetwork(baseline_models.guide_of(trial.baseline, classes, device), recipe)
    classifier = Classifier(recipe, said["classes"], trial.trained_by, 1, device=device, module=module)
    classifier.module.load_state_dict(state)
    classifier.module.eval()
    return KeptClassifier(trial, recipe, classifier, classifier.module)
