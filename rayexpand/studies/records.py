"""Finished trials of several studies and sweeps as one list, each with its settings and with what is stored of the
samples it trained on; the rows of every table and figure over several of them.

    record      one trial: an arm of a source with one seed; or one arm of a `bench`, with one batch size
    source      a study or sweep folder, or several, by the name that tables and figures call it
    field       what records are grouped by: source, arm, line (an arm without its ratio), seed, ratio (of a control,
                that of its arm), batch; or a dotted setting: recipe.lr, subset.n, fit.groups, method.strength,
                prior.weights, guide.weights, arm.use, arm.soft_label.gamma

Score files of `evaluate` belong to a trial where they have the run digest of the run it took its samples of.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from rayexpand.contract.errors import RayexpandError, UsageError
from rayexpand.contract.schema import Receipt, Status
from rayexpand.evaluation.features import with_current_names
from rayexpand.runs.joined import LOOP, view_samples
from rayexpand.runs.status import RunView
from rayexpand.runs.store import facts_name
from rayexpand.storage.files import Files
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import healthy_json
from rayexpand.studies.results import Result, StudyView, arm_config, number, read_study, run_folder, runs_of
from rayexpand.studies.sweep.sweep import read_results

log = logging.getLogger(__name__)

FILES_READ = 32  # data files opened for the draws behind the samples of a run, spread evenly over it
BUILT_IN = ("source", "arm", "line", "seed", "ratio", "batch", "classes")
SECTIONS = ("recipe", "subset", "data", "test", "arm", "fit", "method", "prior", "guide", "accept", "sampler", "image")


@dataclass(frozen=True)
class RunNumbers:
    """What is known of the samples of a run. `scores`: file without suffix -> score -> value."""

    folder: str
    config: Mapping[str, Any]
    digest: str
    classes: int
    scores: Mapping[str, Mapping[str, float]]

    @cached_property
    def discarded_share(self) -> float | None:
        """Of the images that were drawn: how many were not kept, redrawn attempts among them. None where the run cannot
        be read. Of a large run it is measured on FILES_READ of its files."""
        try:
            view = view_samples(self.folder)
            drawn = [_drawn(view, one) for one in _spread(list(view.receipts), FILES_READ)]
        except (RayexpandError, OSError, KeyError) as error:
            log.warning("what %s discarded is not known: %s", self.folder, error)
            return None
        made, kept = map(sum, zip(*drawn, strict=True)) if drawn else (0, 0)
        return 1 - kept / made if made else None


@dataclass(frozen=True)
class Record:
    """`settings`: sections by name, as SECTIONS has them; `result` as the study stores it, or of a bench its arm."""

    source: str
    arm: str
    seed: int
    result: Result
    settings: Mapping[str, Any] = field(default_factory=dict)
    samples: Mapping[str, Any] = field(default_factory=dict)  # scores that the study itself measured
    run: RunNumbers | None = None  # where the trial took samples of one run
    overhead: float | None = None  # of the training in percent, where a bench of the study has it
    prices: Mapping[str, float] = field(default_factory=dict)  # section price of its study, without what it leaves out
    arm_ratio: float | None = None  # of a control: the ratio of the arm that it is beside

    @property
    def line(self) -> str:
        return line_of(self.arm)

    def field(self, name: str) -> Any:
        """The value of a field, None where the record has none. Raises UsageError for a name that is no field."""
        if name in ("source", "arm", "line", "seed"):
            return getattr(self, name)
        if name == "ratio":
            return self.result.get("ratio") if self.arm_ratio is None else self.arm_ratio
        if name == "batch":
            found = self.result.get("batch")
            return self.field("recipe.batch") if found is None else found
        if name == "classes":
            return self.run.classes if self.run else None
        section, _, rest = name.partition(".")
        if section not in SECTIONS or not rest:
            raise UsageError(f"{name!r} is no field of a trial; fields are {', '.join(BUILT_IN)}, and settings as "
                             f"{'.x, '.join(SECTIONS)}.x")
        value: Any = self.settings.get(section)
        for part in rest.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value[0] if isinstance(value, list) and len(value) == 1 else value


def line_of(arm: str) -> str:
    """The name of an arm without its ratio or round."""
    return re.sub(r" ([\d.]+x|round \d+)$", "", arm)


@dataclass(frozen=True)
class Records:
    trials: tuple[Record, ...]
    bench: tuple[Record, ...]
    problems: tuple[str, ...]


def read_records(sources: Mapping[str, Sequence[str]], score_files: Sequence[str] = ()) -> Records:
    """All finished trials of these folders, in their order, and the lines of their benches.

    `score_files`: results of `evaluate` that are elsewhere, joined by run digest. Raises UsageError for a folder that
    holds neither a study nor a sweep, and for a score file that cannot be read.
    """
    given = [_score_file(name) for name in score_files]
    trials, bench, problems, runs = list[Record](), list[Record](), list[str](), dict[str, RunNumbers | None]()
    for source, folders in sources.items():
        for folder in folders:
            for study in _studies(folder):
                problems += [f"{source}: {line}" for line in (*study.problems, *study.failed.values())]
                if study.missing:
                    problems.append(f"{source}: {len(study.missing)} trials of {folder} are not finished: "
                                    f"{', '.join(study.missing[:8])}{' ...' * (len(study.missing) > 8)}")
                own = list(bench_records(source, study.files))
                bench += own
                trials += [_record(source, study, result, own, given, runs) for result in study.results]
    unused = {digest for digest, _, _ in given} - {run.digest for run in runs.values() if run}
    problems += [f"scores: {name} is of a run that no trial took its samples of (run digest {digest[:12]})"
                 for digest, name, _ in given if digest in unused]
    return Records(tuple(trials), tuple(bench), tuple(problems))


def _studies(folder: str) -> Iterator[StudyView]:
    """The study of a folder, or those of the finished trials of a sweep."""
    files = open_files(folder)
    if files.read("sweep.json") is None:
        yield read_study(folder)
        return
    for key, trial in read_results(files).items():
        if trial["state"] == "finished":
            yield read_study(f"{folder.rstrip('/')}/studies/{key}")


def _record(source: str, study: StudyView, result: Result, bench: Sequence[Record],
            given: Sequence[tuple[str, str, Mapping[str, float]]], runs: dict[str, RunNumbers | None]) -> Record:
    config = study.config
    named = runs_of(result)
    run = None
    if len(named) == 1:
        if named[0] not in runs:
            runs[named[0]] = _run(run_folder(study, named[0]), given)
        run = runs[named[0]]
    settings = {"recipe": result.get("recipe") or {}, "subset": config.get("subset") or {},
                "data": config.get("data") or {}, "test": config.get("test") or {},
                "arm": arm_config(config, str(result.get("control_of") or result["arm"]))}
    expansion = (config.get("expansions") or {}).get(str(result.get("group") or ""))
    if isinstance(expansion, Mapping):
        settings["fit"] = expansion.get("fit") or {}
    if run is not None:
        settings |= {name: run.config.get(name) or {} for name in SECTIONS if name not in settings}
    scores = study.scores.get(result["trial"], {"scores": {}})
    batch = settings["recipe"].get("batch")
    timed = [one for one in bench if one.arm == result["arm"] and one.result["batch"] == batch]
    prices = {name: price for name, price in (config.get("price") or {}).items() if price is not None}
    return Record(source, result["arm"], result["seed"], result, settings, _values(scores), run,
                  timed[0].result["overhead"] if timed else None, prices, _arm_ratio(study, result))


def _arm_ratio(study: StudyView, control: Result) -> float | None:
    """None of an arm that is no control, or whose own arm has no result of that seed."""
    return next((number(one, "ratio") for one in study.arms.get(str(control.get("control_of") or ""), ())
                 if one["seed"] == control["seed"]), None)


def _run(folder: str, given: Sequence[tuple[str, str, Mapping[str, float]]]) -> RunNumbers | None:
    """None where the folder is gone or damaged: settings and scores of its samples are then not known."""
    files = open_files(folder)
    facts = healthy_json(files, facts_name(files))
    if facts is None and (loop := healthy_json(files, LOOP)) is not None:
        facts = {"config": loop["config"]["run"], "run_digest": loop["digest"], "classes": loop["classes"]}
    if facts is None:
        return None
    scores: dict[str, Mapping[str, float]] = {}
    for name in sorted(one for one in files.list("scores") if one.endswith(".json")):
        found = healthy_json(files, f"scores/{name}")
        if found is not None and found.get("run_digest") == facts["run_digest"]:
            scores[name.removesuffix(".json")] = _values(found)
    scores |= {name: values for digest, name, values in given if digest == facts["run_digest"]}
    return RunNumbers(folder, facts["config"], facts["run_digest"], facts["classes"], scores)


def _score_file(place: str) -> tuple[str, str, Mapping[str, float]]:
    """(run digest, name, scores) of a result of `evaluate`. Raises UsageError."""
    folder, _, name = place.rpartition("/")
    found = healthy_json(open_files(folder or "."), name)
    if found is None or not {"run_digest", "scores"} <= found.keys():
        raise UsageError(f"scores: {place} is no result of `rayexpand evaluate`; give <run>/scores/<name>.json")
    return found["run_digest"], str(found.get("name") or name.removesuffix(".json")), _values(found)


def _values(result: Mapping[str, Any]) -> dict[str, float]:
    """Score -> number, of files that have {value, ...} and of those that have a number; <score>.reference and .floor
    are of real images."""
    scores = with_current_names({"scores": {}, **result})["scores"]
    plain = {name: one.get("value") if isinstance(one, Mapping) else one for name, one in scores.items()}
    plain |= {f"{name}.{other}": one.get(other) for name, one in scores.items() if isinstance(one, Mapping)
              for other in ("reference", "floor")}
    return {name: float(one) for name, one in plain.items()
            if isinstance(one, int | float) and not isinstance(one, bool)}


def bench_records(source: str, files: Files) -> Iterator[Record]:
    """Lines of the benches in the folder of a study."""
    for name in sorted(one for one in files.list("", "bench-") if re.fullmatch(r"bench-\d+\.json", one)):
        found = healthy_json(files, name) or {"arms": ()}
        for line in found["arms"]:
            batch = found.get("recipe_batch", line["batch"])
            yield Record(source, line["arm"], 0, {**line, "batch": batch}, overhead=line["overhead"])


def _drawn(view: RunView, receipt: Receipt) -> tuple[int, int]:
    """Images drawn for the rows of a file, and kept of them."""
    made = sum(1 + one for one in view.store.data(receipt, ["attempt"])["attempt"].to_pylist()) if receipt.kept else 0
    if receipt.side_file:
        refused = view.store.refused(receipt).select(["attempt", "status"]).to_pylist()
        made += sum(1 + row["attempt"] for row in refused if row["status"] == Status.REJECTED)
    return made, receipt.kept


def _spread(items: Sequence[Receipt], most: int) -> list[Receipt]:
    step = max(1, len(items) / most)
    return [items[int(i * step)] for i in range(min(most, len(items)))]
