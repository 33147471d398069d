"""A run: its folder, what it must agree with, and the loop that drives shards until none is pending.

The loop knows nothing of where shards run: `expand_wave` maps (shard, generation) jobs to receipts or faults, in this
process (`in_process`) or on a cluster.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rayexpand import __version__
from rayexpand.artifacts import KINDS
from rayexpand.contract import log_lines, metrics
from rayexpand.contract.errors import (
    ConfigError,
    DamagedFile,
    DigestMismatch,
    EnvironmentFault,
    ModelError,
    OverBudget,
    RayexpandError,
    SeedDataError,
    StorageError,
    UsageError,
)
from rayexpand.contract.protocols import Tools
from rayexpand.contract.schema import SEED_REASONS, Reason, Receipt, SeedIndex
from rayexpand.contract.secrets import secret_problems
from rayexpand.contract.settings import differences, digest, override
from rayexpand.data import seeds
from rayexpand.models.folders import DIGITS
from rayexpand.models.prior import check_size, has_more, inspect_prior, is_present, prior_hash, sources_of
from rayexpand.models.prior_files import PriorFacts
from rayexpand.models.prior_sampling import (
    has_no_grid,
    sampler_revision,
    sampling_notes,
    sampling_problems,
    starting_points,
)
from rayexpand.models.sources import source_notes
from rayexpand.runs.allocation import allocation_problems, dealt_facts, scores_sha256
from rayexpand.runs.amounts import Measured, measure
from rayexpand.runs.blame import Blame, forget_unexplained
from rayexpand.runs.config import MODELS, RunConfig, guide_of_loop, ids_sha256, parse, resolved, semantic, unnamed
from rayexpand.runs.cut_prompts import cut_prompts, words_of
from rayexpand.runs.expander import Expander
from rayexpand.runs.growth import GROWS, adds, grown_plan, growth_problems
from rayexpand.runs.inputs import (
    ConfiguredInputs,
    artifact_folder,
    artifact_hashes,
    captions_sha256,
    changed_seeds,
    check_artifacts,
    check_base,
    check_classes,
    check_judge,
    check_seeds,
    check_space,
    names_classes,
)
from rayexpand.runs.plan import Plan, make_plan, plan_digest, read_plan, write_plan
from rayexpand.runs.store import (
    Store,
    Tally,
    Totals,
    adopted_digests,
    facts_name,
    first_look,
    new_attempt,
    read_facts,
    run_title,
    step_name,
    totals,
)
from rayexpand.storage.files import FOLDERS, Files, process_token
from rayexpand.storage.places import is_url, open_files
from rayexpand.storage.tables import create_once, read_json, sealed

log = logging.getLogger(__name__)

WAVE = 20_000  # shards handed out before pending() is asked again
BARREN_WAVES = 3  # waves without a commit before the run gives up for now
ROLL_UP_EVERY = 500  # commits after which their receipts become one file
STARTS = "log_snr_at_start"  # in run.json: log(a / s) of the point that images are noised to, by strength
SAMPLER = "sampler_revision"  # in run.json: which solvers make the samples, where it is not the first ones
# What a run that has grown states of each smaller one, and how many digits of the content hash of a file it adopted.
STEP, SHORT = ("run_digest", "plan_digest", "plan", "planned", "shards", "seeds", "classes", "version", "created"), 16
FAULTS_IN_A_ROW = 3  # environment faults of one process before it stops taking shards

Job = tuple[int, int]  # shard id, generation
OnCommit = Callable[[Totals, Receipt], None]
ExpandWave = Callable[[Sequence[Job]], Iterator[Receipt | EnvironmentFault]]


@dataclass(frozen=True)
class RoundPart:
    """What a loop gives a run that is one of its rounds."""

    index: SeedIndex  # of the loop
    dataset: dict[str, Any]  # what listing it said
    copies: np.ndarray  # uint16[n]
    first: np.ndarray  # uint16[n]: number of the first of these copies
    follows: dict[str, Any]  # round, and sha256 of its decision


@dataclass(frozen=True)
class Run:
    config: RunConfig
    files: Files
    store: Store
    plan: Plan
    facts: dict[str, Any]  # run.json
    attempt: int = 0  # the start that this process has registered

    @property
    def folder(self) -> Path | str:
        """Where the run lies: a path, or the URL of an object store."""
        return self.files.root

    @property
    def sampling(self) -> RunConfig:
        """The configuration that samplers work by. What was begun before the decoder had a precision of its own goes on
        as it began, on a GPU too."""
        if "prior" not in self.facts["models"] or STARTS in self.facts:
            return self.config
        begun = self.facts["config"]["prior"]
        as_it_was = {"vae_dtype": "float32", **{name: begun[name] for name in ("channels_last", "compile")}}
        return self.config.model_copy(update={"prior": self.config.prior.model_copy(update=as_it_was)})

    @property
    def title(self) -> str:
        """What it is called where it is spoken of."""
        return run_title(self.facts, str(self.folder))

    def totals(self) -> Totals:
        return totals(int(self.facts["planned"]), self.store.receipts())


def preflight(config: RunConfig, *, device_here: bool = True, with_classes: bool = True,
              planned: bool = False, prior: PriorFacts | None = None) -> list[str]:
    """Everything wrong that can be known without loading a model, one line each.

    `device_here`: the sampler will run in this process, so its device must be here too. `with_classes`: list the
    dataset where guide or artifacts say for which classes they were made, and compare. `planned`: the run has started,
    so what its plan holds need not be there any more. `prior`: of a generator that is made before the run is.
    """
    problems = [] if planned else secret_problems(resolved(config))
    problems = problems or seeds.check(config.data)
    data_is_sound, needs, text_width = not problems, config.needs, None
    if not planned:
        problems += [problem for name in ("prior", "guide") if name in needs
                     for problem in unnamed(f"{name}.weights", getattr(config, name), config.data)]
        if config.accept is not None:
            problems += unnamed("accept.guide.weights", config.accept.guide, config.data)
    if "prior" in needs:
        try:
            facts = prior or inspect_prior(config.prior)
        except ModelError as error:
            problems.append(f"prior.weights: {error}")
        else:
            text_width = facts.text_width
            problems += _size_problems(facts, config)
            problems += [] if planned else sampling_problems(facts, config.method)  # a run that began goes on as it was
        if config.image.fit == "none":
            problems.append(f"image.fit: 'none' keeps each image's own size, but {config.method.name} samples squares; "
                            "use crop, center or squash")
    problems += check_artifacts(config, planned=planned, text_width=text_width)
    problems += [] if planned or config.allocate is None else allocation_problems(config.allocate, config.method)
    problems += check_space(config, present_only=True) if not problems and not planned else []
    if with_classes and data_is_sound and names_classes(config):
        problems += _class_problems(config)
    if device_here and config.prior.device.startswith("cuda") and needs & MODELS:
        from rayexpand.contract.device import absent_device

        problems += [f"prior.device: {one}" for one in absent_device(config.prior.device)]
    return problems + _out_problems(config)


def sampling_of(config: RunConfig) -> list[str]:
    """How the generator will be sampled, one line each; it imports diffusers where there is one."""
    if "prior" not in config.needs:
        return []
    prior, notes = config.prior, list[str]()
    if not is_present(prior) and prior.weights != DIGITS:
        notes = [f"prior.weights: {prior.weights} is not on this machine yet; its tensors are checked by the run that "
                 "gets it, before anything is sampled"]
    elif has_more(prior):
        notes = source_notes(sources_of(prior), prior.process.model_dump())
    return [*notes, *sampling_notes(inspect_prior(config.prior), config.method)]


def weight_problems_of(config: RunConfig, *, present_only: bool = False) -> list[str]:
    """Tensors that the files of the generator lack, or have in another shape, additions that do not fit, steps that its
    grid has not; it imports torch and diffusers. `present_only`: nothing is trained or downloaded for the answer."""
    if "prior" not in config.needs:
        return []
    problems = has_no_grid(inspect_prior(config.prior), config.method)
    if (config.prior.weights == DIGITS and not has_more(config.prior)) or (
            present_only and not is_present(config.prior)):
        return problems
    from rayexpand.models.added import added_problems
    from rayexpand.models.header_check import weight_problems

    sources = sources_of(config.prior)
    return [*(f"prior.weights: {line}" for line in weight_problems(sources)), *added_problems(sources, config.prior),
            *problems]


def _class_problems(config: RunConfig) -> list[str]:
    try:
        index = seeds.build_index(config.data)
    except SeedDataError as error:
        return [str(error)]
    return check_classes(config, index.classes.key)


def _out_problems(config: RunConfig) -> list[str]:
    if is_url(config.folder):
        try:
            open_files(config.folder)
        except StorageError as error:
            return [f"out: {error}"]
        return []
    out = Path(config.out)
    while not out.exists() and out != out.parent:
        out = out.parent
    if out.is_dir() and os.access(out, os.W_OK | os.X_OK):
        return []
    return [f"out: {config.folder} cannot be created, because {out} is not a folder this user may write to; choose "
            "another `out`"]


def bench_file(config: RunConfig) -> Path:
    """Where `bench` keeps its figures: beside the run folder, or here where that is in an object store."""
    return Path(f"{config.name}.bench.json" if is_url(config.out) else f"{config.folder}.bench.json")


def measured(config: RunConfig) -> Measured | None:
    """Throughput and size of what this run has committed so far; before its first start, what `bench` measured."""
    if first_look(open_files(config.folder)) is None:
        try:
            found = json.loads(bench_file(config).read_text())
        except FileNotFoundError:
            return None
        return Measured(found["images_per_second"], found["bytes_per_image"],
                        f"`rayexpand bench` ({bench_file(config)})")
    run = open_run(config.folder)
    data = run.files.entries("data")
    return replace(measure(list(run.store.receipts(data)), sum(entry.size for entry in data.values())),
                   source=f"what {config.folder} has made so far")


def changed_since_planned(config: RunConfig) -> str:
    """See `changed_seeds`; "" for a run that has not started, or cannot be opened, which others say."""
    with contextlib.suppress(RayexpandError):
        files = open_files(config.folder)
        if first_look(files) is not None:
            return changed_seeds(config, _read_plan(config, files, read_facts(files)).index)
    return ""


def _size_problems(facts: PriorFacts, config: RunConfig) -> list[str]:
    try:
        check_size(facts, config.image.size or facts.image_size)
    except ModelError as error:
        return [f"image.size: {error}"]
    return []


def prepare(config: RunConfig, on_model: Callable[[str, int, int], None] | None = None, *,
            device_here: bool = True, where: str = "", part: RoundPart | None = None) -> Run:
    """Creates the run folder, or opens it if it is the same run. `where` names the configuration in errors; `part`: of
    a loop that the run is a round of.

    Raises ConfigError (all problems at once), SeedDataError, StorageError, or DigestMismatch with the fields that
    differ; nothing is created before the dataset is known to be sound.
    """
    if problems := preflight(config, device_here=device_here, with_classes=False,
                             planned=_has_started(config) and not config.grow):
        raise ConfigError(where or config.name, problems)
    files = open_files(config.folder, single_writer=config.store.single_writer)
    if first_look(files, "rounds.json") is not None:
        raise UsageError(f"{config.folder} holds a loop, whose rounds are runs below it; give this run another `name`")
    plan, dataset, begun = None, dict[str, Any](), first_look(files) is not None
    if not begun or config.grow:
        index, dataset = seeds.surveyed(config.data) if part is None else (part.index, part.dataset)
        plan = _planned(index, config, part)
    if plan is not None and (problems := [*check_classes(config, plan.index.classes.key),
                                          *check_seeds(config, plan.index), *_caption_problems(plan, config),
                                          *weight_problems_of(config, present_only=True)]):
        raise ConfigError(where or config.name, problems)
    files.probe()
    files.sweep()
    to_come = "prior" in config.needs and not is_present(config.prior)
    models = model_hashes(config, on_model)
    if plan is not None:
        if problems := [*check_space(config), *(weight_problems_of(config) if to_come else ())]:
            raise ConfigError(where or config.name, problems)
        if "prototypes" in models:
            KINDS["prototypes"].load(artifact_folder(config, "prototypes"), ConfiguredInputs(config, models["guide"]),
                                     plan.index.classes.key)  # refuses those of another guide
        if "adapter" in models:
            check_base(config, models["prior"])
        if "judge" in models:
            check_judge(config, models["judge"])
        if begun:
            plan = _grow(config, files, plan, models, dataset)
        else:
            facts = _all_facts(config, plan, models, dataset) | ({} if part is None else {"follows": part.follows})
            write_plan(plan, files, facts["plan"])
            create_once(files, "run.json", facts, "run")
    elif not seeds.check(config.data):
        plan = _healed_plan(config, files, part)
    run = _open(config, files, models, plan)
    if pending_jobs(run):
        _refuse_other_solvers(run)
    if found := run.facts.get("cut_prompts"):
        log.warning("%s", words_of(found))
    return run


def _planned(index: SeedIndex, config: RunConfig, part: RoundPart | None) -> Plan:
    return make_plan(index, config) if part is None else make_plan(index, config, part.first, part.copies)


def _all_facts(config: RunConfig, plan: Plan, models: dict[str, str], dataset: dict[str, Any]) -> dict[str, Any]:
    """run.json of a run that begins."""
    facts = {**_facts(config, plan, models), "dataset": dataset}
    if "prior" in models:
        facts[STARTS] = starting_points(inspect_prior(config.prior), config.method)
    if "prior" in models and (found := cut_prompts(plan, config, sources_of(config.prior).folder)) and found.cut:
        facts["cut_prompts"] = found.to_json()
    return facts


def _grow(config: RunConfig, files: Files, wanted: Plan, models: dict[str, str],
          dataset: dict[str, Any]) -> Plan | None:
    """Makes the run in a folder the one that `wanted` is the plan of. None where it is that already, or has more seeds
    than are there now. Raises DigestMismatch with why its samples are not all samples of that one."""
    facts = {"models": models, SAMPLER: _revision(config), STARTS: {}}
    while True:
        then = read_facts(files)
        created = parse(then["config"], "run.json")
        before = _healed_plan(created, files) or _read_plan(created, files, then)
        if semantic(created) == semantic(config) and not adds(before, wanted):
            return None
        if problems := growth_problems(before, wanted, _identity(created, then), _identity(config, facts),
                                       config.needs):
            raise DigestMismatch("\n  ".join([f"{files.root} holds a run that cannot grow to this one:", *problems,
                                              "Give this run another `name`, or set back what differs."]))
        plan = grown_plan(before, wanted, config.sampler.shard_images)
        try:
            committed = list(Store(files, then["run_digest"], adopted=adopted_digests(then)).receipts())
        except DigestMismatch:
            if read_facts(files)["run_digest"] != then["run_digest"]:  # another driver was faster
                continue
            raise
        grown = {**_all_facts(config, plan, models, dataset),
                 "grown": [*then.get("grown", []), {name: then[name] for name in STEP}],
                 "adopted": {one.data_file: one.content_sha256[:SHORT] for one in committed}}
        write_plan(plan, files, grown["plan"])
        files.make_folder("grown")
        if files.publish(name := step_name(len(grown["grown"])), sealed(name, grown), "grown"):
            return plan


def _identity(config: RunConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """What decides what samples are, besides the plan."""
    decoder = "prior" not in facts["models"] or STARTS in facts
    return {**semantic(config), "models": facts["models"], SAMPLER: facts.get(SAMPLER, 1),
            "decoder": "has a precision of its own" if decoder else "works as the denoiser does"}


def _revision(config: RunConfig) -> int:
    return sampler_revision(inspect_prior(config.prior), config.method) if "prior" in config.needs else 1


def _refuse_other_solvers(run: Run) -> None:
    """Raises DigestMismatch where new samples would differ in their last digits from those that are there."""
    if (before := run.facts.get(SAMPLER, 1)) != (now := _revision(run.config)):
        raise DigestMismatch(f"{run.folder} was begun with revision {before} of the solvers, and this version has "
                             f"{now}, whose samples differ in the last digits; continuing would mix two datasets. "
                             f"Finish it with rayexpand {run.facts['version']}, which began it, or give this run "
                             "another `name`. It can be read as before")


def _has_started(config: RunConfig) -> bool:
    with contextlib.suppress(StorageError):  # `preflight` says it
        return first_look(open_files(config.folder)) is not None
    return False


def _caption_problems(plan: Plan, config: RunConfig) -> list[str]:
    """Where so many rows ask for a caption that is empty that the run would fail more than its limit. Below that, they
    are refused one by one."""
    allowed = int(config.limits.max_failed * plan.planned)
    lacking = len(list(itertools.islice(plan.uncaptioned(), allowed + 1)))
    if lacking <= allowed:
        return []
    blank = plan.blank_seeds()
    return [f"artifacts.captions: {config.artifacts['captions']} has an empty caption of {len(blank):,} of "
            f"{len(plan.index):,} seeds ({', '.join(blank[:3])}{', ...' if len(blank) > 3 else ''}), so more than "
            f"limits.max_failed = {config.limits.max_failed:g} of the rows would fail; caption them, or leave these "
            "seeds out with data.ids"]


def open_run(folder: str, overrides: Sequence[str] = (), *, check_models: bool = False, kept: bool = True) -> Run:
    """The run in an existing folder, with the configuration it was created with and `a.b=value` overrides of
    operational fields. `check_models`: samples will be made, so its models must still be the ones it started with, and
    where the samples are `kept` or compared its solvers too. Raises UsageError, or DigestMismatch for an override of
    any other field, another model or other solvers.
    """
    facts = read_facts(open_files(folder))
    out, _, name = (folder if is_url(folder) else str(Path(folder).absolute())).rstrip("/").rpartition("/")
    raw = {**facts["config"], "out": out or "/", "name": name}
    guide = raw.get("guide", {})
    own = guide_of_loop(facts["config"].get("out", ""), guide.get("weights", ""))
    if own is not None and out.endswith("/rounds"):  # a loop may have moved, with its guides
        raw["guide"] = {**guide, "weights": f"{out.removesuffix('/rounds')}/{own}"}
    config = parse(override(raw, overrides), f"{folder}/run.json")
    run = _open(config, open_files(folder, single_writer=config.store.single_writer),
                model_hashes(config) if check_models else facts["models"])
    if check_models and kept:
        _refuse_other_solvers(run)
    return run


def reopen(config: RunConfig) -> Run:
    """A run that has begun, with its configuration as another process has it. Raises DigestMismatch for another run."""
    files = open_files(config.folder, single_writer=config.store.single_writer)
    return _open(config, files, read_facts(files)["models"])


def begin(run: Run) -> int:
    """Registers a start of the run and returns its number."""
    for folder in FOLDERS:  # a copy of a run may lack the empty ones
        run.files.make_folder(folder)
    return new_attempt(run.files, {"host": socket.gethostname(), "pid": os.getpid(), "token": process_token(),
                                   "version": __version__})


def begun(run: Run) -> Run:
    """The run with its start registered, if it is not yet."""
    return run if run.attempt else replace(run, attempt=begin(run))


def start(run: Run, load: Callable[[], Tools] | None = None,
          on_rows: Callable[[int], None] = lambda n: None) -> Expander:
    """Registers an attempt and returns the Expander that works for it in this process."""
    return expander_of(run, begun(run).attempt, load, on_rows)


def expander_of(run: Run, attempt: int, load: Callable[[], Tools] | None = None,
                on_rows: Callable[[int], None] = lambda n: None,
                lost: Callable[[set[str]], set[str]] = lambda tokens: set()) -> Expander:
    """An Expander of this process for an attempt that has begun. `lost`: see Blame."""
    blame = Blame(run.files, process_token(), attempt, lost)
    blame.sweep()
    return Expander(run.sampling, run.plan, run.store, blame, load=load, on_rows=on_rows)


def in_process(expander: Expander) -> ExpandWave:
    """Expands jobs one after the other in this process; three environment faults in a row end the wave."""

    def wave(jobs: Sequence[Job]) -> Iterator[Receipt | EnvironmentFault]:
        faults = 0
        for shard_id, generation in jobs:
            try:
                receipt = expander(shard_id, generation)
            except EnvironmentFault as fault:
                faults += 1
                log_lines.say("fault", shard=shard_id, message=str(fault))
                yield fault
                if faults == FAULTS_IN_A_ROW:
                    return
            else:
                faults = 0
                yield receipt

    return wave


def drive(run: Run, expand_wave: ExpandWave, jobs: Callable[[], list[Job]], *, to_the_end: bool = False,
          on_commit: OnCommit = lambda counts, receipt: None) -> Totals:
    """Runs `jobs()` wave by wave until it is empty, and returns the totals of the run.

    `on_commit` is called after every commit, with the counts so far and the receipt. Raises OverBudget as soon as more
    rows failed than limits.max_failed allows (`to_the_end`: only when all jobs are done, for a retry starts over its
    budget), and EnvironmentFault after three waves without a commit.
    """
    run.store.forget_lost()
    tally = Tally(run.plan.planned, run.store.receipts())
    run.store.roll_up(ROLL_UP_EVERY)
    made = 0
    barren, cause = 0, EnvironmentFault("no shard could be started")
    while todo := jobs()[:WAVE]:
        if not to_the_end:
            check_budget(run, tally)
        committed = 0
        for outcome in expand_wave(todo):
            if isinstance(outcome, EnvironmentFault):
                cause = outcome
                metrics.record(metrics.RETRIES, cause="environment")
                continue
            committed += 1
            tally.add(outcome)
            on_commit(tally.totals, outcome)
            if (made := made + 1) % ROLL_UP_EVERY == 0:
                run.store.roll_up()
            if not to_the_end:
                check_budget(run, tally)
        barren = 0 if committed else barren + 1
        if barren == BARREN_WAVES:
            forget_unexplained(run.files)
            raise EnvironmentFault(f"no shard was committed in {BARREN_WAVES} rounds; last cause: {cause}") from cause
    run.store.roll_up()
    return check_budget(run, tally_of(run))  # with what other drivers made


def pending_jobs(run: Run) -> list[Job]:
    return [(shard_id, 0) for shard_id in run.store.pending(run.plan.n_shards)]


def retry_jobs(run: Run) -> Callable[[], list[Job]]:
    """Jobs that make once more what failed: one new generation for each shard whose last one has failed rows."""
    last = {receipt.shard_id: receipt for receipt in run.store.receipts()}
    wanted = [(r.shard_id, r.generation + 1) for r in last.values() if r.failed]

    def jobs() -> list[Job]:
        done = run.store.committed()
        return [(shard_id, generation) for shard_id, generation in wanted if done.get(shard_id, -1) < generation]

    return jobs


def committed_hash(run: Run, sample_id: str) -> str | None:
    """sample_sha256 of a committed sample, None where it was refused or is pending."""
    shard_id = run.plan.find(sample_id)
    for generation in range(run.store.committed().get(shard_id, -1) + 1):
        receipt = run.store.find(shard_id, generation)
        if receipt is not None:
            rows = run.store.data(receipt, ["sample_id", "sample_sha256"]).to_pylist()
            for row in rows:
                if row["sample_id"] == sample_id:
                    return row["sample_sha256"]
    return None


def tally_of(run: Run) -> Tally:
    """The counts of what is committed."""
    return Tally(run.plan.planned, run.store.receipts())


def check_budget(run: Run, tally: Tally) -> Totals:
    """The counts so far. Raises OverBudget when more rows failed than the budget allows."""
    counts = tally.totals
    allowed = run.config.limits.max_failed * run.plan.planned
    if counts.failed > allowed:
        is_round = "follows" in run.facts
        listed = ", ".join(f"{reason} {count}" for reason, count in tally.failures().most_common(5))
        raise OverBudget(
            f"{counts.failed} of {run.plan.planned} rows failed, more than limits.max_failed = "
            f"{run.config.limits.max_failed:g} allows ({listed}). Everything made so far is kept in {run.folder}, and "
            f"its report.html shows the refused rows. {_remedy(run, tally)}, or go on with "
            f"--set {'run.' if is_round else ''}limits.max_failed=<share>.")
    return counts


def _remedy(run: Run, tally: Tally) -> str:
    folder = str(run.folder).rpartition("/rounds/")[0] if "follows" in run.facts else run.folder
    retry = f"run `rayexpand retry {folder}`"
    if SEED_REASONS & tally.failures().keys():
        return f"Repair their seeds and {retry}"
    if Reason.CONSTANT_IMAGE in tally.failures():
        return ("Their seeds can be read, it is the samples that have one colour only, and a retry makes the same: "
                "leave out seeds of one colour, or change the settings of the method under another name")
    return f"Their seeds can be read, it is the sampling that failed: see the details, and {retry}"


def model_hashes(config: RunConfig, on_model: Callable[[str, int, int], None] | None = None, *,
                 fitted: bool = False) -> dict[str, str]:
    """Content hashes of the models and artifacts the method uses; trains the embedded default if it is asked for and
    not cached. `fitted`: guide and prototypes will be fitted first, so only the prior is there."""
    needs = config.needs
    hashes = {}
    if "prior" in needs:
        hashes["prior"] = prior_hash(config.prior, on_model)
    if fitted:
        return hashes
    for part, guide in (("guide", config.guide), ("judge", None if config.accept is None else config.accept.guide)):
        if part in needs and guide is not None:
            from rayexpand.models.guides import guide_hash

            hashes[part] = guide_hash(guide.weights, guide.checkpoint, on_model)
    return hashes | artifact_hashes(config)


def _facts(config: RunConfig, plan: Plan, models: dict[str, str]) -> dict[str, Any]:
    identity, revision = plan_digest(plan), _revision(config)
    revised = {SAMPLER: revision} if revision > 1 else {}
    return {"version": __version__, "created": time.time(), "name": config.name, "config": resolved(config),
            "run_digest": digest({"plan": identity, "config": semantic(config), "models": models, **revised}),
            "plan_digest": identity, "plan": f"plan/{identity[:8]}", "planned": plan.planned, "shards": plan.n_shards,
            "seeds": len(plan.index), "classes": len(plan.index.classes), "models": models, **revised,
            **({"ids_sha256": ids_sha256(config.data)} if config.data.ids else {}),
            **({"captions_sha256": captions_sha256(config)} if plan.captions is not None else {}),
            **({"dealt": dealt_facts(config.allocate, plan.index, plan.copies)} if config.allocate else {}),
            **({"scores_sha256": scores_sha256(config.allocate)} if config.allocate and config.allocate.scores else {})}


def _open(config: RunConfig, files: Files, models: dict[str, str], plan: Plan | None = None) -> Run:
    """`plan`: that of the run, where it has been read."""
    facts = read_facts(files)
    before, now, is_known = _comparable(config, files, facts)
    stated = {"plan": facts["plan_digest"], "config": before, "models": facts["models"],
              **({SAMPLER: facts[SAMPLER]} if SAMPLER in facts else {})}
    if is_known and digest(stated) != facts["run_digest"]:
        raise DamagedFile(f"{files.at(facts_name(files))}: is damaged, or was changed by hand: its configuration and "
                          "models do not give the run_digest that it states. Restore it from a copy; a run with other "
                          "settings needs another `name`")
    changed = differences({**before, "models": facts["models"]}, {**now, "models": models})
    if (said := facts.get("captions_sha256")) and (said_now := captions_sha256(config) or said) != said:
        changed.append(f"artifacts.captions: {said!r} -> {said_now!r}")
    if (said := facts.get("scores_sha256")) and (said_now := scores_sha256(config.allocate) or said) != said:
        changed.append(f"allocate.scores: {said!r} -> {said_now!r}")
    if changed:
        raise DigestMismatch("\n  ".join([f"{files.root} holds another run; continuing would mix two datasets. What "
                                          "differs (there -> here):", *changed,
                                          "Set it back, or give this run another `name`" + _may_grow(changed)]))
    return Run(config, files, Store(files, facts["run_digest"], adopted=adopted_digests(facts)),
               plan or _read_plan(config, files, facts), facts)


def _may_grow(changed: Sequence[str]) -> str:
    """What else can be done where a run would have other samples, but each be what it is."""
    if all(line.startswith(tuple(f"{name}{end}" for name in GROWS for end in (":", "."))) for line in changed):
        return "; or, where it is to have more samples, say grow: true."
    return "."


def _comparable(config: RunConfig, files: Files, facts: dict[str, Any]
                ) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """What decides the samples, as the run was created and as `config` says, and whether the first is known whole. A
    list of ids that is gone, has moved or says something else now counts as what it said then."""
    created = parse(facts["config"], "run.json")
    before, now = semantic(created), semantic(config)
    if created.data.ids is None:
        return before, now, True
    then = facts.get("ids_sha256")
    if then is None and created.data.per_class is None and before["data"]["ids"] == created.data.ids:
        plan = read_plan(config, files, facts["plan"], facts["plan_digest"])  # it holds just the seeds that were listed
        then = None if plan is None else digest(sorted(set(plan.index.seed_ids)))
    before["data"]["ids"] = then or before["data"]["ids"]
    if now["data"]["ids"] == created.data.ids:
        now["data"]["ids"] = before["data"]["ids"]
    return before, now, then is not None


def _read_plan(config: RunConfig, files: Files, facts: dict[str, Any]) -> Plan:
    remedy = (f"The same job file makes it again where its dataset is still as it was (`rayexpand expand`); else "
              f"restore {facts['plan']} of the run from a copy")
    try:
        plan = read_plan(config, files, facts["plan"], facts["plan_digest"])
    except DamagedFile as error:
        raise DamagedFile(f"{error}. {remedy}") from error
    if plan is None:
        raise DamagedFile(f"{files.root}/{facts['plan']} is missing or incomplete, so the run cannot go on. {remedy}")
    return plan


def plan_before(files: Files, facts: Mapping[str, Any], number: int) -> Plan:
    """The plan that a run had after it had grown so many times. `facts`: what it states now. Raises DamagedFile."""
    step, name = facts["grown"][number], step_name(number)
    then = read_json(files, name)
    if then is None or then.get("run_digest") != step["run_digest"]:
        raise DamagedFile(f"{name}: is not what the run has grown from")
    plan = read_plan(parse(then["config"], name), files, step["plan"], step["plan_digest"])
    if plan is None:
        raise DamagedFile(f"{step['plan']}: is gone, so that nothing says what the smaller run planned")
    return plan


def _healed_plan(config: RunConfig, files: Files, part: RoundPart | None = None) -> Plan | None:
    """The plan of a run, written anew where it is damaged and its dataset still gives the same one; None where that
    cannot be known."""
    facts = read_facts(files)
    with contextlib.suppress(DamagedFile):
        return _read_plan(config, files, facts)
    with contextlib.suppress(SeedDataError):
        plan = _planned(seeds.build_index(config.data), config, part)
        if "grown" in facts:
            plan = grown_plan(plan_before(files, facts, len(facts["grown"]) - 1), plan, config.sampler.shard_images)
        if plan_digest(plan) == facts["plan_digest"]:
            write_plan(plan, files, facts["plan"])
            log.warning("%s/%s was damaged and has been made again from the dataset", files.root, facts["plan"])
            return plan
        raise DamagedFile(f"{files.root}/{facts['plan']}: is damaged, and the dataset does not give the same plan any "
                          f"more (it has {len(plan.index):,} seeds, the plan was made of {facts['seeds']:,}). Put the "
                          "dataset back as it was, or restore that folder of the run from a copy")
    return None

