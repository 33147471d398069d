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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unicodedata import normalize

import numpy as np

from rayexpand import extra_tests, seeds
from rayexpand import run as runs
from rayexpand.artifacts import features_of, prototypes_of
from rayexpand.config import RunConfig, digest
from rayexpand.core.recipe import Recipe, make_recipe
from rayexpand.errors import ConfigError, SeedDataError, UsageError
from rayexpand.files import Files
from rayexpand.fit import fit_for, with_artifacts
from rayexpand.fit_plan import ARTIFACTS
from rayexpand.rng import PlanRng
from rayexpand.schema import SeedIndex, Tools
from rayexpand.seeds import DataConfig
from rayexpand.status import shard_seconds
from rayexpand.store import is_url, open_files
from rayexpand.study_config import (
    REPEATED,
    ArmConfig,
    ExpansionConfig,
    StudyConfig,
    ratios_of,
    renamed,
    run_config,
    study_preflight,
    unknown_soft_labels,
)
from rayexpand.studylist import Rows, StudyList
from rayexpand.subsets import (
    choose,
    fill_counts,
    fingerprint,
    ids_file,
    ids_hash,
    real_counts,
    shared_images,
    sound_rows,
)

STUDY_FOLDERS = ("subsets", "lists", "trials", "results", "predictions", "checkpoints", ".tmp")


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
        return run_config(config, name, one, seed, subsets[seed][0])
    folder = one.run.replace("{seed}", str(seed))
    made_from = runs.open_run(folder).plan.index.seed_ids
    if ids_hash(made_from) != ids_hash(subsets[seed][1].seed_ids):
        raise UsageError(f"expansions.{name}: {folder} was made from {len(made_from):,} seeds that are not the "
                         f"{len(subsets[seed][1]):,} real rows of study seed {seed}; expand {config.folder}/subsets/"
                         f"{seed}.txt (data.ids), or let the study make the run")
    return folder


def _listed(data: DataConfig, section: str) -> SeedIndex:
    """The index of a section, named in what is wrong with it."""
    try:
        return seeds.build_index(data)
    except SeedDataError as error:
        raise SeedDataError(renamed([str(error)], section)[0]) from error


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
    """What arms ask of their runs and these do not have: so many copies, arguments of the soft label, of a run that
    exists a selection (of a run to be made, `make_trials` asks for it, when it can be decided)."""
    problems: list[str] = []
    most: dict[str, int] = {}  # copies of one seed, by folder
    for arm in config.arms:
        for seed in config.seeds if arm.use is not None else []:
            made = expansions[str(arm.use), seed]
            if (folder := _folder(made)) not in most:
                most[folder] = int(_planned_copies(made, subsets[seed][1]).max(initial=0))
            problems += [f"arms.{arm.name}.ratio: {one} copies of each seed asked for, but {folder} has {most[folder]} "
                         f"at most; lower it, or make more copies" for one in ratios_of(arm) if one > most[folder]]
            if isinstance(made, str) and arm.selection is not None and (
                    f"{arm.selection}.parquet" not in runs.open_run(made).files.list("selections")):
                problems.append(f"arms.{arm.name}.selection: {made} has no selection {arm.selection!r}; make it with "
                                f"`rayexpand select` and a file with name: {arm.selection} and run: {made}")
            if isinstance(made, str) and arm.soft_label:
                problems += [f"arms.{arm.name}.{line}"
                             for line in unknown_soft_labels(arm, runs.open_run(made).config.method)]
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


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()

