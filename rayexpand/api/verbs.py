"""One function for each verb."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

from rayexpand.api.driving import (
    Relay,
    alive,
    at,
    drive_rounds_with,
    driver,
    extract_with,
    find_with,
    fit_with,
    machines_with,
    score_with,
    show_with,
    train_by,
)
from rayexpand.api.files import Job, Set, config_of, data_of, parsed, preflight, read_job, where_of
from rayexpand.api.folders import StudyFolder, SweepFolder
from rayexpand.api.folders import open as open_folder
from rayexpand.api.results import (
    Artifact,
    Audited,
    Checked,
    Event,
    Planned,
    PlannedFit,
    PlannedLoop,
    PlannedStudy,
    PlannedSweep,
    PreparedData,
    Scores,
    Selected,
)
from rayexpand.api.runs import LoopFolder, RunFolder, drive_to_end, loop_to_end
from rayexpand.contract.errors import EXIT_FAILURE, ConfigError, RayexpandError, UsageError
from rayexpand.contract.secrets import secret_problems

if TYPE_CHECKING:
    from rayexpand.loader.dataset import SampleDataset


def validate(job: Job, *, set: Set = (), machine: Job | None = None) -> Checked:
    """Checks a job of any kind without loading a model. Raises ConfigError for mistakes in the file itself."""
    from rayexpand.data import seeds
    from rayexpand.runs.plan import dealing_of
    from rayexpand.runs.run import changed_since_planned, sampling_of, weight_problems_of

    kind, raw, where = read_job(job, set, machine)
    config = parsed(kind, raw, where)
    problems, listed, dealt = preflight(kind, config), None, list[str]()
    data = data_of(kind, config)
    if data is not None and not secret_problems(data.model_dump(mode="json")) and not seeds.check(data):
        try:
            index, listed = seeds.surveyed(data)
            dealt = dealing_of(index, config) if kind == "run" and not problems else []
            problems += _loop_problems(config, index) if kind == "loop" else []
        except RayexpandError as error:
            problems = list(dict.fromkeys([*problems, *getattr(error, "problems", [str(error)])]))
        else:
            if kind == "run" and (changed := changed_since_planned(config)):
                listed["since_planned"] = changed
    run = config.of_round(1) if kind == "loop" else config  # whose generator is sampled
    if kind in ("run", "loop") and not problems:
        problems = weight_problems_of(run, present_only=True)
    notes = [*sampling_of(run), *dealt] if kind in ("run", "loop") and not problems else []
    sees = ""
    if kind == "study" and not problems:
        from rayexpand.studies.foresight import foreseen, real_sizes

        try:
            sees = foreseen(config)["sentence"]
            real_sizes(config)
        except RayexpandError as error:
            problems = [str(error)]
    return Checked(kind, config.model_dump(mode="json"), problems, listed, notes, sees,
                   _tries(config, costs=not problems) if kind == "sweep" else [])


def _loop_problems(config: Any, index: Any) -> list[str]:
    from rayexpand.studies.rounds.plan import loop_problems

    return loop_problems(config, index)


def _tries(config: Any, *, costs: bool = True) -> list[str]:
    """What a sweep will try, and what that costs, in words. Costs want the data, or `estimate`."""
    from rayexpand.studies.sweep.count import count_of
    from rayexpand.studies.sweep.plan import plan_sweep

    found = count_of(config)
    return [found.sentence, *found.lines(), *([plan_sweep(config).words] if costs else [])]


def prepare_data(name: str, folder: str | os.PathLike[str], *, split: str = "official", label: str = "",
                 allow_counts: bool = False) -> PreparedData:
    """Makes the official layout of a published dataset readable: a manifest and class words beside its images.

    `split`: the official one, or the name of a paper; `label`: which of its labels; `allow_counts`: also with other
    counts than those published, which are then in `.notes`. `published_sets` has the names.
    """
    from rayexpand.data.published import prepare

    return PreparedData(**vars(prepare(name, os.fspath(folder), split, label, allow_counts)))


def published_sets() -> list[dict[str, Any]]:
    """The datasets that `prepare_data` knows: `name`, `title`, `labels`, `files`, and by split images and classes."""
    from rayexpand.data.published import SETS

    return [{"name": name, "title": one.title, "labels": [*filter(None, one.labels)],
             "files": [*dict.fromkeys(one.files.values())],
             "splits": {split: {"images": dict(by.counts), "classes": by.classes, "about": by.about}
                        for split, by in one.divisions.items()}} for name, one in SETS.items()]


def plan(job: Job, *, set: Set = (),
         machine: Job | None = None) -> Planned | PlannedFit | PlannedLoop | PlannedStudy | PlannedSweep:
    """What a run, loop, fit, study or sweep makes and costs, by stage, and what still keeps it from starting, without
    loading a model; of a study also the difference it can show, of a sweep the number of trials."""
    from rayexpand.runs.estimate import estimate_config
    from rayexpand.runs.run import changed_since_planned, measured
    from rayexpand.runs.run import preflight as run_preflight

    kind, raw, where = read_job(job, set, machine)
    if kind in ("fit", "loop", "study", "sweep"):
        config = parsed(kind, raw, where)
        if problems := secret_problems(config.model_dump(mode="json")):
            raise ConfigError(where_of(job), problems)
        return _planned(kind, config, preflight(kind, config))
    config = parsed(kind, raw, where, "run", "plan")
    if problems := secret_problems(config.model_dump(mode="json")):
        raise ConfigError(where_of(job), problems)
    estimate = estimate_config(config, measured(config))
    if changed := changed_since_planned(config):
        estimate.notes["images"] += f"; {changed}"
    return Planned(estimate, run_preflight(config))


def _planned(kind: str, config: Any, problems: list[str]) -> PlannedFit | PlannedLoop | PlannedStudy | PlannedSweep:
    if kind == "fit":
        from rayexpand.fitting.plan import plan_fit

        return PlannedFit(plan_fit(config), problems)
    if kind == "study":
        from rayexpand.studies.plan import plan_study

        return PlannedStudy(plan_study(config), problems)
    if kind == "loop":
        from rayexpand.studies.rounds.plan import plan_loop

        return PlannedLoop(plan_loop(config), problems)
    from rayexpand.studies.sweep.plan import plan_sweep

    return PlannedSweep(plan_sweep(config), problems)


def bench(job: Job, *, rows: int = 0, set: Set = (), machine: Job | None = None) -> Any:
    """How fast a run is on this machine (runs.bench.Bench). Of a study whose samples are there: what its arms cost in
    training, and how much more than the baseline (studies.bench.TrainingBench). `rows`: at least so many are timed."""
    kind, raw, where = read_job(job, set, machine)
    if kind == "study":
        from rayexpand.studies.bench import bench_study

        return bench_study(parsed(kind, raw, where), rows)
    from rayexpand.runs.bench import bench

    return bench(parsed(kind, raw, where, "run", "bench"), rows)


def fit(job: Job, *, set: Set = (), machine: Job | None = None, out: str | None = None, ray: bool | str = False,
        on: Callable[[Event], None] | None = None) -> dict[str, Artifact]:
    """Makes what methods need of a dataset, by what it is for: of a fit file, or what the method of a run needs. What
    is there already is found, not made again."""
    from rayexpand.artifacts.store import read_facts
    from rayexpand.fitting import config as fits
    from rayexpand.fitting.maker import ARTIFACTS

    kind, raw, where = read_job(job, set, machine)
    if kind == "run":
        run = parsed("run", raw, where)
        fits.refuse_untold_adapter(run, where)
        config = fits.fit_config(run, out=out or ARTIFACTS)
        if config is None:
            raise UsageError(f"{where}: method {run.method.name} needs neither guide nor prototypes fitted; expand it")
    else:
        config = parsed(kind, {**raw, "out": out} if out else raw, where, wanted="fit")
    config, progress = at(config, ray), Relay(on)
    with alive(progress, config.out, "fit", config.name, lazily=True):
        made = fit_with(ray)(config, progress)
    return {role: Artifact(str(folder), read_facts(folder), f"{config.out}/{config.name}-{role}")
            for role, folder in made.items()}


def expand(job: Job, *, set: Set = (), machine: Job | None = None, ray: bool | str = False,
           on: Callable[[Event], None] | None = None, same_process: bool = False) -> RunFolder | LoopFolder:
    """Makes every planned sample of a run or of all rounds of a loop, once, and writes page and card.

    Without Ray samplers run in one child process, so that one that hangs can be ended; `same_process` keeps them here,
    for a debugger. Raises ConfigError (all problems), DigestMismatch for a folder that holds another run, OverBudget
    (whose `.result` is the run) where more rows failed than limits.max_failed allows, EnvironmentFault.
    """
    from rayexpand.runs.run import prepare

    kind, raw, where = read_job(job, set, machine)
    if kind == "loop":
        loop = parsed(kind, raw, where)
        loop = loop.model_copy(update={"run": at(loop.run, ray)})
        return loop_to_end(loop, on, ray=ray, same_process=same_process)
    config = at(parsed(kind, raw, where, "run"), ray)
    return drive_to_end(prepare(config, Relay(on), device_here=not ray, where=where_of(job)), on, ray=ray,
                        same_process=same_process)


def select(job: Job, *, set: Set = (), machine: Job | None = None, ray: bool | str = False,
           on: Callable[[Event], None] | None = None) -> Selected:
    """Decides which samples of a run stay; its data files are not touched."""
    from rayexpand.evaluation.select import select

    config, progress = at(config_of("select", job, set, machine), ray), Relay(on)
    with alive(progress, config.run, "select", config.name):
        return Selected(select(config, score_with(ray, config.cluster), progress))


def evaluate(job: Job, *, set: Set = (), machine: Job | None = None, ray: bool | str = False,
             on: Callable[[Event], None] | None = None) -> Scores:
    """How far the samples of a run are from real images."""
    from rayexpand.evaluation import evaluate as evaluation

    config, progress = at(config_of("evaluate", job, set, machine), ray), Relay(on)
    with alive(progress, config.run, "evaluate", config.name):
        return Scores(evaluation.evaluate(config, extract_with(ray), progress))


def audit(job: Job, *, set: Set = (), machine: Job | None = None, ray: bool | str = False,
          on: Callable[[Event], None] | None = None, same_process: bool = False) -> Audited:
    """Whether samples may be released: which are copies of seeds, and whether pipelines of this kind say who was in the
    dataset. An audit of the latter makes runs and classifiers; the same call continues it. Card and page of the run
    are written anew."""
    from rayexpand.studies import audit as audits

    config, progress = at(config_of("audit", job, set, machine), ray), Relay(on)
    place = config.audit.run or f"{config.out.rstrip('/')}/{config.name}"
    with (alive(progress, place, "audit", config.name),
          driver(ray, config.cluster, same_process=same_process) as drive):
        machines = machines_with(ray, config.cluster, drive, progress)
        found = audits.audit(config, find_with(ray, config.cluster), machines, progress)
    if config.audit.run is not None:
        folder = open_folder(config.audit.run)
        assert isinstance(folder, RunFolder | LoopFolder)
        folder.card()
        folder.report()
    if config.audit.membership is not None:
        from rayexpand.reports.membership import write_membership_page

        found["page"] = str(write_membership_page(found["file"].rpartition("/")[0]))
    return Audited(found)


def convert(preset: str, file: str, out: str) -> dict[str, Any]:
    """Makes the safetensors file of a published extractor of the file that its publisher gives out."""
    from rayexpand.evaluation import presets

    return presets.convert(preset, file, out)


def train(job: Job, *, set: Set = (), machine: Job | None = None, ray: bool | str = False,
          on: Callable[[Event], None] | None = None, same_process: bool = False) -> StudyFolder:
    """Expands what the arms of a study need, compares the samples with real images where it asks for that, trains every
    arm with every seed, and writes the page. What failed are lines of `.failed`; the same call tries it again."""
    from rayexpand.studies.expansions import pending_loops, pending_runs
    from rayexpand.studies.robustness import show_corrupted
    from rayexpand.studies.rounds.in_study import pending_controls, prune
    from rayexpand.studies.sample_scores import score_samples
    from rayexpand.studies.selections import make_selections
    from rayexpand.studies.study import prepare_study
    from rayexpand.studies.trials import announce, arms_of, make_trials

    config, progress = at(config_of("study", job, set, machine), ray), Relay(on)
    study = prepare_study(config)
    with (alive(progress, config.folder, "train", config.name) as heartbeat,
          driver(ray, config.cluster, same_process=same_process) as drive):
        announce(study)
        fit, score = fit_with(ray, on_workers=True), score_with(ray, config.cluster)
        for loop in pending_loops(study, progress, fit, device_here=not ray):
            drive_rounds_with(loop, drive, heartbeat, progress, ray=ray)
        for run in chain(pending_runs(study, progress, fit, device_here=not ray),
                         pending_controls(study, arms_of(config), progress, device_here=not ray)):
            with heartbeat.also_in(run.files):
                drive(run, progress)
        prune(study, arms_of(config), score, progress)
        make_selections(study, score, progress)
        trials = make_trials(study)
        failed = score_samples(study, trials, extract_with(ray), progress)
        failed += train_by(ray, progress)(study.trial_folder, trials)
        failed += show_corrupted(study, trials, show_with(ray), progress)
        if failed:
            heartbeat.ends_with(EXIT_FAILURE, f"{len(failed)} failed: {failed[0]}")
    found = StudyFolder(config.folder, tuple(failed))
    found.report()
    return found


def sweep(job: Job, *, set: Set = (), machine: Job | None = None, ray: bool | str = False,
          on: Callable[[Event], None] | None = None, say: Callable[[str], None] = lambda line: None) -> SweepFolder:
    """Searches the fields of a study for the best classifier, and writes the page and the best as a study file. `say`
    hears what it will try before it starts."""
    from rayexpand.studies.sweep import search as searching
    from rayexpand.studies.sweep.sweep import open_sweep

    config, progress = at(config_of("sweep", job, set, machine), ray), Relay(on)
    for line in _tries(config):
        say(line)
    search = searching.Search(open_sweep(config, progress))

    def show() -> None:
        states = [one["state"] for one in search.results.values()]
        facts = {**{state: states.count(state) for state in ("finished", "stopped", "dropped", "diverged")},
                 "running": len(search.running), "failed": len(search.failed)}
        progress(f"sweeping {config.name}", search.decided, search.total, {
            state: count for state, count in facts.items() if count or state in ("finished", "stopped")})

    run: Any = searching.run_here
    if ray:
        from rayexpand.on_ray.sweep import run_sweep as run
    with alive(progress, config.folder, "sweep", config.name) as heartbeat:
        show()
        run(search, show)
        if search.failed:
            heartbeat.ends_with(EXIT_FAILURE, f"{len(search.failed)} failed: {search.failed[0]}")
    found = SweepFolder(config.folder, tuple(search.failed))
    found.report()
    return found


def report(job: Job, *, set: Set = ()) -> str:
    """Tables and figures over several studies and sweeps, as a file of the kind `pivot` says; returns where the page
    is. The page of one folder is `open(folder).report()`."""
    from rayexpand.reports.pivot import write_pivot_report

    return str(write_pivot_report(config_of("pivot", job, set, None)))


def dataset(run: str | os.PathLike[str] | RunFolder | LoopFolder, selection: str | None = None,
            real: bool | Mapping[str, Any] | None = None, *, copies: int | None = None) -> SampleDataset:
    """Samples of a finished run or loop as a torch dataset of (image uint8 (3, H, W), soft label float32 (K,), facts).

    `selection`: only what this decision keeps; `copies`: the first so many of each seed; `real`: True puts the run's
    own seeds before them, a mapping any `data` section with the same classes.
    """
    from rayexpand.data import seeds
    from rayexpand.loader.dataset import SampleDataset
    from rayexpand.loader.training_set import RowSource
    from rayexpand.runs.joined import open_samples
    from rayexpand.studies.samples import training_set

    folder = run.folder if isinstance(run, RunFolder | LoopFolder) else os.fspath(run)
    parts = [RowSource(run=folder, selection=selection, copies=copies)]
    if real is not None and real is not False:
        data = open_samples(folder).config.data if real is True else seeds.DataConfig(**real)
        parts.append(RowSource(seeds=(seeds.build_index(data), data)))
    return SampleDataset(training_set(parts))


def check_marks(folder: str | os.PathLike[str]) -> Any:
    """Looks for the mark of synthetic origin in every image of an export; see runs.marks.MarksFound."""
    from rayexpand.runs.marks import check_marks

    return check_marks(os.fspath(folder))


def demo(out: str = "", method: str = "img2img", *, on: Callable[[Event], None] | None = None) -> dict[str, Any]:
    """Expands real digits, trains with and without them, and says what the gain means: numbers, and the two pages."""
    from rayexpand.reports.guided import look
    from rayexpand.reports.run import write_report
    from rayexpand.reports.study import write_study_report
    from rayexpand.studies.demo import demo as run_demo

    found = run_demo(out or ("runs/demo" if method == "img2img" else f"runs/demo-{method}"), Relay(on), method)
    summary = found.summary()
    sheet = write_report(found.runs[0], demo=summary, look=look(found.runs[0], 10) if found.guided else None)
    for run in found.runs[1:]:
        write_report(run)
    fitted = {f"CPU seconds of fitting {kind}": seconds for kind, seconds in found.fitted.items()}
    page = write_study_report(found.folder, demo={**summary, **fitted})
    return {**summary, "report": str(page), "samples": str(sheet)}
