"""What a loop makes and costs by round before it starts, and what would keep it from starting.

Nothing is written and no model is loaded. No data is needed where run.estimate.seeds and run.estimate.classes say how
much there is. What is there already counts as done: samples, and trainings before a decision that is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from rayexpand.contract.errors import RayexpandError, SeedDataError
from rayexpand.contract.rng import PlanRng
from rayexpand.contract.schema import SeedIndex
from rayexpand.data import seeds
from rayexpand.data.folds import folds_of
from rayexpand.data.subsets import sound_rows
from rayexpand.fitting.scores import scoring_stage
from rayexpand.runs.config import RunConfig
from rayexpand.runs.estimate import stand_in
from rayexpand.runs.joined import is_loop
from rayexpand.runs.stages import PlanStage, Sizes, Stages, timed
from rayexpand.runs.store import first_look
from rayexpand.storage.places import open_files
from rayexpand.studies.rounds.config import LoopConfig
from rayexpand.studies.rounds.costs import guide_stage
from rayexpand.studies.rounds.dealing import parts_of, room_problem
from rayexpand.studies.rounds.loop import refuse_overlap
from rayexpand.studies.rounds.status import LoopStatus, read_loop_status
from rayexpand.studies.run_costs import run_stage


@dataclass(frozen=True)
class LoopPlan:
    """Rows of each round, what of the budget no round spends, and what each stage costs."""

    seeds: int
    budget: int
    rounds: tuple[int, ...]
    guided_from: int | None
    costs: Stages

    @property
    def unspent(self) -> int:
        return self.budget - sum(self.rounds)

    def to_json(self) -> dict[str, Any]:
        return {"seeds": self.seeds, "budget": self.budget, "rounds": list(self.rounds), "unspent": self.unspent,
                "guided_from": self.guided_from, **self.costs.to_json()}


def plan_loop(config: LoopConfig) -> LoopPlan:
    """Raises SeedDataError where the seeds can neither be listed nor are told by run.estimate."""
    told = config.run.estimate
    try:
        index = seeds.build_index(config.run.data)
    except SeedDataError:
        if told.seeds is None:
            raise
        index = stand_in(told.seeds, told.classes or 1)
    planned = int(_base(config, index).sum(dtype=np.int64))
    parts = parts_of(config.rounds, planned)[:config.rounds.count]
    status = read_loop_status(config.folder) if is_loop(config.folder) else None
    return LoopPlan(len(index), planned, tuple(parts), config.rounds.guided_from,
                    timed(_stages(config, index, parts, status), told))


def loop_problems(config: LoopConfig, index: SeedIndex) -> list[str]:
    """What keeps a loop of these seeds from being dealt, scored or compared, one line each."""
    rounds, base_N = config.rounds, _base(config, index)
    found = [room_problem(rounds, base_N, parts_of(rounds, int(base_N.sum(dtype=np.int64))))]
    checks: list[Callable[[], object]] = [partial(refuse_overlap, config, index)]
    if rounds.scores_seeds:
        checks.append(partial(folds_of, index, config.run.data, rounds.scores.folds, config.run.seed,
                              rounds.scores.group))
    for check in checks:
        try:
            check()
        except RayexpandError as error:
            found.append(str(error))
    return [one for one in found if one]


def _base(config: LoopConfig, index: SeedIndex) -> np.ndarray:
    return config.run.method.copies(index, PlanRng(config.run.seed, config.run.method.name))


def _stages(config: LoopConfig, index: SeedIndex, parts: list[int], status: LoopStatus | None) -> Iterator[PlanStage]:
    """Scoring, guide and samples of each round."""
    rounds, sizes = config.rounds, Sizes(len(sound_rows(index)), len(index.classes))
    decided = {} if status is None else {one.decision.round: one for one in status.rounds}
    for number, rows in enumerate(parts, 1):
        if status is not None and status.ended and number not in decided:
            return  # it will not be made
        seen, before = sum(parts[:number - 1]), list[PlanStage]()
        if rounds.scores_seeds and number > 1:
            before.append(scoring_stage(f"score seeds for round {number}", rounds.scores, config.training, config.run,
                                        sizes, seen))
        if rounds.trains_guide and (number > 1 if rounds.guided_from is None else number >= rounds.guided_from):
            before.append(guide_stage(f"guide of round {number}", config, sizes, seen))
        yield from (_done(one) if number in decided else one for one in before)
        run = None if number not in decided else decided[number].run.status
        left = 1.0 if run is None else run.pending / max(run.planned, 1)
        guided = ", guided" * _is_guided(config, number)
        yield run_stage(f"expand round {number}{guided}", _measurable(config, number), index, rows, 1, left,
                        "run.estimate")


def _done(stage: PlanStage) -> PlanStage:
    return replace(stage, what=f"{stage.what}: done", hours=(0.0, 0.0), source="the round is decided", parts=())


def _is_guided(config: LoopConfig, number: int) -> bool:
    first = config.rounds.guided_from
    return first is not None and number >= first


def _measurable(config: LoopConfig, number: int) -> RunConfig:
    """The run of a round, or of the last round before it that is sampled in the same way and has begun, whose rate is
    known."""
    alike = [one for one in range(number, 0, -1) if _is_guided(config, one) == _is_guided(config, number)]
    begun = next((one for one in alike if first_look(open_files(config.of_round(one).folder)) is not None), number)
    return config.of_round(begun)
