"""Scores of the seeds of a dataset: how sure classifiers are of each that were trained without it.

    fit:
      scores: {folds: 5, recipe: {preset: ...}, runs: [runs/birds]}

They are trained as trials of studies are (studies/cross_fit.py), in a hidden folder that the same command goes on from:

    artifacts/scores-5b2e07c1/scores.parquet    seed_id, fold, p_label, margin, entropy, speed, loss
              .scores-5b2e07c1.work/            folds that are trained now
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from rayexpand.artifacts.store import artifact_digest, file_sha256, publish
from rayexpand.classifier.recipe import Recipe, make_recipe
from rayexpand.contract.errors import RayexpandError
from rayexpand.contract.settings import Section, digest
from rayexpand.data import seeds
from rayexpand.data.folds import folds_of, read_groups
from rayexpand.data.seeds import DataConfig
from rayexpand.fitting.costs import trained, unit_on
from rayexpand.fitting.maker import FitBase, Maker, World, data_facts
from rayexpand.loader.config import TrainingConfig
from rayexpand.runs.allocation import FILE
from rayexpand.runs.config import DIGITS
from rayexpand.runs.joined import open_samples
from rayexpand.runs.stages import PlanStage, Sizes

VERSION = 1  # raised when the code makes other scores of the same configuration


class Scoring(Section):
    """How seeds are scored."""

    folds: int = Field(5, ge=1, le=1000, description="a seed is scored by the classifier that was trained without its "
                       "fold; 1: by one that was trained on everything, in sample")
    recipe: dict[str, Any] = Field({}, description="preset and fields of the training recipe, docs/studies.md")
    group: str | None = Field(None, min_length=1, description="keeps seeds together in a fold, such as frames of one "
                              "video: a text column of data.path (parquet, manifest), or a .csv file with seed_id and "
                              "group; null: ids of one image alone")

    @field_validator("recipe")
    @classmethod
    def _is_a_recipe(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        make_recipe(recipe)
        return recipe


class ScoresFit(Scoring):
    runs: list[str] = Field([], description="folders of finished runs of these seeds, whose samples are trained on too")
    training: TrainingConfig = Field(TrainingConfig(), description="where folds are trained: fields of `training` of a "
                                     "study; device auto: that of the file")


class ScoresMaker(Maker):
    kind = "scores"
    text = "how sure classifiers are of each seed that were trained without it, for `allocate`"
    section = ScoresFit

    def problems(self, section: ScoresFit, config: FitBase, *, on_ray: bool) -> list[str]:
        found = [f"fit.scores.{line}" for line in scoring_problems(section, config.data)]
        if section.training.keep is not None:
            found.append("fit.scores.training.keep: has no effect on scores, which are answers alone; take it out")
        places = [os.path.realpath(one) for one in section.runs]
        found += [f"fit.scores.runs: {one} is named twice, so that its samples would count twice; name it once"
                  for one, place in dict(zip(section.runs, places, strict=True)).items() if places.count(place) > 1]
        return found + [f"fit.scores.runs: {line}" for one in section.runs if (line := _run_problem(one))]

    def stages(self, section: ScoresFit, config: FitBase, sizes: Sizes) -> list[PlanStage]:
        samples = sum(open_samples(one).totals().kept for one in section.runs if not _run_problem(one))
        return [scoring_stage(f"fit {self.kind}", section, section.training, config, sizes, samples)]

    def make(self, section: ScoresFit, config: FitBase, world: World) -> Path:
        made_from, training = _made_from(section, config, world), section.training
        if training.device == "auto":
            training = training.model_copy(update={"device": config.device})
        work = Path(config.out, f".{self.kind}-{artifact_digest(self.kind, made_from)[:8]}.work")

        def make(folder: Path) -> dict[str, Any]:
            work.mkdir(exist_ok=True)
            content, facts = world.engine.scores(section.model_copy(update={"training": training}), config,
                                                 world.index, str(work.absolute()), world.progress)
            (folder / FILE).write_bytes(content)
            return facts

        folder = publish(config.out, self.kind, made_from, make)
        shutil.rmtree(work, ignore_errors=True)
        return folder


def scoring_problems(section: Scoring, data: DataConfig) -> list[str]:
    """What is wrong with how seeds are scored, as far as files on this machine say; one line each, from its field
    on."""
    found, checkpoint = [], make_recipe(section.recipe).checkpoint
    if checkpoint is not None and not Path(checkpoint).is_file():
        found.append(f"recipe.checkpoint: there is no file {checkpoint}")
    if section.group is not None:
        try:
            if section.group.endswith(".csv"):
                read_groups(section.group, "group")
            elif problem := seeds.text_problem(data, section.group):
                found.append(f"group: {problem}")
        except RayexpandError as error:
            found.append(str(error))
        if section.folds == 1:
            found.append("group: has no effect with folds: 1, where nothing is held out; take it out")
    return found


def scoring_stage(name: str, section: Scoring, training: TrainingConfig, config: Any, sizes: Sizes,
                  samples: int) -> PlanStage:
    """What scoring costs: each fold is trained on the other images and on their part of `samples`. `config`: of a fit
    or a run, with `data`, `estimate` and `device`."""
    recipe, folds = make_recipe(section.recipe), min(section.folds, max(1, sizes.images))
    rows = round((sizes.images + samples) * ((folds - 1) / folds if folds > 1 else 1))
    batch = max(1, min(recipe.batch, rows))
    steps = recipe.updates or recipe.epochs * (rows // batch)
    device = training.device if training.device != "auto" else getattr(config, "device", "auto")
    what = f"{folds} trainings of {steps:,} steps, {sizes.images:,} images scored"
    stage = trained(name, what, recipe, sizes.classes, folds * steps * batch,
                    _evaluations(recipe, steps) * sizes.images, config.estimate,
                    unit_on(device, training.gpus_per_worker == 0, config.data.source == DIGITS))
    return replace(stage, tasks=folds, width=max(1, training.workers), saves=_evaluations(recipe, steps))


def _evaluations(recipe: Recipe, steps: int) -> int:
    return max(1, min(recipe.epochs, steps))


def _run_problem(folder: str) -> str:
    try:
        run = open_samples(folder)
    except RayexpandError as error:
        return str(error)
    pending = run.totals().pending
    return f"{folder} has {pending:,} pending samples; finish it with `rayexpand expand`" if pending else ""


def _made_from(section: ScoresFit, config: FitBase, world: World) -> dict[str, Any]:
    """What scores depend on: images, folds, recipe, the samples by content, and how an epoch is cut."""
    recipe, training = make_recipe(section.recipe), section.training
    fold_N = folds_of(world.index, config.data, section.folds, config.seed, section.group)
    samples = [sorted(one.content_sha256 for one in open_samples(run).store.receipts() if one.kept)
               for run in section.runs]
    return {"version": VERSION, "seed": config.seed, "data": data_facts(config, world.index), "folds": section.folds,
            "folds_sha256": digest(fold_N.astype(np.int64).tolist()), "recipe": recipe.model_dump(mode="json"),
            "checkpoint_sha256": file_sha256(Path(recipe.checkpoint)) if recipe.checkpoint else "",
            "runs": [digest(one) for one in samples], "workers": max(1, training.workers),
            "shuffle_rows": training.shuffle_rows, "streams": training.streams}
