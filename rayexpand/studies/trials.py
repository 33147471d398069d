"""Arms of a study as trials: what each trains on, its controls, its name."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unicodedata import normalize

import numpy as np

from rayexpand.artifacts.store import process_seconds
from rayexpand.classifier.recipe import make_recipe
from rayexpand.contract.errors import ConfigError, UsageError, few
from rayexpand.contract.settings import digest
from rayexpand.data.subsets import fill_counts, fingerprint, ids_hash, real_counts, sound_rows
from rayexpand.loader.training_set import RowSource
from rayexpand.models.guides import guide_hash
from rayexpand.runs.run import Run
from rayexpand.runs.status import shard_seconds
from rayexpand.storage.tables import healthy_json, replace_json
from rayexpand.studies import extra_tests
from rayexpand.studies.baselines import recipe_of
from rayexpand.studies.class_maps import map_sha256
from rayexpand.studies.config import StudyConfig
from rayexpand.studies.parts import Arm, Study, Trial, TrialFolder, folder_of, lacks_predictions, read_result, real_key
from rayexpand.studies.rounds.config import LoopConfig
from rayexpand.studies.rounds.controls import KINDS, Remade, learned_seconds, round_facts
from rayexpand.studies.rounds.in_study import beside_of, control_runs, kinds_of, loops_of
from rayexpand.studies.samples import training_set
from rayexpand.studies.sections import REPEATED, ArmConfig
from rayexpand.studies.value_config import repeats_of, updates_of
from rayexpand.studies.weights import without_weights

log = logging.getLogger(__name__)

Line = list[tuple[Trial, int]]  # of an arm, by study seed: its trial and the rows of an epoch


def make_trials(study: Study) -> list[Trial]:
    """Every classifier of the study, its training set written. Raises UsageError where an expansion is not complete."""
    test_sha256 = fingerprint(study.opened.index(study.config.test), study.config.test)
    also = _also(study)
    arms = settled(study, arms_of(study.config))
    _refuse_equal_names(study, arms)
    made = [[_trial(study, arm, seed, test_sha256, also) for seed in study.config.seeds] for arm in arms]
    controls = _controls(study, arms, [tuple(rows for _, rows in line) for line in made])
    beside = _LoopControls(study, [*arms, *(control for control, _ in controls)], made, test_sha256, also)
    for arm, line in zip(arms, list(made), strict=True):
        made += beside.of(arm, line)
    _refuse_equal_names(study, beside.arms)
    for control, epoch_rows in controls:
        made.append([_trial(study, _repeated(study, control, seed, rows), seed, test_sha256, also)
                     for seed, rows in zip(study.config.seeds, epoch_rows, strict=True)])
    trials = [line[number][0] for number in range(len(study.config.seeds)) for line in made]
    names = [trial.name for trial in trials]
    trials = [replace(trial, rounds={**trial.rounds, "controls": beside.names.get(trial.arm, {}),
                                     "same": beside.same.get(trial.arm, [])}) if "loops" in trial.rounds else trial
              for trial in trials]
    for trial in trials:
        replace_json(study.files, f"trials/{trial.name}.json", {**vars(trial), "digest": trial.digest})
    replace_json(study.files, "study.json", {**_facts(study, control_runs(study, arms)), "trials": names})
    return trials


def announce(study: Study) -> None:
    """Writes study.json before the trials of the study can be known, for who looks at its folder meanwhile: those of an
    earlier start stay in it."""
    known = (healthy_json(study.files, "study.json") or {}).get("trials") or []
    replace_json(study.files, "study.json", {**_facts(study), "trials": known})


def _facts(study: Study, controls: Sequence[Remade] = ()) -> dict[str, Any]:
    """What study.json says beside its trials: the runs they take samples of, and how many trials there are without
    controls."""
    folders = dict.fromkeys(folder_of(one) for one in study.expansions.values())
    folders |= dict.fromkeys(made.folder for made, _ in controls)
    return {"config": study.config.model_dump(mode="json"),
            "runs": [{"name": one.rstrip("/").rpartition("/")[2], "folder": one} for one in folders],
            "trainings": len(arms_of(study.config)) * len(study.config.seeds)}


def pending_trials(folder: TrialFolder, trials: Sequence[Trial]) -> list[Trial]:
    """Trials without a result for exactly what they would train now, or whose predictions are gone or damaged, or whose
    weights are to be kept and are not there."""
    todo = {trial.name for trial in trials if (found := read_result(folder.files, trial.name)) is None
            or found["digest"] != trial.digest or lacks_predictions(folder.files, trial)}
    if folder.training.keep == "weights" and (without := [
            one.name for one in without_weights(folder.files, [one for one in trials if one.name not in todo])]):
        log.warning("The weights of %d finished trials were not kept or are gone (%s); they are trained again",
                    len(without), few(without))
        todo |= set(without)
    return [trial for trial in trials if trial.name in todo]


def arms_of(config: StudyConfig) -> list[Arm]:
    """The arms of the configuration, one for each of their ratios, and its baselines."""
    return [Arm(name, one, make_recipe({**config.recipe, **one.recipe}), ratio, rounds=rounds)
            for one in config.arms for name, ratio, rounds in _curve(one)] + [
        Arm(one.called, ArmConfig(name=one.called, use=one.use, control=False), recipe_of(one, config.recipe),
            baseline=one) for one in config.baselines] + [
        Arm(one.name, ArmConfig(name=one.name, use=one.use, real=float(one.role != "alone"), control=False),
            make_recipe(dict(config.recipe)), one.ratio or None, value=one) for one in config.value_arms()]


def _curve(one: ArmConfig) -> list[tuple[str, int | float | None, int | None]]:
    """(name, ratio, rounds) of each arm that an entry of `arms` is."""
    if isinstance(one.rounds, list):
        return [(f"{one.name} round {rounds}", None, rounds) for rounds in one.rounds]
    if isinstance(one.ratio, list):
        return [(f"{one.name} {ratio:g}x", ratio, None) for ratio in one.ratio]
    return [(one.name, one.ratio, one.rounds)]


def settled(study: Study, arms: Sequence[Arm]) -> list[Arm]:
    """The arms with those of value made comparable: sizes that there are images for, as many optimiser steps in one
    schedule, and rows repeated where an epoch would not fill a batch."""
    there = [arm for arm in arms if arm.value is None or arm.value.role != "real" or arm.value.size == 1
             or (study.config.seeds[0], real_key(arm.value)) in study.sizes]
    rows = {arm.name: _value_rows(study, arm) for arm in there if arm.value is not None}
    if not rows:
        return there
    recipe = make_recipe(dict(study.config.recipe))
    updates, repeats = recipe.updates or updates_of(rows, recipe.batch, recipe.epochs), repeats_of(rows, recipe.batch)
    return [arm if arm.value is None else replace(
        arm, recipe=recipe.model_copy(update={"updates": updates}), config=arm.config.model_copy(update={
            "real": float(repeats[arm.name]) * (2 if arm.value.role == "repeated" else arm.config.real),
            "weight": float(repeats[arm.name])})) for arm in there]


def _value_rows(study: Study, arm: Arm) -> int:
    """Rows that an arm of value shows in an epoch, if everything planned for the first seed is kept."""
    assert arm.value is not None
    first = study.config.seeds[0]
    real = len(sound_rows(study.real_rows(arm, first)[1]))
    shown = {"alone": 0, "repeated": 2 * real}.get(arm.value.role, real)
    return shown + round(arm.value.ratio * len(sound_rows(study.subsets[first][1])))


def _controls(study: Study, arms: Sequence[Arm], epoch_rows: Sequence[tuple[int, ...]],
              ) -> list[tuple[Arm, tuple[int, ...]]]:
    """The controls with their rows of an epoch, which are given and returned by study seed. An arm has none of its own
    where real rows alone are trained in the same way already, with as many rows of an epoch in every seed.

    A control is named after what was planned, which is the same for all seeds, or after its arm where a selection or
    `fill` decides or that name is taken.
    """
    taken = {arm.name for arm in arms}
    served = {(rows, _recipe_digest(arm)) for arm, rows in zip(arms, epoch_rows, strict=True) if arm.is_real_alone}
    found = []
    for arm, rows in zip(arms, epoch_rows, strict=True):
        if not arm.is_controlled or (rows, _recipe_digest(arm)) in served:
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
    sources = _sources(study, arm, study.config.seeds[0])
    planned = sum(float(_taken(study.opened.run(one.run or ""), one.copies).sum()) for one in sources)
    return arm.config.real + arm.config.weight * planned / len(study.subsets[study.config.seeds[0]][1])


def _sources(study: Study, arm: Arm, seed: int) -> list[RowSource]:
    """Samples of an arm for a study seed: runs, with what is taken of each."""
    found = list[RowSource]()
    for name in arm.config.uses:
        if isinstance(made := study.expansions[name, seed], LoopConfig):
            loop = beside_of(study, name, made)
            kind = arm.stands_for if arm.stands_for and loop.has(arm.stands_for, arm.rounds) else ""
            rows = [one if kind else replace(one, copies=arm.copies) for one in loop.rows(kind, arm.rounds)]
            found += [one for one in rows if study.opened.run(one.run or "").totals().kept]
        else:
            found.append(RowSource(run=folder_of(made), copies=arm.copies, selection=arm.config.selection))
    return found


class _LoopControls:
    """Makes the controls of arms with loops. Arms for whom a control is the same training share it, and one that would
    be the training of its arm is none."""

    def __init__(self, study: Study, arms: Sequence[Arm], lines: Sequence[Line], test_sha256: str,
                 also: dict[str, dict[str, Any]]) -> None:
        self._study, self._with = study, (test_sha256, also)
        self.arms = list(arms)
        self.names = dict[str, dict[str, str]]()  # arm -> kind -> control
        self.same = dict[str, list[str]]()  # arm -> kinds of controls that would be its own training
        self._served = {self._key(arm, line): arm.name for arm, line in zip(arms, lines, strict=False)}

    def of(self, arm: Arm, line: Line) -> Iterator[Line]:
        for kind in kinds_of(self._study, arm):
            control = self._named(arm, kind, line)
            made = [_trial(self._study, control, seed, *self._with) for seed in self._study.config.seeds]
            key = self._key(arm, made)
            if key == self._key(arm, line):
                self.same.setdefault(arm.name, []).append(kind)
                continue
            if key not in self._served:
                self._served[key] = control.name
                self.arms.append(control)
                yield made
            self.names.setdefault(arm.name, {})[kind] = self._served[key]

    def _named(self, arm: Arm, kind: str, line: Line) -> Arm:
        """Controls that arms of one budget share are called after it."""
        name, taken = f"{KINDS[kind]} for {arm.name}", {one.name for one in self.arms}
        if kind in ("uniform", "classes") and (short := f"{KINDS[kind]} {line[0][0].ratio:.3g}x") not in taken:
            name = short
        return replace(arm, name=name, config=arm.config.model_copy(update={"name": name}), control_of=arm.name,
                       stands_for=kind)

    def _key(self, arm: Arm, line: Line) -> tuple[str, ...]:
        return (_recipe_digest(arm), *(trial.list_sha256 for trial, _ in line))


def _recipe_digest(arm: Arm) -> str:
    return digest(arm.recipe.model_dump(mode="json"))


def _refuse_equal_names(study: Study, arms: Sequence[Arm]) -> None:
    files = [_slug(arm.name) for arm in arms]
    if twice := sorted({name for name in files if files.count(name) > 1}):
        raise ConfigError(study.config.name, [f"arms: two arms share the name {twice[0]!r} once everything but "
                                              "letters, digits and . is dropped; rename one"])


def _trial(study: Study, arm: Arm, seed: int, test_sha256: str, also: dict[str, dict[str, Any]]) -> tuple[Trial, int]:
    """A trial, its training set written, with its rows of an epoch. Raises UsageError for a run of other
    real images."""
    data, index = study.real_rows(arm, seed)
    is_read = arm.config.real > 0 or arm.config.mix is not None  # real images are also mixed with
    parts = [RowSource(seeds=(index, data), weight=arm.config.real)] if is_read else []
    sources, limit = _sources(study, arm, seed), fill_counts(real_counts(index)) if arm.config.fill else None
    parts += [replace(one, limit=limit, weight=arm.config.weight) for one in sources]
    folders, loops = [one.run or "" for one in sources], loops_of(study, arm, seed)
    runs = [study.opened.run(folder) for folder in folders]
    rows = training_set(parts, mode="union" if arm.config.replace is None else "replace", p=arm.config.replace or 0.0,
                        soft_label=arm.config.soft_label, draw=arm.config.draw, mix=arm.config.mix,
                        opened=study.opened.run)
    ids = ids_hash(index.seed_ids)
    if others := [part.run for part in rows.parts if part.ids_sha256 != ids]:
        raise UsageError(f"arms.{arm.name}: {others[0]} was made from other images than the real rows of study seed "
                         f"{seed}; delete that run, or take `resample` out")
    ratio = sum(len(part) * part.weight for part in rows.parts if not part.is_real) / len(sound_rows(index))
    ratio = ratio if arm.value is None else arm.value.ratio
    name = f"lists/{rows.digest[:8]}.arrow"
    training = study.config.training
    order = [training.shuffle_rows, training.streams] if rows.epoch_rows > training.shuffle_rows else []
    study.files.replace(name, rows.to_bytes())  # also where it is there: it holds paths, and folders may have moved
    trial = Trial(f"{_slug(arm.name)}-s{seed}", arm.name, seed, arm.config.group, ratio, arm.control_of,
                  arm.recipe.augment, arm.recipe.model_dump(mode="json"), name, rows.digest, ids,
                  study.opened.fingerprint(index, data), study.config.test.model_dump(mode="json"), test_sha256, also,
                  list(study.config.frequency), _file_sha256(arm.recipe.checkpoint), max(1, training.workers), order,
                  sum(_expansion_seconds(run, one.copies) for run, one in zip(runs, sources, strict=True)),
                  folders[0] if len(folders) == 1 else "",
                  _fitting_seconds(*runs) + learned_seconds(loops, arm.rounds, arm.stands_for), _baseline(study, arm),
                  *_seeds(study, seed), folders if len(folders) > 1 else [],
                  {} if arm.value is None else arm.value.facts(),
                  rounds=round_facts(loops, arm.rounds, arm.stands_for) if loops else {})
    return trial, rows.epoch_rows


def _seeds(study: Study, seed: int) -> tuple[int | None, int | None]:
    """Seeds of classifier and data where the study varies one alone."""
    first, vary = study.config.seeds[0], study.config.vary
    return {"all": (None, None), "classifier": (seed, first), "data": (first, seed)}[vary]


def _baseline(study: Study, arm: Arm) -> dict[str, Any]:
    """What a trial keeps of the baseline it is, nothing for other arms."""
    if (one := arm.baseline) is None:
        return {}
    found = {**one.settings(), "guide": one.guide.model_dump(mode="json"),
             "sha256": guide_hash(one.guide.weights, one.guide.checkpoint)}
    if one.kind != "clip_linear":
        return {**found, "names_sha256": digest(study.subsets[study.config.seeds[0]][1].classes.asked)}
    data = study.config.validation if one.C is None else None
    return {**found, "validation": None if data is None else data.model_dump(mode="json"),
            "validation_sha256": "" if data is None else fingerprint(study.opened.index(data), data)}


def _also(study: Study) -> dict[str, dict[str, Any]]:
    """The further test sets as trials keep them; those of corrupted images are tested after all trials."""
    classes = next(iter(study.subsets.values()))[1].classes
    found = {}
    for name, one in study.config.extra_tests.items():
        if not one.is_corrupted:
            index = extra_tests.open_test(one, classes).index
            groups = extra_tests.groups_sha256(extra_tests.groups_of(one, index))
            found[name] = {**one.model_dump(mode="json"), "sha256": digest([
                fingerprint(index, one.data), groups, *([map_sha256(one.class_map)] if one.class_map else []),
                *([one.crop_border] if one.crop_border else [])])}
    return found


def _file_sha256(path: str | None) -> str:
    if path is None:
        return ""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _expansion_seconds(run: Run, copies: float | np.ndarray | None) -> float:
    """Process-seconds spent on the copies an arm uses."""
    spent = sum(shard_seconds(receipt) for receipt in run.store.receipts())
    return spent * float(_taken(run, copies).sum()) / run.plan.planned


def _taken(run: Run, copies: float | np.ndarray | None) -> np.ndarray:
    """Copies of each seed of a run that an arm uses."""
    return np.minimum(copies, run.plan.copies) if isinstance(copies, np.ndarray) else run.plan.first_copies(copies)


def _fitting_seconds(*runs: Run) -> float:
    """Process-seconds of the artifacts and models of runs that `fit` made, each once, whatever else uses them."""
    named = [one for run in runs for one in (*run.config.artifacts.values(), run.config.guide.weights,
                                             run.config.prior.weights)]
    folders = {os.path.realpath(one) for one in named if os.path.isdir(one)}
    parts = {os.path.dirname(one) for one in folders if os.path.basename(one) in ("guide", "pipeline")}  # of one prior
    return sum(map(process_seconds, sorted(folders | parts)))


def _differing(arm: Arm, study: Study) -> str:
    """What the recipe of an arm changes, in short."""
    base, own = make_recipe(dict(study.config.recipe)), arm.config.recipe
    preset = [f"preset {own['preset']}"] if own.get("preset") not in (None, study.config.recipe.get("preset")) else []
    return ", ".join(preset + [f"{key}={value}" for key, value in dict(arm.recipe).items()
                               if key in own and getattr(base, key) != value])


def _slug(name: str) -> str:
    """File name of an arm, at most 80 bytes: letters of any script, digits and dots; a long one ends in a hash."""
    kept = "".join(one if one.isalnum() or one == "." else " " for one in normalize("NFC", name.lower()))
    slug = "-".join(kept.split())
    return slug if 0 < len(slug.encode()) <= 80 else f"{slug.encode()[:70].decode(errors='ignore')}-{digest(name)[:8]}"
