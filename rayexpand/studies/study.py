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
                 scores/<trial>.json its samples beside real images, where the study asks for that
                 predictions/<trial>.parquet, checkpoints/<trial>/
                 weights/<trial>.safetensors where the study keeps them
                 robustness/<test>/ answers for corrupted images
                 guides/<digest>.json what trained guides of the runs answer on the test images
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rayexpand.classifier.recipe import Recipe
from rayexpand.contract.errors import ConfigError, SeedDataError, UsageError, few
from rayexpand.contract.schema import ClassTable, SeedIndex
from rayexpand.data import seeds
from rayexpand.data.seeds import DataConfig, renamed
from rayexpand.data.subsets import (
    choose,
    ids_file,
    ids_hash,
    shared_images,
    sound_rows,
)
from rayexpand.loader.loader import TestSet
from rayexpand.runs.config import RunConfig
from rayexpand.runs.plan import planned_copies
from rayexpand.storage.files import Files
from rayexpand.storage.places import open_files
from rayexpand.studies import extra_tests
from rayexpand.studies.config import StudyConfig, expansion_config, first_run, study_preflight
from rayexpand.studies.corrupted_sets import open_corrupted
from rayexpand.studies.parts import Opened, Study, folder_of, real_key
from rayexpand.studies.rounds.config import LoopConfig
from rayexpand.studies.sections import ArmConfig, ExpansionConfig, ratios_of, unknown_soft_labels
from rayexpand.studies.value_config import (
    HELD_OUT,
    size_subset,
    sizes_in,
    with_held_out,
)

STUDY_FOLDERS = ("subsets", "lists", "trials", "results", "predictions", "checkpoints", ".tmp")

Listed = tuple[SeedIndex, DataConfig]
Subset = Callable[[StudyConfig, Files, SeedIndex, int], tuple[DataConfig, SeedIndex]]


def prepare_study(config: StudyConfig, subset: Subset | None = None) -> Study:
    """Lists the datasets, writes the subsets, and names every run the study needs; nothing is sampled yet.

    `subset`: the real rows of a repetition, of all images, where the configuration does not choose them. Raises
    ConfigError, SeedDataError, or UsageError where training and test images overlap.
    """
    if problems := study_preflight(config):
        raise ConfigError(config.name, problems)
    files, opened = open_files(config.folder), Opened()
    whole, test = _listed(opened, config.data, "data"), _listed(opened, config.test, "test")
    if len(whole.classes) < 2:
        raise UsageError(f"data: has one class ({few(whole.classes.key)}), so there is nothing to tell apart; give a "
                         "dataset of two or more")
    if not len(sound_rows(test)):
        raise UsageError("test: has no image that can be used; correct test.split, test.ids or the files")
    if whole.classes.key != test.classes.key:
        raise UsageError(f"test: its classes {few(test.classes.key)} are not those of data "
                         f"{few(whole.classes.key)}; give the test part of the same dataset")
    if config.validation is not None:
        validation = _listed(opened, config.validation, "validation")
        if not len(sound_rows(validation)):
            raise UsageError("validation: has no image that can be used; correct validation.split, validation.ids or "
                             "the files")
        if whole.classes.key != validation.classes.key:
            raise UsageError(f"validation: its classes {few(validation.classes.key)} are not those of data "
                             f"{few(whole.classes.key)}; give another part of the same dataset")
    for folder in STUDY_FOLDERS:
        files.make_folder(folder)
    files.sweep()
    drawn_by = {seed: config.seeds[0] if config.vary == "classifier" else seed for seed in config.seeds}
    subsets = {seed: (subset or _subset)(config, files, whole, drawn_by[seed]) for seed in config.seeds}
    sizes = {(seed, key): one for seed, drawn in drawn_by.items()
             for key, one in _value_sizes(config, files, whole, subsets[seed][1], drawn).items()}
    trained = _trained_on(config, subsets if subset is None else {config.seeds[0]: (config.data, whole)}, opened)
    trained += [(f"real images of value, seed {seed}", (index, data)) for (seed, _), (data, index) in sizes.items()]
    trained += _compared_by_rounds(config, trained, opened)
    _refuse_overlap(config, trained, test, opened)
    _open_also(config, trained, whole.classes, opened)
    _refuse_real_reference(config, test, opened)
    if config.resample is False and _differ(subsets):
        raise ConfigError(config.name, [
            "resample: false expands the real rows of the first seed for all, but the seeds draw other subsets, so "
            "their samples would be made from images that are not trained on; take resample out, or give all seeds "
            "one subset with subset.seed"])
    shared = not config.resample and not _differ(subsets) and config.vary != "data"
    expansions = {(name, seed): _expansion(config, name, one, config.seeds[0] if shared else seed, subsets, opened)
                  for name, one in config.expansions.items() for seed in config.seeds
                  if name in config.used}
    if problems := _run_problems(config, subsets, expansions, opened):
        raise ConfigError(config.name, problems)
    return Study(config, files, subsets, expansions, opened, sizes)


def _trained_on(config: StudyConfig, subsets: Mapping[int, tuple[DataConfig, SeedIndex]],
                opened: Opened) -> list[tuple[str, Listed]]:
    """Images that something is trained on, with how messages call them: the real rows, and those of generators that the
    study trains."""
    found = [(f"training images of seed {seed}", one) for seed, one in _distinct(subsets).items()]
    known = list[DataConfig]()
    for name, one in config.expansions.items():
        made = one.fit.pretrain if one.fit is not None and name in config.used else None
        if made is not None and made.data not in known:
            known.append(made.data)
            index = _listed(opened, made.data, f"expansions.{name}.fit.pretrain.data")
            found.append((f"training images of the generator of expansion {name}", (index, made.data)))
    return found


def _compared_by_rounds(config: StudyConfig, trained: Sequence[tuple[str, Listed]],
                        opened: Opened) -> list[tuple[str, Listed]]:
    """Images by which rounds of expansions are compared, with how messages call them: they decide how many samples
    there are, so they must not be tested on. Raises UsageError where they are trained on."""
    found, known = list[tuple[str, Listed]](), list[DataConfig]()
    for name, one in config.expansions.items():
        data = None if one.rounds is None or name not in config.used else one.rounds.validation
        if data is None or data in known:
            continue
        known.append(data)
        section = f"expansions.{name}.rounds.validation"
        listed = _listed(opened, data, section), data
        for called, other in trained:
            if shared := shared_images(other, listed):
                raise UsageError(f"{section}: {len(shared):,} of its images are {called} ({few(shared)}); choose "
                                 f"another part with {section}.split, or leave them out with {section}.ids")
        found.append((f"validation images of the rounds of expansion {name}", listed))
    return found


def _refuse_real_reference(config: StudyConfig, test: SeedIndex, opened: Opened) -> None:
    """Raises UsageError where images that stand for other real ones are those that they are compared with."""
    if config.samples is None:
        return
    reference = (test, config.test) if (data := config.samples.reference) is None else (
        _listed(opened, data, "samples.reference"), data)
    if (real := config.samples.real) is not None and (
            shared := shared_images((_listed(opened, real, "samples.real"), real), reference)):
        raise UsageError(f"samples.real: {len(shared):,} of its images are those that the samples are compared with "
                         f"({few(shared)}), which would cover themselves; choose another part with samples.real.split "
                         "or samples.real.ids")


def _open_also(config: StudyConfig, trained: Sequence[tuple[str, Listed]], classes: ClassTable,
               opened: Opened) -> None:
    """Raises UsageError or SeedDataError for a further test set that cannot be used, or has training images in it,
    which cannot be seen of published files of corrupted images."""
    for name, one in config.extra_tests.items():
        try:
            if one.is_corrupted:
                shown = open_corrupted(name, one, classes, opened.index)
                index, data = shown.first.index, shown.listings[0][0]
            else:
                index, data = extra_tests.open_test(one, classes).index, one.data
                extra_tests.groups_of(one, index)
            _look_at_few(index, data, one.crop_border)
        except (SeedDataError, UsageError) as error:
            raise type(error)(f"extra_tests.{name}: {error}") from error
        for called, held in trained if not one.is_corrupted or one.corrupt is not None else ():
            if shared := shared_images(held, (index, one.data)):
                raise UsageError(f"extra_tests.{name}: {len(shared):,} of its images are {called} ({few(shared)}); "
                                 "leave them out with data.ids, or choose another part")


def _look_at_few(index: SeedIndex, data: DataConfig, border: int) -> None:
    """Raises UsageError where the first, middle or last image cannot be read, or `border` leaves nothing of it."""
    rows = sound_rows(index)
    few_rows = np.unique(rows[[0, len(rows) // 2, -1]])
    TestSet(index, data, Recipe(size=8), 0, 1, 1, cache_bytes=0, section="data", crop_border=border).at(few_rows)


def _distinct(subsets: Mapping[int, tuple[DataConfig, SeedIndex]]) -> dict[int, Listed]:
    """Subsets that differ, each by the first of its seeds."""
    found: dict[str, tuple[int, Listed]] = {}
    for seed, (data, index) in subsets.items():
        found.setdefault(ids_hash(index.seed_ids), (seed, (index, data)))
    return dict(found.values())


def _subset(config: StudyConfig, files: Files, whole: SeedIndex, seed: int) -> tuple[DataConfig, SeedIndex]:
    if config.subset.kind == "full":
        return config.data, whole
    ids = whole.table["seed_id"].take(choose(whole, config.subset, seed)).to_pylist()
    name = f"subsets/{seed}.txt"
    files.replace(name, ids_file(ids))
    data = config.data.model_copy(update={"ids": str(files.at(name)), "per_class": None})
    return data, seeds.build_index(data)


def _value_sizes(config: StudyConfig, files: Files, whole: SeedIndex, base: SeedIndex,
                 seed: int) -> dict[str, tuple[DataConfig, SeedIndex]]:
    """The real images that the section value trains on beside the subset, by `real_key`. Raises UsageError where data
    has too few."""
    if config.value is None:
        return {}
    fitting, found = sizes_in(config.value, whole, base), {}
    seed = seed if config.subset.seed is None else config.subset.seed
    keys = {key: arm for arm in config.value_arms(fitting) if (key := real_key(arm))}
    for key, arm in keys.items():
        rows = with_held_out(whole, base, fitting[-1], seed) if key == HELD_OUT else size_subset(
            whole, base, arm.size, seed)
        ids, name = whole.table["seed_id"].take(rows).to_pylist(), f"subsets/{seed}-value-{key.replace(' ', '-')}.txt"
        files.replace(name, ids_file(ids))
        data = config.data.model_copy(update={"ids": str(files.at(name)), "per_class": None})
        found[key] = data, seeds.build_index(data)
    return found


def _expansion(config: StudyConfig, name: str, one: ExpansionConfig, seed: int,
               subsets: Mapping[int, tuple[DataConfig, SeedIndex]], opened: Opened) -> RunConfig | LoopConfig | str:
    if one.run is None:
        return expansion_config(config, name, one, seed, subsets[seed][0])
    folder = one.run.replace("{seed}", str(seed))
    made_from = opened.run(folder).plan.index.seed_ids
    if ids_hash(made_from) != ids_hash(subsets[seed][1].seed_ids):
        raise UsageError(f"expansions.{name}: {folder} was made from {len(made_from):,} seeds that are not the "
                         f"{len(subsets[seed][1]):,} real rows of study seed {seed}; expand {config.folder}/subsets/"
                         f"{seed}.txt (data.ids), or let the study make the run")
    return folder


def _listed(opened: Opened, data: DataConfig, section: str) -> SeedIndex:
    """The index of a section, named in what is wrong with it."""
    try:
        return opened.index(data)
    except SeedDataError as error:
        raise SeedDataError(renamed([str(error)], section)[0]) from error


def _refuse_overlap(config: StudyConfig, trained: Sequence[tuple[str, Listed]], test: SeedIndex,
                    opened: Opened) -> None:
    """No image in two of training, validation and test images."""
    held = [("test", (test, config.test))]
    if config.validation is not None:
        held.append(("validation", (_listed(opened, config.validation, "validation"), config.validation)))
    others = [*trained]
    for section, one in held:
        for name, other in others:
            if shared := shared_images(other, one):
                raise UsageError(f"{section}: {len(shared):,} of its images are {name} ({few(shared)}); choose "
                                 f"another part with {section}.split, or leave them out with {section}.ids")
        others.append((f"{section} images", one))


def _run_problems(config: StudyConfig, subsets: Mapping[int, tuple[DataConfig, SeedIndex]],
                  expansions: Mapping[tuple[str, int], RunConfig | LoopConfig | str], opened: Opened) -> list[str]:
    """What arms ask of their runs and these do not have: so many copies, arguments of the soft label, of a run that
    exists a selection (of a run to be made, `make_trials` asks for it, when it can be decided)."""
    problems: list[str] = []
    most: dict[str, int] = {}  # copies of one seed, by folder
    valued = [ArmConfig(name=one.name, use=one.use, ratio=one.ratio) for one in config.value_arms() if one.use]
    for arm, seed in ((arm, seed) for arm in (*config.arms, *valued) for seed in config.seeds):
        runs = [expansions[name, seed] for name in arm.uses]
        for made in runs:
            if (folder := folder_of(made)) not in most:
                most[folder] = int(_planned_copies(made, subsets[seed][1], opened).max(initial=0))
            problems += [f"arms.{arm.name}.ratio: {one} copies of each seed asked for, but {folder} has {most[folder]} "
                         "at most; lower it, or make more copies"
                         for one in ratios_of(arm) if math.ceil(one) > most[folder]]
            if isinstance(made, str) and arm.selection not in (None, *config.selections) and (
                    f"{arm.selection}.parquet" not in opened.run(made).files.list("selections")):
                problems.append(f"arms.{arm.name}.selection: {made} has no selection {arm.selection!r}; make it with "
                                f"`rayexpand select` and a file with name: {arm.selection} and run: {made}")
        if arm.soft_label and any(isinstance(made, str) for made in runs):
            methods = [opened.run(made).config.method if isinstance(made, str) else first_run(made).method
                       for made in runs]
            problems += [f"arms.{arm.name}.{line}" for line in unknown_soft_labels(arm, methods)]
    return list(dict.fromkeys(problems))


def _planned_copies(made: RunConfig | LoopConfig | str, index: SeedIndex, opened: Opened) -> np.ndarray:
    """Below which number the copies of each seed of a run are, or of one that is to be made of `index`; of a loop, what
    its run in one go would plan, which a rule may pass for some seeds."""
    if isinstance(made, str):
        plan = opened.run(made).plan
        return plan.first + plan.copies
    return planned_copies(index, first_run(made))[0]


def _differ(subsets: Mapping[int, tuple[DataConfig, SeedIndex]]) -> bool:
    return len({ids_hash(index.seed_ids) for _, index in subsets.values()}) > 1


