"""What the classifiers of a study cost before they are trained: steps and images of every arm, with its controls.

Hours come from what the study has trained so far, else from what `bench` measured of it, else from counted arithmetic
over a range of shares. What is trained already with the same recipe is not trained again and not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayexpand.classifier.recipe import Recipe, make_recipe
from rayexpand.contract.settings import digest
from rayexpand.fitting.costs import trained, unit_on
from rayexpand.runs.config import DIGITS
from rayexpand.runs.fleet_hours import GPU, PROCESS
from rayexpand.runs.stages import PlanStage, shown, unknown
from rayexpand.storage.files import Files
from rayexpand.storage.tables import healthy_json
from rayexpand.studies.baselines import UNTRAINED
from rayexpand.studies.config import StudyConfig
from rayexpand.studies.parts import Arm
from rayexpand.studies.rounds.controls import KINDS
from rayexpand.studies.rounds.in_study import foreseen_controls
from rayexpand.studies.value_config import updates_of


@dataclass(frozen=True)
class Training:
    """One arm, or the control of one, with all its repetitions."""

    arm: str
    recipe: Recipe
    steps: int  # 0: no network is trained step by step
    batch: int
    seeds: tuple[int, ...]  # that are still to be trained
    is_control: bool = False

    @property
    def tests(self) -> int:
        """Passes over the test images in one training: after each epoch."""
        return max(1, min(self.recipe.epochs, self.steps))


@dataclass(frozen=True)
class TrainingRate:
    """Least and most hours of one training, of `unit`, and how they are known."""

    hours: tuple[float, float]
    unit: str
    source: str
    petaflop: float | None = None


def trainings_of(config: StudyConfig, arms: Sequence[Arm], real: int, copies: Mapping[str, float | None],
                 results: Sequence[Mapping[str, Any]]) -> list[Training] | str:
    """Every training of the study: of `arms`, then their controls. `real`: images of the subset; `copies`: of each, by
    expansion. A word of what is missing where rows of an arm are unknown."""
    rows: dict[str, int] = {}
    for arm in arms:
        if isinstance(count := _epoch_rows(config, arm, real, copies), str):
            return count
        rows[arm.name] = count
    found, served = list[Training](), set[tuple[int, str]]()
    values = {arm.name: rows[arm.name] for arm in arms if arm.value is not None}
    for arm in arms:
        recipe = arm.recipe
        if arm.value is not None and recipe.updates is None:
            recipe = recipe.model_copy(update={"updates": updates_of(values, recipe.batch, recipe.epochs)})
        found.append(_training(config, arm.name, recipe, rows[arm.name], arm, results))
        if arm.is_real_alone:
            served.add((rows[arm.name], _digest(recipe)))
    for arm in arms:
        key = rows[arm.name], _digest(arm.recipe)
        if arm.is_controlled and key not in served:
            served.add(key)
            found.append(_training(config, arm.name, arm.recipe, rows[arm.name], None, results))
    found += [_training(config, f"{KINDS[one.stands_for]} for {one.name}", one.recipe, rows[one.name], one, results)
              for one in foreseen_controls(config, arms)]
    return found


def training_stage(config: StudyConfig, trainings: Sequence[Training], n_classes: int, tests: int, files: Files,
                   results: Sequence[Mapping[str, Any]], name: str = "train") -> PlanStage:
    """All that is still to be trained. `tests`: test images."""
    pending = [one for one in trainings if one.seeds]
    trials, total = sum(len(one.seeds) for one in pending), sum(len(config.seeds) for _ in trainings)
    steps = sum(one.steps * len(one.seeds) for one in pending)
    what = f"{trials:,} training{'s' * (trials != 1)}, {steps:,} step{'s' * (steps != 1)}" + (
        f"; {total - trials:,} are done" if total > trials else "")
    if not pending:
        return PlanStage(name, what, GPU, (0.0, 0.0), "nothing is left to train")
    rates = [_rate(config, one, n_classes, tests, files, results) for one in pending]
    if missing := next((one for one in rates if isinstance(one, str)), None):
        return unknown(name, what, missing, _unit(config))
    known = [(rate, len(one.seeds)) for one, rate in zip(pending, rates, strict=True) if isinstance(rate, TrainingRate)]
    hours = [sum(rate.hours[end] * seeds for rate, seeds in known) for end in (0, 1)]
    parts = [sum(rate.hours) for rate, seeds in known for _ in range(seeds)]
    sources = list(dict.fromkeys(rate.source for rate, _ in known))
    training, longest = config.training, max(pending, key=lambda one: one.steps)
    saves = longest.steps // training.checkpoint_steps if training.checkpoint_steps else longest.tests
    flops = [rate.petaflop * seeds for rate, seeds in known if rate.petaflop is not None]
    source = "; ".join([*sources[:3], *([f"and {len(sources) - 3} more"] if len(sources) > 3 else [])])
    images = sum(one.steps * one.batch * len(one.seeds) for one in pending)
    if all(hours):
        each = known[0][0].unit
        source += f": {shown([images / 3600 / end for end in reversed(hours)])} images/s and {each}, tests included"
    return PlanStage(name, what, known[0][0].unit, (hours[0], hours[1]), source, tasks=trials,
                     width=max(1, training.workers), saves=max(1, saves), parts=tuple(parts) if any(parts) else (),
                     petaflop=sum(flops) if flops else None)


def results_of(files: Files) -> list[dict[str, Any]]:
    """What a study has trained so far; damaged results count as none."""
    found = (healthy_json(files, f"results/{name}") for name in files.list("results") if name.endswith(".json"))
    return [one for one in found if one is not None]


def _training(config: StudyConfig, name: str, recipe: Recipe, rows: int, arm: Arm | None,
              results: Sequence[Mapping[str, Any]]) -> Training:
    """`arm` None: the control of the arm of that name."""
    said = recipe.model_dump(mode="json")
    kind = arm.stands_for if arm is not None else ""
    of = name if arm is None or not kind else arm.name  # which arm it is, or the control of
    done = {one["seed"] for one in results if one["recipe"] == said and (
        one["arm"] == of if arm is not None and not kind else one.get("control_of") == of
        and (one.get("rounds") or {}).get("stands_for", "") == kind)}
    batch = max(1, min(recipe.batch, rows))
    steps = recipe.updates or recipe.epochs * (rows // batch)
    if arm is not None and arm.baseline is not None and arm.baseline.kind in UNTRAINED:
        steps = 0
    return Training(name, recipe, steps, batch, tuple(seed for seed in config.seeds if seed not in done),
                    arm is None or bool(kind))


def _epoch_rows(config: StudyConfig, arm: Arm, real: int, copies: Mapping[str, float | None]) -> int | str:
    """Rows of an epoch, if everything planned is kept."""
    if arm.value is not None:
        return max(1, round(real * (2 if arm.value.role == "repeated" else arm.value.size) + arm.value.ratio * real))
    if arm.config.replace is not None:
        return real
    synthetic = 0.0
    for name in arm.config.uses:
        made = copies[name]
        if made is None and arm.copies is None:
            return (f"expansions.{name}: its run is not there yet, and nothing says how many samples it has; give its "
                    "arms a ratio")
        loop = config.expansions[name].rounds
        synthetic += min(one for one in (made, arm.copies) if one is not None) * (
            1.0 if loop is None else loop.share_of(arm.rounds))
    return max(1, round(real * arm.config.real + real * synthetic * arm.config.weight))


def _rate(config: StudyConfig, one: Training, n_classes: int, tests: int, files: Files,
          results: Sequence[Mapping[str, Any]]) -> TrainingRate | str:
    """Of one training; what would tell where it is unknown."""
    workers = max(1, config.training.workers)
    alike = [made for made in results if made["updates"] and made["recipe"] == one.recipe.model_dump(mode="json")]
    if own := [made for made in alike if one.arm in (made["arm"], made.get("control_of"))] or alike:
        each = [made["seconds"] / made["updates"] * max(1, made["workers"]) for made in own]
        hours = one.steps * sum(each) / len(each) / 3600
        return TrainingRate((hours, hours), PROCESS if own[0]["device"].startswith("cpu") else GPU,
                            f"measured by {len(own)} finished trainings")
    if (step := _bench(config, one, files)) is not None:
        least, most, device = step
        return TrainingRate((one.steps * least * workers / 3600, one.steps * most * workers / 3600),
                            PROCESS if device.startswith("cpu") else GPU,
                            "measured by `rayexpand bench`: loader and step, beside each other to one after the other")
    made = trained("", "", one.recipe, n_classes, one.steps * one.batch, one.tests * tests, config.estimate,
                   _unit(config))
    if made.hours is None:
        return made.source
    source = f"{one.recipe.backbone} at {one.recipe.size} px counted, {made.source.partition(' counted, ')[2]}"
    return TrainingRate(made.hours, made.unit, source, made.petaflop)


def _bench(config: StudyConfig, one: Training, files: Files) -> tuple[float, float, str] | None:
    """(least and most seconds of a step, device) of the arm, else of one of its batch."""
    batch = make_recipe(config.recipe).batch
    found = healthy_json(files, f"bench-{batch}.json")
    arms = [] if found is None else found["arms"]
    chosen = next((arm for arm in arms if arm["arm"] == one.arm), None) or next(
        (arm for arm in arms if arm["batch"] == one.batch and not one.recipe.jsd), None)
    if found is None or chosen is None:
        return None
    loader, step = chosen["loader_seconds"], chosen["step_seconds"]
    return max(loader, step), loader + step, found["device"]


def _unit(config: StudyConfig) -> str:
    training = config.training
    return unit_on(training.device, training.gpus_per_worker == 0, config.data.source == DIGITS)


def _digest(recipe: Recipe) -> str:
    return digest(recipe.model_dump(mode="json"))
