"""A study: does the expanded data help? One YAML of arms that train the same classifier on different data.

The seeds of the study choose the subset of real images, key the expansions and the classifier, so each seed is a full
repetition. Expansions are ordinary runs below the study's folder, or runs that exist. Beside every arm with synthetic
rows the control "original repeated" trains on the real rows alone, repeated to the same number of rows.

    <out>/<name>/study.json          resolved configuration and the names of all trials
                 subsets/0.txt       seed ids of the real rows of seed 0; expansions read this very file
                 artifacts/          guides and prototypes of the expansions that ask for them
                 runs/<expansion>-0/ runs
                 lists/<digest8>.arrow
                 trials/<trial>.json what a trial needs, results/<trial>.json what it gave
                 predictions/<trial>.parquet, checkpoints/<trial>/
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any, Literal
from unicodedata import normalize

import numpy as np
from pydantic import Field, ValidationError, field_validator

from rayexpand import config as configs
from rayexpand import extra_tests, seeds
from rayexpand import run as runs
from rayexpand.artifacts import features_of, prototypes_of
from rayexpand.config import ClusterConfig, RunConfig, Section, digest
from rayexpand.core.recipe import Recipe, make_recipe
from rayexpand.errors import ConfigError, SeedDataError, UsageError
from rayexpand.extra_tests import ExtraTest
from rayexpand.files import Files
from rayexpand.finetune_plan import AdapterFit
from rayexpand.fit import fit_for, with_artifacts
from rayexpand.fit_plan import ARTIFACTS, GuideFit, fit_config
from rayexpand.rng import PlanRng
from rayexpand.schema import Method, SeedIndex, Tools
from rayexpand.seeds import DataConfig
from rayexpand.status import shard_seconds
from rayexpand.store import is_url, open_files
from rayexpand.studylist import Rows, StudyList
from rayexpand.subsets import (
    SubsetConfig,
    choose,
    fill_counts,
    fingerprint,
    ids_file,
    ids_hash,
    real_counts,
    shared_images,
    sound_rows,
)

REPEATED = "original repeated"  # how controls are called
STUDY_FOLDERS = ("subsets", "lists", "trials", "results", "predictions", "checkpoints", ".tmp")


class ArmConfig(Section):
    name: str = Field(min_length=1, description="what tables and figures call it")
    use: str | None = Field(None, description="name of an expansion; null: real rows only")
    ratio: int | list[int] | None = Field(None, description="only the first so many copies of each seed; a list makes "
                                          "one arm of each; null: all")
    real: float = Field(1.0, ge=0, description="how often each real row is used per epoch; 0: synthetic only")
    weight: float = Field(1.0, gt=0, description="the same for synthetic rows")
    replace: float | None = Field(None, ge=0, le=1, description="instead of the union: probability that a real row is "
                                  "replaced by a synthetic one (Diff-Mix)")
    draw: Literal["uniform", "inverse_freq"] = Field("uniform", description="with replace: any synthetic row, or first "
                                                     "a class, rare ones more often (Diff-Mix, long tail)")
    fill: bool = Field(False, description="of each class only as many synthetic rows as bring it to the size of the "
                       "largest real class (SYNAuG)")
    selection: str | None = Field(None, description="a decision in selections/ of the expansion; only rows it keeps")
    soft_label: dict[str, float] = Field({}, description="arguments of the method's soft label, such as gamma")
    recipe: dict[str, Any] = Field({}, description="recipe fields of this arm alone")
    control: bool = Field(True, description="also train on the real rows repeated to as many rows")


class ExpansionFit(Section):
    """What is made from the real rows of each seed before a method that needs it expands them."""

    guide: GuideFit | None = Field(None, description="train a guide; null: the one the run configuration names")
    groups: int = Field(3, ge=1, description="prototypes of each class (DistDiff: 3)")
    adapter: AdapterFit | None = Field(None, description="fine-tune the generator, in the process that drives the "
                                       "study; null: the one the run configuration names")


class ExpansionConfig(Section):
    run: str | None = Field(None, description="folder of an existing run; {seed} stands for the study's seed")
    config: dict[str, Any] | None = Field(None, description="a run configuration without name, out and data, which "
                                          "the study gives")
    fit: ExpansionFit | None = Field(None, description="with a run configuration: fit what its method needs, for each "
                                     "seed on its own real rows; {} for prototypes of the guide as it is")


class TrainingConfig(Section):
    workers: int = Field(0, ge=0, description="0: a trial is one process; more: Ray Train workers of each trial")
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float | None = Field(None, ge=0, description="null: 1 where the cluster has GPUs, else 0")
    loaders: int = Field(1, ge=1, description="processes that read and decode for one Ray Train worker")
    device: str = Field("auto", description="auto, cpu or cuda")
    threads: int = Field(1, ge=1, description="CPU threads of one worker")
    checkpoint_steps: int | None = Field(None, ge=1, description="optimiser steps between two checkpoints; null: one "
                                         "after each epoch")
    shuffle_rows: int = Field(65_536, ge=1, description="rows that are permuted together where a study list is larger")
    lanes: int = Field(8, ge=1, description="streams a larger list is read in; workers must divide it")


class StudyConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the study's folder is <out>/<name>")
    out: str = Field("runs", min_length=1)
    data: DataConfig = Field(description="the real images the subsets are taken from")
    subset: SubsetConfig = SubsetConfig()
    test: DataConfig = Field(description="images every arm is tested on; never trained on")
    also: dict[str, ExtraTest] = Field({}, description="further test sets by name, which every finished classifier is "
                                       "tested on once")
    frequency: tuple[int, int] = Field((5, 20), description="classes with fewer real images than the first are `few`, "
                                       "with more than the second `many`: CUB-LT; Flower-LT: [10, 30]")
    validation: DataConfig | None = Field(None, description="images a sweep chooses by, so that it does not choose by "
                                          "the test")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="repetitions; three or more for error bars")
    recipe: dict[str, Any] = Field({}, description="preset and fields of the training recipe")
    expansions: dict[str, ExpansionConfig] = Field({}, description="runs the arms use, by name")
    arms: list[ArmConfig] = Field(min_length=1)
    baseline: str | None = Field(None, description="arm the others are compared with; null: the first")
    resample: bool | None = Field(None, description="expand anew for each seed; null: where the subsets differ")
    training: TrainingConfig = TrainingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @field_validator("expansions", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """An expansion may be written as its run configuration (`fit` beside it), or as {run: folder}."""
        if not isinstance(value, Mapping):
            return value
        return {name: one if not isinstance(one, Mapping) or {"run", "config"} & set(one) else
                {"config": {key: field for key, field in one.items() if key != "fit"},
                 **({"fit": one["fit"]} if "fit" in one else {})} for name, one in value.items()}

    @property
    def folder(self) -> str:
        return f"{self.out.rstrip('/')}/{self.name}"


@dataclass(frozen=True)
class Arm:
    """One line of the table: an ArmConfig with one of its ratios, or the control of another arm."""

    name: str
    config: ArmConfig
    recipe: Recipe
    copies: int | None = None  # of each seed that are used
    control_of: str = ""


@dataclass(frozen=True)
class Trial:
    """One classifier to train: an arm with a seed. Plain data, written to trials/<name>.json."""

    name: str
    arm: str
    seed: int
    group: str  # expansion, "" for real rows only
    ratio: float
    control_of: str
    augment: str
    recipe: dict[str, Any]
    rows: str  # file of its study list
    list_sha256: str
    ids_sha256: str  # of the real rows
    data_sha256: str  # fingerprint of the real rows
    test: dict[str, Any]
    test_sha256: str  # fingerprint of the test images
    also: dict[str, dict[str, Any]]  # further test sets: an ExtraTest and the sha256 of its images and groups, each
    frequency: list[int]  # few below the first, many above the second
    checkpoint_sha256: str  # of the weights it starts from, "" from scratch
    workers: int  # BatchNorm statistics, sums and pairs of mixed images depend on it
    order: list[int]  # [shuffle_rows, lanes] where the list is read in windows, else []
    expansion_seconds: float
    run: str

    @property
    def digest(self) -> str:
        """What the result depends on. A result or checkpoint with another digest is not used."""
        names = ("recipe", "list_sha256", "seed", "data_sha256", "test_sha256", "checkpoint_sha256", "workers", "order",
                 "frequency")
        also = {name: [one["restrict"], one["sha256"]] for name, one in self.also.items()}
        return digest({**{name: getattr(self, name) for name in names}, **({"also": also} if also else {})})


@dataclass(frozen=True)
class Study:
    config: StudyConfig
    files: Files
    subsets: dict[int, tuple[DataConfig, SeedIndex]]  # real rows by seed
    expansions: dict[tuple[str, int], RunConfig | str]  # a run to make, or the folder of one


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Study of a YAML file with `a.b=value` overrides. Raises ConfigError with all mistakes."""
    return parse_study(configs.read(path, overrides), str(path))


def parse_study(raw: Mapping[str, Any], where: str = "study") -> StudyConfig:
    """Study of a mapping. Raises ConfigError with every mistake of every section."""
    try:
        config = StudyConfig(**{str(key): value for key, value in raw.items()})
    except ValidationError as error:
        raise ConfigError(where, configs.mistakes(error, StudyConfig, "")) from error
    problems = [*_arm_problems(config), *_recipe_problems(config), *_expansion_problems(config)]
    if problems:
        raise ConfigError(where, problems + study_preflight(config))
    return config


def study_preflight(config: StudyConfig) -> list[str]:
    """Everything wrong that can be known without loading a model or listing a dataset, one line each."""
    problems = [problem for section in ("data", "test", "validation") if (data := getattr(config, section))
                for problem in _renamed(seeds.check(data), section)]
    problems += [f"also.{name}.{line}" for name, one in config.also.items() for line in extra_tests.problems(one)]
    files = {file for arm in config.arms if (file := {**config.recipe, **arm.recipe}.get("checkpoint")) is not None}
    problems += [f"recipe.checkpoint: there is no file {file}" for file in sorted(files)
                 if not Path(file).expanduser().is_file()]
    for name, one in config.expansions.items():
        if one.config is None or one.run is not None or {"name", "out", "data", "seed"} & set(one.config):
            continue
        try:
            made = _run_config(config, name, one, 0, config.data)
        except ConfigError:
            continue  # parse_study lists its mistakes
        trained = one.fit is not None and one.fit.guide is not None and one.fit.guide.kind != "clip_head"
        given_later = ("data.", "out:", *(("artifacts.prototypes: ",) if one.fit else ()),
                       *(("artifacts.adapter: ", "artifacts.class_features: ", "artifacts.image_features: ")
                         if one.fit and one.fit.adapter else ()),
                       *(("guide.weights: ",) if trained else ()))
        problems += [f"expansions.{name}.{line}" for line in runs.preflight(made, device_here=False)
                     if not line.startswith(given_later)]
    return problems


def prepare_study(config: StudyConfig) -> Study:
    """Lists the datasets, writes the subsets, and names every run the study needs; nothing is sampled yet.

    Raises ConfigError, SeedDataError, or UsageError where training and test images overlap.
    """
    if problems := study_preflight(config):
        raise ConfigError(config.name, problems)
    files = open_files(config.folder)
    whole, test = _listed(config.data, "data"), _listed(config.test, "test")
    if len(whole.classes) < 2:
        raise UsageError(f"data: has one class ({_few(whole.classes.key)}), so there is nothing to tell apart; give a "
                         "dataset of two or more")
    if not len(sound_rows(test)):
        raise UsageError("test: has no image that can be used; correct test.split, test.ids or the files")
    if whole.classes.key != test.classes.key:
        raise UsageError(f"test: its classes {_few(test.classes.key)} are not those of data "
                         f"{_few(whole.classes.key)}; give the test part of the same dataset")
    for folder in STUDY_FOLDERS:
        files.make_folder(folder)
    files.sweep()
    subsets = {seed: _subset(config, files, whole, seed) for seed in config.seeds}
    _refuse_overlap(config, subsets, test)
    _open_also(config, subsets)
    if config.resample is False and _differ(subsets):
        raise ConfigError(config.name, [
            "resample: false expands the real rows of the first seed for all, but the seeds draw other subsets, so "
            "their samples would be made from images that are not trained on; take resample out, or give all seeds "
            "one subset with subset.seed"])
    shared = not config.resample and not _differ(subsets)
    expansions = {(name, seed): _expansion(config, name, one, config.seeds[0] if shared else seed, subsets)
                  for name, one in config.expansions.items() for seed in config.seeds
                  if name in {arm.use for arm in config.arms}}
    if problems := _run_problems(config, subsets, expansions):
        raise ConfigError(config.name, problems)
    return Study(config, files, subsets, expansions)


def pending_runs(study: Study, on_model: Callable[[str, int, int], None] | None = None) -> Iterator[runs.Run]:
    """The expansions that have shards to make, each once, ready to be driven, with what they need fitted."""
    each = {one.folder: (name, one) for (name, _), one in study.expansions.items() if isinstance(one, RunConfig)}
    for name, made in each.values():
        wanted = study.config.expansions[name].fit if name in study.config.expansions else None
        if wanted is not None:
            found = fit_for(made, on_model or (lambda *_: None), wanted.guide, wanted.adapter, groups=wanted.groups,
                            out=ARTIFACTS if is_url(made.out) else f"{made.out.rpartition('/')[0]}/{ARTIFACTS}")
            made = with_artifacts(made, found)
        run = runs.prepare(made, on_model, where=f"expansions.{made.name}")
        if runs.pending_jobs(run):
            yield run


def models_key(run: runs.Run) -> str:
    """Runs with one key load the same models; their prototypes and features may differ. An adapter is in the prior."""
    method, models = run.config.method, run.facts["models"]
    return digest({"models": {name: models[name] for name in ("prior", "adapter", "guide") if name in models},
                   "lora_scale": getattr(method, "lora_scale", 1.0) if "adapter" in models else None,
                   "classes": run.plan.index.classes.name, "prior": run.config.prior.model_dump(mode="json")})


def shared_tools(run: runs.Run, loaded: Mapping[str, Tools]) -> Tools | None:
    """What an earlier run loaded (`loaded` by `models_key`), with prototypes and features of this one; None: load
    anew."""
    tools = loaded.get(models_key(run))
    if tools is None:
        return None
    keys = run.plan.index.classes.key
    own = prototypes_of(run.config, keys, run.facts["models"].get("guide")) if "prototypes" in (
        run.config.method.needs()) else None
    return replace(tools, **{"prototypes": own, "class_features": None, "image_features": None,
                             **features_of(run.config, keys)})


def make_trials(study: Study) -> list[Trial]:
    """Every classifier of the study, its study list written. Raises UsageError where an expansion is not complete."""
    test_sha256 = fingerprint(seeds.build_index(study.config.test), study.config.test)
    also = _also(study)
    data_sha256 = {seed: fingerprint(index, data) for seed, (data, index) in study.subsets.items()}
    arms = _arms(study)
    _refuse_equal_names(study, arms)
    made = [[_trial(study, arm, seed, data_sha256[seed], test_sha256, also) for seed in study.config.seeds]
            for arm in arms]
    controls = _controls(study, arms, [tuple(rows for _, rows in line) for line in made])
    _refuse_equal_names(study, [*arms, *(control for control, _ in controls)])
    for control, epoch_rows in controls:
        made.append([_trial(study, _repeated(study, control, seed, rows), seed, data_sha256[seed], test_sha256, also)
                     for seed, rows in zip(study.config.seeds, epoch_rows, strict=True)])
    trials = [line[number][0] for number in range(len(study.config.seeds)) for line in made]
    names = [trial.name for trial in trials]
    for trial in trials:
        study.files.replace(f"trials/{trial.name}.json", _json({**vars(trial), "digest": trial.digest}))
    study.files.replace("study.json", _json({"config": study.config.model_dump(mode="json"), "trials": names}))
    return trials


def pending_trials(study: Study, trials: Sequence[Trial]) -> list[Trial]:
    """Trials without a result for exactly what they would train now."""
    return [trial for trial in trials if (found := read_result(study.files, trial.name)) is None
            or found["digest"] != trial.digest]


def read_result(files: Files, name: str) -> dict[str, Any] | None:
    text = files.read(f"results/{name}.json")
    return None if text is None else json.loads(text)


def _arms(study: Study) -> list[Arm]:
    """The arms of the configuration, one for each of their ratios."""
    return [Arm(f"{one.name} {ratio}x" if isinstance(one.ratio, list) else one.name, one,
                make_recipe({**study.config.recipe, **one.recipe}), ratio)
            for one in study.config.arms for ratio in (one.ratio if isinstance(one.ratio, list) else [one.ratio])]


def _controls(study: Study, arms: Sequence[Arm], epoch_rows: Sequence[tuple[int, ...]],
              ) -> list[tuple[Arm, tuple[int, ...]]]:
    """The controls with their rows of an epoch, which are given and returned by study seed. An arm has none of its own
    where real rows alone are trained in the same way already, with as many rows of an epoch in every seed.

    A control is named after what was planned, which is the same for all seeds, or after its arm where a selection or
    `fill` decides or that name is taken.
    """
    taken = {arm.name for arm in arms}
    served = {(rows, _recipe_digest(arm)) for arm, rows in zip(arms, epoch_rows, strict=True) if arm.config.use is None}
    found = []
    for arm, rows in zip(arms, epoch_rows, strict=True):
        is_wanted = arm.config.use is not None and arm.config.control and arm.config.replace is None
        if not is_wanted or (rows, _recipe_digest(arm)) in served:
            continue
        served.add((rows, _recipe_digest(arm)))
        own = _differing(arm, study)
        suffix = f" ({own})" if own else ""
        name = f"{REPEATED} {_planned(study, arm):.3g}x{suffix}"
        if arm.config.selection is not None or arm.config.fill or name in taken:
            name = f"{REPEATED} for {arm.name}{suffix}"
        taken.add(name)
        found.append((Arm(name, ArmConfig(name=name, recipe=arm.config.recipe), arm.recipe, control_of=arm.name), rows))
    return found


def _repeated(study: Study, control: Arm, seed: int, epoch_rows: int) -> Arm:
    """A control with the weight that shows `epoch_rows` images per epoch."""
    weight = epoch_rows / len(sound_rows(study.subsets[seed][1]))
    return replace(control, config=control.config.model_copy(update={"real": weight}))


def _planned(study: Study, arm: Arm) -> float:
    """Rows of an epoch over the real ones, if everything planned for the first seed is kept."""
    run = runs.open_run(_folder(study.expansions[str(arm.config.use), study.config.seeds[0]]))
    return arm.config.real + float(_used(run, arm.copies).sum()) / len(run.plan.index) * arm.config.weight


def _recipe_digest(arm: Arm) -> str:
    return digest(arm.recipe.model_dump(mode="json"))


def _refuse_equal_names(study: Study, arms: Sequence[Arm]) -> None:
    files = [_slug(arm.name) for arm in arms]
    if twice := sorted({name for name in files if files.count(name) > 1}):
        raise ConfigError(study.config.name, [f"arms: two arms share the name {twice[0]!r} once everything but "
                                              "letters, digits and . is dropped; rename one"])


def _trial(study: Study, arm: Arm, seed: int, data_sha256: str, test_sha256: str, also: dict[str, dict[str, Any]],
           ) -> tuple[Trial, int]:
    """A trial, its study list written, with its rows of an epoch. Raises UsageError for a run of other real images."""
    data, index = study.subsets[seed]
    parts = [Rows(seeds=(index, data), weight=arm.config.real)] if arm.config.real else []
    seconds, folder = 0.0, ""
    if arm.config.use is not None:
        folder = _folder(study.expansions[arm.config.use, seed])
        limit = fill_counts(real_counts(index)) if arm.config.fill else None
        parts.append(Rows(run=folder, copies=arm.copies, selection=arm.config.selection, limit=limit,
                          weight=arm.config.weight))
        seconds = _expansion_seconds(folder, arm.copies)
    rows = StudyList.build(parts, mode="union" if arm.config.replace is None else "replace",
                           p=arm.config.replace or 0.0, soft_label=arm.config.soft_label, draw=arm.config.draw)
    ids = ids_hash(index.seed_ids)
    if any(part.ids_sha256 != ids for part in rows.parts):
        raise UsageError(f"arms.{arm.name}: {folder} was made from other images than the real rows of study seed "
                         f"{seed}; delete that run, or take `resample` out")
    ratio = sum(len(part) * part.weight for part in rows.parts if not part.is_real) / len(sound_rows(index))
    name = f"lists/{rows.digest[:8]}.arrow"
    training = study.config.training
    order = [training.shuffle_rows, training.lanes] if rows.epoch_rows > training.shuffle_rows else []
    study.files.replace(name, rows.to_bytes())  # also where it is there: it holds paths, and folders may have moved
    trial = Trial(f"{_slug(arm.name)}-s{seed}", arm.name, seed, arm.config.use or "", ratio, arm.control_of,
                  arm.recipe.augment, arm.recipe.model_dump(mode="json"), name, rows.digest, ids,
                  data_sha256, study.config.test.model_dump(mode="json"), test_sha256, also,
                  list(study.config.frequency), _file_sha256(arm.recipe.checkpoint), max(1, training.workers), order,
                  seconds, folder)
    return trial, rows.epoch_rows


def _also(study: Study) -> dict[str, dict[str, Any]]:
    """The further test sets as trials keep them."""
    classes = next(iter(study.subsets.values()))[1].classes
    found = {}
    for name, one in study.config.also.items():
        index = extra_tests.open_test(one, classes)
        groups = extra_tests.groups_sha256(extra_tests.groups_of(one, index))
        found[name] = {**one.model_dump(mode="json"), "sha256": digest([fingerprint(index, one.data), groups])}
    return found


def _open_also(config: StudyConfig, subsets: Mapping[int, tuple[DataConfig, SeedIndex]]) -> None:
    """Raises UsageError or SeedDataError for a further test set that cannot be used, or has training images in it."""
    for name, one in config.also.items():
        try:
            index = extra_tests.open_test(one, next(iter(subsets.values()))[1].classes)
            extra_tests.groups_of(one, index)
        except (SeedDataError, UsageError) as error:
            raise type(error)(f"also.{name}: {error}") from error
        for seed, held in _distinct(subsets).items():
            if shared := shared_images(held, (index, one.data)):
                raise UsageError(f"also.{name}: {len(shared):,} of its images are training images of seed {seed} "
                                 f"({_few(shared)}); leave them out with data.ids, or choose another part")


def _distinct(subsets: Mapping[int, tuple[DataConfig, SeedIndex]]) -> dict[int, tuple[SeedIndex, DataConfig]]:
    """Subsets that differ, each by the first of its seeds."""
    found: dict[str, tuple[int, tuple[SeedIndex, DataConfig]]] = {}
    for seed, (data, index) in subsets.items():
        found.setdefault(ids_hash(index.seed_ids), (seed, (index, data)))
    return dict(found.values())


def _file_sha256(path: str | None) -> str:
    if path is None:
        return ""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _expansion_seconds(folder: str, copies: int | None) -> float:
    """Process-seconds spent on the copies an arm uses."""
    run = runs.open_run(folder)
    spent = sum(shard_seconds(receipt) for receipt in run.store.receipts())
    return spent * float(_used(run, copies).sum()) / run.plan.planned


def _used(run: runs.Run, copies: int | None) -> np.ndarray:
    """Copies of each seed an arm uses."""
    return run.plan.copies if copies is None else np.minimum(run.plan.copies, copies)


def _subset(config: StudyConfig, files: Files, whole: SeedIndex, seed: int) -> tuple[DataConfig, SeedIndex]:
    if config.subset.kind == "full":
        return config.data, whole
    ids = whole.table["seed_id"].take(choose(whole, config.subset, seed)).to_pylist()
    name = f"subsets/{seed}.txt"
    files.replace(name, ids_file(ids))
    data = config.data.model_copy(update={"ids": str(files.at(name)), "per_class": None})
    return data, seeds.build_index(data)


def _expansion(config: StudyConfig, name: str, one: ExpansionConfig, seed: int,
               subsets: Mapping[int, tuple[DataConfig, SeedIndex]]) -> RunConfig | str:
    if one.run is None:
        return _run_config(config, name, one, seed, subsets[seed][0])
    folder = one.run.replace("{seed}", str(seed))
    made_from = runs.open_run(folder).plan.index.seed_ids
    if ids_hash(made_from) != ids_hash(subsets[seed][1].seed_ids):
        raise UsageError(f"expansions.{name}: {folder} was made from {len(made_from):,} seeds that are not the "
                         f"{len(subsets[seed][1]):,} real rows of study seed {seed}; expand {config.folder}/subsets/"
                         f"{seed}.txt (data.ids), or let the study make the run")
    return folder


def _run_config(config: StudyConfig, name: str, one: ExpansionConfig, seed: int, data: DataConfig) -> RunConfig:
    raw = {**(one.config or {}), "name": f"{name}-{seed}", "out": f"{config.folder}/runs",
           "data": data.model_dump(mode="json"), "seed": seed}
    raw.setdefault("cluster", config.cluster.model_dump(mode="json"))
    return configs.parse(raw, f"expansions.{name}")


def _arm_problems(config: StudyConfig) -> list[str]:
    problems = []
    names = [arm.name for arm in config.arms]
    for arm in config.arms:
        where = f"arms.{arm.name}"
        if names.count(arm.name) > 1:
            problems.append(f"{where}: the name is given twice; every arm needs its own")
        if arm.use is not None and arm.use not in config.expansions:
            problems.append(f"{where}.use: '{arm.use}' is no expansion; known: "
                            f"{', '.join(config.expansions) or 'none, add a section expansions'}")
        if arm.use is None:
            plain = ArmConfig(name=arm.name)
            unused = [field for field in ("draw", "fill", "ratio", "replace", "selection", "soft_label", "weight")
                      if getattr(arm, field) != getattr(plain, field)]
            if unused:
                problems.append(f"{where}: {', '.join(unused)} need `use`, the name of an expansion")
            if not arm.real:
                problems.append(f"{where}.real: 0 without `use` leaves nothing to train on")
        problems += [f"{where}.{field}: with replace an epoch is one pass over the real rows; leave {field} at 1"
                     for field in ("real", "weight") if arm.replace is not None and getattr(arm, field) != 1]
        if arm.fill:
            problems += [f"{where}.fill: counts rows of a union in which every row is used once; leave {field} out"
                         for field in ("real", "weight", "replace") if getattr(arm, field) not in (1, None)]
        if arm.draw != "uniform" and arm.use is not None and arm.replace is None:
            problems.append(f"{where}.draw: says what replaces a real row, and nothing does; give replace, or leave it")
        if arm.name.lower().startswith(REPEATED):
            problems.append(f"{where}: names that start with '{REPEATED}' are those of the automatic controls; rename "
                            "the arm")
        problems += [f"{where}.{line}" for line in [*_ratio_problems(arm), *_soft_label_problems(config, arm)]]
    if config.frequency[0] > config.frequency[1] + 1:
        problems.append(f"frequency: classes would be both few (under {config.frequency[0]}) and many (over "
                        f"{config.frequency[1]}); give the smaller number first")
    problems += [f"also.{name}: a name is letters, digits, - and _; rename it" for name in config.also
                 if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name)]
    if config.baseline is not None and config.baseline not in names:
        problems.append(f"baseline: '{config.baseline}' is no arm; known: {', '.join(names)}")
    if len(set(config.seeds)) < len(config.seeds):
        problems.append("seeds: a seed is given twice; each is one repetition")
    return problems


def _ratio_problems(arm: ArmConfig) -> list[str]:
    ratios = _ratios(arm)
    problems = [f"ratio: {one} copies of each seed are none to train on; give 1 or more, or leave `use` out"
                for one in ratios if one < 1]
    if len(set(ratios)) < len(ratios):
        problems.append(f"ratio: {ratios} gives a value twice, which would be one arm twice; give each once")
    return problems if ratios or arm.ratio is None else ["ratio: an empty list makes no arm; give ratios, or null"]


def _ratios(arm: ArmConfig) -> list[int]:
    return arm.ratio if isinstance(arm.ratio, list) else [] if arm.ratio is None else [arm.ratio]


def _soft_label_problems(config: StudyConfig, arm: ArmConfig) -> list[str]:
    """Arguments that the method's soft label does not have; those of a run that exists are known when it is opened."""
    one = config.expansions.get(arm.use or "")
    if not arm.soft_label or one is None or one.config is None or not isinstance(one.config.get("method"), Mapping):
        return []
    try:
        method = _run_config(config, str(arm.use), one, 0, config.data).method
    except ConfigError:
        return []  # listed with the expansion
    return _unknown_soft_labels(arm, method)


def _unknown_soft_labels(arm: ArmConfig, method: Method) -> list[str]:
    columns = ("source", "target", "strength", "n_classes")
    known = [name for name, one in signature(method.soft_label).parameters.items()
             if name not in columns and one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)]
    return [f"soft_label.{key}: " + (f"did you mean '{near[0]}'?" if (near := get_close_matches(key, known, n=1)) else
                                     f"unknown, the soft label of {method.name} takes "
                                     f"{', '.join(known) or 'no arguments; take it out'}")
            for key in arm.soft_label if key not in known]


def _recipe_problems(config: StudyConfig) -> list[str]:
    problems = []
    for where, own in [("recipe", {}), *((f"arms.{arm.name}.recipe", arm.recipe) for arm in config.arms if arm.recipe)]:
        try:
            make_recipe({**config.recipe, **own})
        except ValidationError as error:
            problems += configs.mistakes(error, Recipe, f"{where}.")
        except ValueError as error:
            problems.append(f"{where}.{error}")
    for arm in config.arms if not problems else []:
        made = make_recipe({**config.recipe, **arm.recipe})
        problems += [f"arms.{arm.name}.recipe.{field}: goes by the real images of each class, and this arm has none; "
                     f"set {field}: 0" for field in ("cmo", "drw") if getattr(made, field) and not arm.real]
    return problems


def _expansion_problems(config: StudyConfig) -> list[str]:
    problems = []
    for name, one in config.expansions.items():
        where = f"expansions.{name}"
        if (one.run is None) == (one.config is None):
            problems.append(f"{where}: give a run configuration, or run: <folder of a run>")
        elif one.run is not None and one.fit is not None:
            problems.append(f"{where}.fit: has no effect on a run that exists; take it out")
        elif one.config is not None:
            if given := sorted({"name", "out", "data", "seed"} & set(one.config)):
                problems.append(f"{where}: {', '.join(given)} come from the study; take them out")
                continue
            try:
                made = _run_config(config, name, one, 0, config.data)
            except ConfigError as error:
                problems += [f"{where}.{line}" for line in error.problems]
            else:
                if one.fit and fit_config(made, one.fit.guide, one.fit.adapter) is None:
                    problems.append(f"{where}.fit: {made.method.name} as it is set here needs nothing fitted; take it "
                                    "out")
    return problems


def _listed(data: DataConfig, section: str) -> SeedIndex:
    """The index of a section, named in what is wrong with it."""
    try:
        return seeds.build_index(data)
    except SeedDataError as error:
        raise SeedDataError(_renamed([str(error)], section)[0]) from error


def _refuse_overlap(config: StudyConfig, subsets: Mapping[int, tuple[DataConfig, SeedIndex]], test: SeedIndex) -> None:
    """No image in two of training, validation and test images."""
    held = [("test", (test, config.test))]
    if config.validation is not None:
        held.append(("validation", (_listed(config.validation, "validation"), config.validation)))
    others = [(f"training images of seed {seed}", one) for seed, one in _distinct(subsets).items()]
    for section, one in held:
        for name, other in others:
            if shared := shared_images(other, one):
                raise UsageError(f"{section}: {len(shared):,} of its images are {name} ({_few(shared)}); choose "
                                 f"another part with {section}.split, or leave them out with {section}.ids")
        others.append((f"{section} images", one))


def _run_problems(config: StudyConfig, subsets: Mapping[int, tuple[DataConfig, SeedIndex]],
                  expansions: Mapping[tuple[str, int], RunConfig | str]) -> list[str]:
    """What arms ask of their runs and these do not have: so many copies, arguments of the soft label."""
    problems: list[str] = []
    most: dict[str, int] = {}  # copies of one seed, by folder
    for arm in config.arms:
        for seed in config.seeds if arm.use is not None else []:
            made = expansions[str(arm.use), seed]
            if (folder := _folder(made)) not in most:
                most[folder] = int(_planned_copies(made, subsets[seed][1]).max(initial=0))
            problems += [f"arms.{arm.name}.ratio: {one} copies of each seed asked for, but {folder} has {most[folder]} "
                         f"at most; lower it, or make more copies" for one in _ratios(arm) if one > most[folder]]
            if isinstance(made, str) and arm.soft_label:
                problems += [f"arms.{arm.name}.{line}"
                             for line in _unknown_soft_labels(arm, runs.open_run(made).config.method)]
    return list(dict.fromkeys(problems))


def _planned_copies(made: RunConfig | str, index: SeedIndex) -> np.ndarray:
    """Copies of each seed of a run, or of one that is to be made of `index`."""
    if isinstance(made, str):
        return runs.open_run(made).plan.copies
    return made.method.copies(index, PlanRng(made.seed, made.method.name))


def _differ(subsets: Mapping[int, tuple[DataConfig, SeedIndex]]) -> bool:
    return len({ids_hash(index.seed_ids) for _, index in subsets.values()}) > 1


def _folder(expansion: RunConfig | str) -> str:
    return expansion if isinstance(expansion, str) else expansion.folder


def _differing(arm: Arm, study: Study) -> str:
    """What the recipe of an arm changes, in short."""
    base, own = make_recipe(dict(study.config.recipe)).model_dump(), arm.config.recipe
    preset = [f"preset {own['preset']}"] if own.get("preset") not in (None, study.config.recipe.get("preset")) else []
    return ", ".join(preset + [f"{key}={value}" for key, value in arm.recipe.model_dump().items()
                               if key in own and base[key] != value])


def _slug(name: str) -> str:
    """File name of an arm, at most 80 bytes: letters of any script, digits and dots; a long one ends in a hash."""
    kept = "".join(one if one.isalnum() or one == "." else " " for one in normalize("NFC", name.lower()))
    slug = "-".join(kept.split())
    return slug if 0 < len(slug.encode()) <= 80 else f"{slug.encode()[:70].decode(errors='ignore')}-{digest(name)[:8]}"


def _renamed(problems: Sequence[str], section: Literal["data", "test", "validation"] | str) -> list[str]:
    return [f"{section}.{line.removeprefix('data.')}" if line.startswith("data.") else f"{section}: {line}"
            for line in problems]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()

