"""What a sweep costs before it starts, by what it tries (count.py): epochs, hours, prices.

Suggestions of random and grid search are known beforehand, so equal ones are counted once. Optuna's follow from scores;
random ones stand for them. How much ASHA saves depends on scores too: its rule is simulated for trials that come in
random order and keep their rank, and an interval goes from that to no trial being stopped.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rayexpand.contract.errors import ConfigError
from rayexpand.contract.rng import generator, row_key
from rayexpand.contract.settings import digest
from rayexpand.runs.config import EstimateConfig, semantic
from rayexpand.runs.stages import PlanStage, Stages, timed
from rayexpand.storage.places import open_files
from rayexpand.studies.config import StudyConfig
from rayexpand.studies.plan import Listed, expansion_stages, listed_for
from rayexpand.studies.sweep.config import (
    AshaConfig,
    SweepConfig,
    base_study,
    by_content,
    dimensions_of,
    identity,
    pilot_run,
    study_with,
)
from rayexpand.studies.sweep.count import SweepCount, count_of
from rayexpand.studies.sweep.halving import Halving
from rayexpand.studies.sweep.space import suggest
from rayexpand.studies.sweep.sweep import read_results
from rayexpand.studies.trainings import training_stage, trainings_of
from rayexpand.studies.trials import arms_of

MOST = 500  # trials that are put together one by one; the rest costs as much as these on average
ORDERS = 200  # in which trials come, of simulated ASHA


@dataclass(frozen=True)
class SweepPlan:
    """What is tried (`count`), how many trials are `done`, `epochs` of all trainings without ASHA and, least and most,
    `with_asha`, and what it costs."""

    count: SweepCount
    done: int
    epochs: int
    with_asha: tuple[int, int] | None
    costs: Stages

    @property
    def words(self) -> str:
        """Epochs and cost, for people."""
        asha = "" if self.with_asha is None else f", {self.with_asha[0]:,} to {self.with_asha[1]:,} with ASHA"
        done = f"; {self.done:,} trials are done" if self.done else ""
        return f"{self.epochs:,} epochs{asha}{done}; {self.costs.words()}"

    @property
    def sentence(self) -> str:
        """Number of trials and cost."""
        return f"{self.count.sentence}; {self.words}"

    def to_json(self) -> dict[str, Any]:
        return {**self.count.to_json(), "done": self.done, "sentence": self.sentence,
                "epochs": {"without_asha": self.epochs, "with_asha": self.with_asha and list(self.with_asha)},
                **self.costs.to_json()}


def plan_sweep(config: SweepConfig) -> SweepPlan:
    """Loads no model, writes nothing. Raises ConfigError where data or test images can neither be listed nor are told
    by `estimate`."""
    asked, files, count = asked_of(config), open_files(config.folder), count_of(config)
    base = base_study(config) if files.read("sweep.json") is not None else {
        **config.study, **({} if config.seeds is None else {"seeds": config.seeds})}
    studies = _studies(config, base, asked, min(count.asked, MOST))
    listed, results = listed_for(next(iter(studies.values()))), read_results(files)
    if config.hold_out is not None:
        listed = replace(listed, tests=config.hold_out * listed.sizes.classes)
    left = {key: study for key, study in studies.items() if key[:8] not in results}
    pilots = {key: study for study in left.values() for key in [_pilot(study)] if key}
    share = _asha_share(config.scheduler, config.epochs, len(left))
    again = next(iter(studies.values())).model_copy(update={"seeds": list(range(count.again))})
    scale = count.trials / len(studies)
    stages = [_together("pilots", f"pilots of {round(scale * len(pilots)):,} configurations",
                        [one for study in pilots.values() for one in _pilot_stages(study, listed)], scale),
              _together("trials", f"{round(scale * len(left)):,} trials of {count.seeds} seeds",
                        [_trial(study, listed) for study in left.values()], scale, share[0]),
              _together("best again", f"{count.again} trainings", [_trial(again, listed)] * bool(count.again), 1.0)]
    room = asked.gpus if config.max_concurrent is None else min(asked.gpus, config.max_concurrent)
    epochs = sum(arms_of(study)[0].recipe.epochs for study in studies.values()) * count.seeds
    with_asha = None if config.scheduler is None else (round(scale * epochs * share[0]), round(scale * epochs))
    return SweepPlan(count, len(studies) - len(left), round(scale * epochs), with_asha,
                     timed([one for one in stages if one is not None], asked.model_copy(update={"gpus": room})))


def asked_of(config: SweepConfig) -> EstimateConfig:
    """The section `estimate` of the sweep, else of its study."""
    own = config.study.get("estimate") if "estimate" not in config.model_fields_set else None
    return config.estimate if own is None else EstimateConfig(**own)


def asha_epochs(scheduler: AshaConfig, epochs: int, ranks: Sequence[int]) -> int:
    """Epochs that trials run which come one after the other in this order and keep their rank (0 the best)."""
    halving = Halving(scheduler, epochs)
    return sum(next((epoch for epoch in halving.epochs if not halving.goes_on(str(trial), epoch, -rank)), epochs)
               for trial, rank in enumerate(ranks))


def _asha_share(scheduler: AshaConfig | None, epochs: int, trials: int) -> tuple[float, float]:
    """Least and most share of all epochs that are run: a tenth of the orders ends below the first."""
    if scheduler is None or not trials:
        return 1.0, 1.0
    many = min(trials, MOST)
    found = [asha_epochs(scheduler, epochs, generator(row_key(0, "sweep", "", order, 0, "asha")).permutation(many)
                         .tolist()) for order in range(max(10, ORDERS * 20 // max(many, 20)))]
    return float(np.quantile(found, 0.1)) / (epochs * many), 1.0


def _studies(config: SweepConfig, base: Mapping[str, Any], asked: EstimateConfig,
             many: int) -> dict[str, StudyConfig]:
    """Different studies that the first suggestions are, by their identity."""
    space, search = dimensions_of(config), "random" if config.search == "optuna" else config.search
    found = dict[str, StudyConfig]()
    for number in range(many):
        with contextlib.suppress(ConfigError):  # values that do not go together, which `count_of` names
            study = study_with(base, config, suggest(space, search, config.seed, number))
            found.setdefault(digest(identity(study)), study.model_copy(update={"estimate": asked}))
    if not found:
        raise ConfigError(config.name, ["space: no values of it go together; take fewer or other ones"])
    return found


def _pilot(study: StudyConfig) -> str:
    """What decides the runs of a trial; "" for real images alone, and for runs that exist."""
    data = by_content(study.data)
    made = [[semantic(pilot_run(one, data)), one.fit and one.fit.model_dump(mode="json")]
            for one in study.expansions.values() if one.run is None]
    return digest(made) if made else ""


def _pilot_stages(study: StudyConfig, listed: Listed) -> list[PlanStage]:
    return [stage for name, one in study.expansions.items() for stage in expansion_stages(study, name, one, listed)[0]]


def _trial(study: StudyConfig, listed: Listed) -> PlanStage:
    """The trainings of one configuration, in one process."""
    alone = study.model_copy(update={"training": study.training.model_copy(update={"workers": 0})})
    copies = {name: expansion_stages(alone, name, one, listed)[1] for name, one in study.expansions.items()}
    files = open_files(study.folder)
    made = trainings_of(alone, arms_of(alone), listed.sizes.images, copies, [])
    if isinstance(made, str):
        raise ConfigError(study.name, [made])
    return training_stage(alone, made, listed.sizes.classes, listed.tests, files, [])


def _together(name: str, what: str, stages: Sequence[PlanStage], scale: float, share: float = 1.0) -> PlanStage | None:
    """Stages of many trials as one, each of them a task; `share`: of the hours at least."""
    if not stages:
        return None
    tasks, sizes = max(1, round(scale * len(stages))), [one.bytes for one in stages]
    size = None if None in sizes else round(scale * sum(one for one in sizes if one is not None))
    if (lacking := next((one for one in stages if one.hours is None), None)) is not None:
        return replace(lacking, name=name, what=what, tasks=tasks, bytes=size)
    known = [one.hours for one in stages if one.hours is not None]
    least, most = scale * share * math.fsum(one[0] for one in known), scale * math.fsum(one[1] for one in known)
    sources = list(dict.fromkeys(one.source for one in stages))
    more = f"; and {len(sources) - 1} more of the kind" if len(sources) > 1 else ""
    parts = tuple(sum(one) for one in known)
    return PlanStage(name, what, stages[0].unit, (least, most), sources[0] + more, tasks=tasks,
                     saves=min(one.saves for one in stages), bytes=size,
                     parts=parts if scale == 1 and all(parts) else ())
