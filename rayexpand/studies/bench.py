"""What the arms of a study cost in training on this machine, and the overhead of each over the baseline,
or over the first arm of its own batch size where that is another one.

Steps of every arm are timed in turn, several rounds of them, with a clock for the loader (reading, decoding, augmenting
and mixing the images of a step) and one for the optimiser step. Rounds begin in the middle of equal parts of the
training, and figures are medians over rounds, so that a machine whose speed drifts is compared with itself. What
samples cost is left out: they are there before (DiffCoRe-Mix, equation 9).

    paper             here              meaning, unit
    T                 seconds           of the whole training: steps x (loader + step); loaders that work beside the
                                        training hide the shorter of the two
    A_O               overhead          (T - T of the baseline) / T of the baseline, percent
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, median
from typing import Any

from rayexpand.classifier.recipe import make_recipe
from rayexpand.contract.device import choose_device, torch_threads
from rayexpand.contract.errors import UsageError
from rayexpand.runs.config import RunConfig
from rayexpand.runs.store import first_look
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import replace_json
from rayexpand.studies.config import StudyConfig
from rayexpand.studies.parts import Study, Trial
from rayexpand.studies.study import STUDY_FOLDERS, prepare_study
from rayexpand.studies.trial import TrialWork, make_classifier, open_work
from rayexpand.studies.trials import make_trials

ROUNDS = 3
STEPS = 10  # of one arm in a round, at least


@dataclass(frozen=True, slots=True)
class ArmCost:
    """Seconds are those of one step, the median of rounds; `overhead` is of the whole training, `overhead_per_image` of
    equally many images, both in percent of the baseline."""

    arm: str
    batch: int
    steps: int  # of the training
    loader_seconds: float
    step_seconds: float
    against: str = ""  # the arm it is compared with
    overhead: float = 0.0
    overhead_per_image: float = 0.0

    @property
    def seconds(self) -> float:
        return self.steps * (self.loader_seconds + self.step_seconds)

    @property
    def seconds_per_image(self) -> float:
        return (self.loader_seconds + self.step_seconds) / self.batch


@dataclass(frozen=True, slots=True)
class TrainingBench:
    arms: tuple[ArmCost, ...]
    baseline: str
    images: int  # timed, of each arm
    device: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "arms": [{**asdict(one), "seconds": one.seconds} for one in self.arms]}

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        return ("arm", "batch", "loader, ms", "step, ms", "training, s", "overhead, %", "the same images, %"), [
            (one.arm, str(one.batch), f"{1e3 * one.loader_seconds:.1f}", f"{1e3 * one.step_seconds:.1f}",
             f"{one.seconds:,.1f}", *(("baseline", "") if one.arm == one.against else
                                      (f"{one.overhead:+z.1f}", f"{one.overhead_per_image:+z.1f}")))
            for one in self.arms]


def overhead(augmented: float, plain: float) -> float:
    """Equation 9 of DiffCoRe-Mix, percent."""
    return (augmented - plain) / plain * 100


def bench_study(config: StudyConfig, images: int = 0) -> TrainingBench:
    """Times at least `images` images of every arm with the first seed. Writes bench-<batch of the recipe>.json in the
    study's folder, and nothing else there that `train` would not find again.

    Raises what `prepare_study` raises, and UsageError where an expansion of an arm is not complete.
    """
    study = prepare_study(config)
    if missing := sorted({name for (name, _), made in study.expansions.items()
                          if isinstance(made, RunConfig) and first_look(open_files(made.folder)) is None}):
        raise UsageError(f"expansions.{missing[0]}: its samples are not there, and bench measures training on them; "
                         "make them with `rayexpand train` and this file first")
    with torch_threads(config.training.threads), tempfile.TemporaryDirectory() as folder:
        device = str(choose_device(config.training.device))
        trials, works = _opened(study, folder)
        per_round = max(STEPS, *(math.ceil(images / (ROUNDS * work.feed.batch)) for work in works.values()))
        rounds = [{arm: _timed(work, device, (2 * number + 1) * work.feed.total_steps // (2 * ROUNDS), per_round)
                   for arm, work in works.items()} for number in range(ROUNDS)]
    costs, plain = _costs(study, trials, works, rounds)
    timed = ROUNDS * per_round * min(work.feed.batch for work in works.values())
    found = TrainingBench(costs, plain.arm, timed, device)
    batch = make_recipe(config.recipe).batch  # an epoch of fewer rows than that is one smaller batch
    replace_json(study.files, f"bench-{batch}.json", {**found.to_json(), "recipe_batch": batch})
    return found


def _opened(study: Study, folder: str) -> tuple[list[Trial], dict[str, TrialWork]]:
    """Trials of the first seed, ready to be trained. Their files lie in `folder`, for those of the study may have been
    trained with other settings."""
    beside = replace(study, files=open_files(folder))
    for name in STUDY_FOLDERS:
        beside.files.make_folder(name)
    trials = [one for one in make_trials(beside) if one.seed == study.config.seeds[0] and one.is_trained]
    return trials, {one.arm: open_work(beside.files, one, study.config.training) for one in trials}


def _timed(work: TrialWork, device: str, start: int, steps: int) -> tuple[float, float]:
    """Mean seconds of loader and optimiser step over `steps` steps, the images those of steps `start` on; one more
    step before them warms both up."""
    classifier, loading, training = make_classifier(work, device), list[float](), list[float]()
    batches = work.feed.batches(start, start + steps + 1)
    for _ in range(steps + 1):
        at = time.perf_counter()
        batch = next(batches)
        loaded = time.perf_counter()
        classifier.step = batch.step  # of a network that was not trained before
        classifier.update(batch)  # ends when the device has done it, for it returns the loss
        loading.append(loaded - at)
        training.append(time.perf_counter() - loaded)
    return fmean(loading[1:]), fmean(training[1:])


def _costs(study: Study, trials: Sequence[Trial], works: Mapping[str, TrialWork],
           rounds: Sequence[Mapping[str, tuple[float, float]]]) -> tuple[tuple[ArmCost, ...], ArmCost]:
    """Of every arm, and of the baseline."""
    found = [ArmCost(one.arm, works[one.arm].feed.batch, works[one.arm].feed.total_steps,
                     median(seconds[one.arm][0] for seconds in rounds),
                     median(seconds[one.arm][1] for seconds in rounds)) for one in trials]
    wanted = study.config.baseline or trials[0].arm
    plain = next((one for one in found if one.arm == wanted), None)
    if plain is None:
        raise UsageError(f"baseline: {wanted!r} is not trained, so nothing costs more than it; name one of "
                         f"{', '.join(works)}")
    beside = {one.batch: one for one in [*reversed(found), plain]}  # the first of its batch, or the baseline itself
    return tuple(replace(one, against=(of := beside[one.batch]).arm, overhead=overhead(one.seconds, of.seconds),
                         overhead_per_image=overhead(one.seconds_per_image, of.seconds_per_image))
                 for one in found), plain
