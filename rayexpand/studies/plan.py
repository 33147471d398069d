"""What a study costs before it starts, by stage: fits, expansions, decisions, comparisons, trainings.

Nothing is written, no model is loaded, and no data is needed where estimate.seeds, estimate.classes and estimate.tests
say how much there is. What is there already, runs and trained classifiers, is counted as done.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rayexpand.contract.errors import ConfigError, RayexpandError, SeedDataError
from rayexpand.contract.schema import SeedIndex
from rayexpand.data.seeds import build_index, renamed
from rayexpand.data.subsets import choose, ids_hash, sound_rows
from rayexpand.evaluation import select as selecting
from rayexpand.evaluation.select_rules import BY_GUIDE
from rayexpand.fitting.config import fit_config
from rayexpand.fitting.costs import features_pass
from rayexpand.fitting.plan import fit_stages
from rayexpand.runs.amounts import unit_of
from rayexpand.runs.config import RunConfig
from rayexpand.runs.estimate import stand_in
from rayexpand.runs.joined import is_loop, open_samples
from rayexpand.runs.plan import planned_copies
from rayexpand.runs.stages import PlanStage, Sizes, Stages, timed, unknown
from rayexpand.runs.status import view_run
from rayexpand.runs.store import first_look
from rayexpand.storage.places import open_files
from rayexpand.studies.config import StudyConfig, expansion_config, first_run, run_config
from rayexpand.studies.foresight import foreseen, real_sizes
from rayexpand.studies.parts import Arm
from rayexpand.studies.priors import prior_task
from rayexpand.studies.rounds.config import LoopConfig
from rayexpand.studies.rounds.costs import control_stages, loop_stages
from rayexpand.studies.rounds.in_study import foreseen_controls
from rayexpand.studies.rounds.status import read_loop_status
from rayexpand.studies.run_costs import run_stage
from rayexpand.studies.sections import ExpansionConfig
from rayexpand.studies.trainings import Training, results_of, training_stage, trainings_of
from rayexpand.studies.trials import arms_of


@dataclass(frozen=True)
class StudyPlan:
    """Names of `arms` and `seeds`, how many `trainings` there are, of them `controls` and `done` ones, which difference
    the study `sees`, and what it costs."""

    arms: list[str]
    seeds: list[int]
    trainings: int
    controls: int
    done: int
    sees: dict[str, Any]
    costs: Stages

    def to_json(self) -> dict[str, Any]:
        facts = {name: getattr(self, name) for name in ("arms", "seeds", "trainings", "controls", "done", "sees")}
        return {**facts, **self.costs.to_json()}


@dataclass(frozen=True)
class Listed:
    """The images of a study: the subsets by seed, listed or stood in for, and the number of test images."""

    subsets: dict[int, SeedIndex]
    tests: int

    @property
    def first(self) -> SeedIndex:
        return next(iter(self.subsets.values()))

    @property
    def sizes(self) -> Sizes:
        return Sizes(len(sound_rows(self.first)), len(self.first.classes))

    def runs(self, config: StudyConfig) -> list[int]:
        """The seeds whose real images are expanded, each with a run of its own."""
        differ = len({ids_hash(index.seed_ids) for index in self.subsets.values()}) > 1
        return config.seeds if config.resample or differ or config.vary == "data" else config.seeds[:1]


def plan_study(config: StudyConfig) -> StudyPlan:
    """Raises ConfigError where data or test images can neither be listed nor are told by `estimate`, and UsageError
    where there are too few images for `subset` or `value`."""
    listed = listed_for(config)
    files = open_files(config.folder)
    results = results_of(files)
    arms = arms_of(config)
    if config.value is not None and config.estimate.seeds is None:
        fitting = real_sizes(config)
        arms = [one for one in arms if one.value is None or one.value.role != "real" or one.value.size in fitting]
    stages, copies = list[PlanStage](), dict[str, float | None]()
    for name, one in config.expansions.items():
        if name in config.used:
            made, copies[name] = expansion_stages(config, name, one, listed)
            stages += made
    stages += _control_stages(config, arms, listed)
    stages += _selection_stages(config, listed, copies) + _sample_stages(config, listed, copies)
    trainings = trainings_of(config, arms, listed.sizes.images, copies, results)
    if isinstance(trainings, str):
        stages.append(unknown("train", f"{len(arms) * len(config.seeds):,} trainings and controls", trainings))
        trainings = list[Training]()
    else:
        stages.append(training_stage(config, trainings, listed.sizes.classes, listed.tests, files, results))
    seeds, controls = len(config.seeds), sum(one.is_controlled for one in arms)
    if trainings:
        controls = sum(one.is_control for one in trainings)
    return StudyPlan([one.name for one in arms], config.seeds, len(arms) * seeds, controls * seeds,
                     sum(seeds - len(one.seeds) for one in trainings), foreseen(config, listed.tests),
                     timed(stages, config.estimate))


def _control_stages(config: StudyConfig, arms: list[Arm], listed: Listed) -> list[PlanStage]:
    """Samples of the controls of loops, until these are there. Arms of some of the rounds take theirs of the same
    runs."""
    found, seeds = dict[str, PlanStage](), listed.runs(config)
    for arm in foreseen_controls(config, arms):
        for name in (one for one in arm.config.uses if config.expansions[one].rounds is not None):
            made = expansion_config(config, name, config.expansions[name], seeds[0], config.data)
            missing = [seed for seed in seeds if not is_loop(f"{config.folder}/runs/{name}-{seed}")]
            if isinstance(made, LoopConfig) and missing:
                loop = made.model_copy(update={"run": asked_as(config, made.run)})
                found |= {one.name: one for one in control_stages(
                    name, loop, arm.stands_for, listed.first, planned_of(first_run(made), listed.first),
                    config.expansions[name].oversample, len(missing))}
    return list(found.values())


def listed_for(config: StudyConfig) -> Listed:
    """Raises ConfigError with everything that cannot be listed and is not told."""
    told, problems = config.estimate, list[str]()
    whole, tests = None, told.tests
    try:
        whole = build_index(config.data)
    except SeedDataError as error:
        if told.seeds is None or told.classes is None:
            problems += [f"{line}; or tell how much there is with estimate.seeds and estimate.classes"
                         for line in renamed([str(error)], "data")]
        else:
            whole = stand_in(told.seeds, told.classes)
    try:
        tests = len(sound_rows(build_index(config.test)))
    except SeedDataError as error:
        if tests is None:
            problems += [f"{line}; or tell how many there are with estimate.tests"
                         for line in renamed([str(error)], "test")]
    if problems or whole is None or tests is None:
        raise ConfigError(config.name, problems)
    drawn_by = {seed: config.seeds[0] if config.vary == "classifier" else seed for seed in config.seeds}
    subsets = {seed: whole if config.subset.kind == "full" else SeedIndex(
        whole.table.take(choose(whole, config.subset, drawn)), whole.classes) for seed, drawn in drawn_by.items()}
    return Listed(subsets, tests)


def expansion_stages(config: StudyConfig, name: str, one: ExpansionConfig,
                     listed: Listed) -> tuple[list[PlanStage], float | None]:
    """(what its fits and runs cost, samples of each real image; None where nothing says)."""
    if one.run is not None:
        try:
            plan = open_samples(one.run.replace("{seed}", str(config.seeds[0]))).plan
        except RayexpandError:
            return [unknown(f"expand {name}", "", f"{one.run} is not there yet; plan it with its own file")], None
        return [], plan.planned / max(len(plan.index), 1)
    seeds = listed.runs(config)
    made = expansion_config(config, name, one, seeds[0], config.data)
    first = asked_as(config, first_run(made))
    planned = planned_of(first, listed.first)
    pending = [share for seed in seeds if (share := _pending(expansion_config(config, name, one, seed, config.data)))]
    copies = planned / max(listed.sizes.images, 1)
    if not pending:
        return [PlanStage(f"expand {name}", f"{planned * len(seeds):,} images are there", unit_of(first), (0.0, 0.0),
                          "its runs are whole")], copies
    fresh = sum(share == 1.0 for share in pending)
    stages = [replace(stage, name=f"{stage.name} of {name}", times=fresh, hours=_times(stage.hours, fresh))
              for stage in _fits_of(config, one, first, listed) if fresh]
    if isinstance(made, LoopConfig):
        loop = made.model_copy(update={"run": asked_as(config, made.run)})
        return [*stages, *loop_stages(name, loop, listed.first, planned, len(pending), sum(pending))], copies
    return [*stages, run_stage(f"expand {name}", first, listed.first, planned, len(pending), sum(pending),
                               f"expansions.{name}.estimate")], copies


def asked_as(config: StudyConfig, made: RunConfig) -> RunConfig:
    """The run with the section `estimate` of the study, where it has none of its own."""
    return made if "estimate" in made.model_fields_set else made.model_copy(update={"estimate": config.estimate})


def planned_of(made: RunConfig, index: SeedIndex) -> int:
    """Samples of a run of `index`."""
    return int(planned_copies(index, made)[0].sum(dtype="int64"))


def _times(hours: tuple[float, float] | None, times: int) -> tuple[float, float] | None:
    return None if hours is None else (times * hours[0], times * hours[1])


def _pending(made: RunConfig | LoopConfig) -> float:
    """Share of the samples of a run or a loop that is still to be made."""
    if isinstance(made, LoopConfig):
        if not is_loop(made.folder):
            return 1.0
        seen = read_loop_status(made.folder)
        return 0.0 if seen.complete else (seen.pending + seen.left) / max(seen.planned + seen.left, 1)
    if first_look(open_files(made.folder)) is None:
        return 1.0
    totals = view_run(made.folder).totals
    return totals.pending / max(totals.planned, 1)


def _fits_of(config: StudyConfig, one: ExpansionConfig, made: RunConfig, listed: Listed) -> list[PlanStage]:
    if one.fit is None:
        return []
    found, told = list[PlanStage](), {"estimate": config.estimate}
    if one.fit.pretrain is not None:
        found += fit_stages(prior_task(made, one.fit.pretrain).model_copy(update=told), listed.sizes)
    task = fit_config(made, one.fit.guide, one.fit.adapter, one.fit.captions, groups=one.fit.groups,
                      out=f"{config.folder}/artifacts")
    return found if task is None else [*found, *fit_stages(task.model_copy(update=told), listed.sizes)]


def _selection_stages(config: StudyConfig, listed: Listed, copies: dict[str, float | None]) -> list[PlanStage]:
    """Decisions that ask a guide about every sample; what needs no model takes no time worth a line."""
    found = []
    for name, raw in config.selections.items():
        chosen, _ = selecting.checked({**raw, "name": name, "run": "of the study"})
        if chosen is None or not chosen.rule.wants() & BY_GUIDE:
            continue
        used = {one for arm in config.arms if arm.selection == name for one in arm.uses}
        images = round(listed.sizes.images * sum(copies[one] or 0 for one in used)) * len(listed.runs(config))
        guide = chosen.guide or next((run_config(config, one, config.expansions[one], 0, config.data).guide
                                      for one in used if config.expansions[one].run is None), None)
        found.append(features_pass(f"select {name}", images, ["the run" if guide is None else guide.weights],
                                   chosen.device, config.estimate))
    return found


def _sample_stages(config: StudyConfig, listed: Listed, copies: dict[str, float | None]) -> list[PlanStage]:
    """The comparison of samples with real images."""
    if (wanted := config.samples) is None:
        return []
    sets = 1 + (wanted.real is not None) + sum(bool(arm.uses) for arm in config.arms) * len(config.seeds)
    most = max([listed.tests, *(round(listed.sizes.images * (one or 0)) for one in copies.values())])
    images = sets * min(most, wanted.images or most)
    extractor = wanted.extractor.timm or wanted.extractor.preset or wanted.extractor.guide or "the run's guide"
    return [features_pass("compare samples", images, [extractor], wanted.extractor.device, config.estimate)]
