"""The files of a study as they are now: results grouped by arm, predictions, and what is missing or does not belong.

Nothing is left out in silence: a trial that is expected and not there, a file that cannot be read and a result that is
not of this study each leave a line.

    trial       one training: an arm with one seed; results/<trial>.json and predictions/<trial>.parquet
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rayexpand.contract.errors import DamagedFile, UsageError, looked_at
from rayexpand.runs.joined import is_loop
from rayexpand.storage.files import Files, each
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import read_table, unsealed
from rayexpand.studies.robustness_table import read_corrupted
from rayexpand.studies.score_table import read_scores

log = logging.getLogger(__name__)

Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Predicted:
    """Predictions of one trial, sorted by test item."""

    items: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        return self.labels == self.predicted


def runs_of(result: Result) -> list[str]:
    """Folders of the expansions that a trial took samples of."""
    return [str(one) for one in result.get("runs") or filter(None, [result.get("run")])]


def run_name(run: str) -> str:
    """Where a run is below the folder that has it: its name, or <loop>/rounds/<number> of a round."""
    parts = run.rstrip("/").split("/")
    return "/".join(parts[-3:] if parts[-2:-1] == ["rounds"] else parts[-1:])


@dataclass
class StudyView:
    """A study folder as it is now. `arms` holds the finished trials of each arm by rising seed: the baseline first,
    then in the order of the configuration, each control after the arm it was made for."""

    files: Files
    config: Mapping[str, Any]
    arms: dict[str, list[Result]]
    planned: dict[str, Result]  # trial -> trials/<trial>.json, or {} where that is not there
    missing: list[str]
    failed: dict[str, str]  # trial or file -> why
    problems: list[str]
    scores: Mapping[str, Result] = field(default_factory=dict)  # of the samples, by trial (score_table.py)
    corrupted: Mapping[str, Mapping[str, Result]] = field(default_factory=dict)  # by test, trial (robustness_table.py)
    _predicted: dict[str, Predicted | str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.config.get("name") or Path(str(self.files.root)).name)

    @property
    def results(self) -> list[Result]:
        return [result for trials in self.arms.values() for result in trials]

    @cached_property
    def baseline(self) -> str | None:
        return _baseline(self.config, self.arms)

    @cached_property
    def controls(self) -> dict[str, str]:
        """Arm -> its control, where there is one with results."""
        return {arm: control for arm in self.arms if (control := _control(self, arm))}

    def rounds_of(self, result: Result) -> Mapping[str, Any]:
        """What a trial says of its loops and their controls, as the study was last started; {} for others."""
        return self.planned.get(result["trial"], {}).get("rounds") or result.get("rounds") or {}

    def predicted(self, trial: str) -> Predicted | str:
        """Predictions of a trial, or why there are none."""
        if trial not in self._predicted:
            self._predicted[trial] = _read_predicted(self.files, trial)
        return self._predicted[trial]


def run_folder(study: StudyView, run: str) -> str:
    """The folder of a run as its results name it, or below the study where that was moved."""
    here = f"{study.files.root}/runs/{run_name(run)}"
    return run if is_loop(run) or open_files(run).read("run.json") is not None else here


# Reading -------------------------------------------------------------------------------------------------------------


def read_study(folder: str | Path) -> StudyView:
    """Reads study.json, trials/ and results/. Raises UsageError if there is no study, or study.json is broken."""
    files = open_files(folder)
    content = files.read("study.json")
    names = sorted(name.removesuffix(".json") for name in files.list("results") if name.endswith(".json"))
    if content is None and not names:
        raise UsageError(f"{folder}: no study is here (neither study.json nor results/*.json)"
                         f"{looked_at(folder)}. Give the folder that `rayexpand train` wrote, <out>/<name>.")
    facts = {} if content is None else _json(files, "study.json", content)
    if isinstance(facts, str):
        raise UsageError(f"{folder}/study.json: {facts}. Start the study again; finished trials are kept.")
    expected = [str(trial) for trial in facts.get("trials") or ()]
    problems = [] if content is not None else ["study.json is missing, so trials that were not run cannot be named."]
    planned = dict(zip(expected, each(files, lambda trial: _planned(files, trial, problems), expected), strict=True))
    results, failed = _read_results(files, names, planned, problems)
    done = {*failed, *(result["trial"] for result in results)}
    config = facts.get("config") if isinstance(facts.get("config"), dict) else facts
    study = StudyView(files, config or {}, _by_arm(config or {}, results), planned,
                      [trial for trial in expected if trial not in done], failed, problems,
                      read_scores(files, config or {}, results, problems),
                      read_corrupted(files, config or {}, results, problems))
    study.problems += _subset_problems(study)
    return study


def _json(files: Files, name: str, content: bytes | None) -> dict[str, Any] | str:
    """The object of a JSON file, or what is wrong with it."""
    try:
        return unsealed(name, content or b"", "")
    except DamagedFile as error:
        return str(error).removeprefix(": ")


def _planned(files: Files, trial: str, problems: list[str]) -> Result:
    name = f"trials/{trial}.json"
    content = files.read(name)
    found = {} if content is None else _json(files, name, content)
    if isinstance(found, str):
        problems.append(f"{name} {found}, so its result cannot be compared with it; `rayexpand train` writes it anew.")
        return {}
    return found


def _read_results(files: Files, names: Sequence[str], planned: Mapping[str, Result],
                  problems: list[str]) -> tuple[list[Result], dict[str, str]]:
    """Usable results, and why the others are not; results that do not belong to the study go to `problems`."""
    results: dict[tuple[str, int], Result] = {}
    failed: dict[str, str] = {}
    contents = each(files, lambda name: _json(files, f"results/{name}.json", files.read(f"results/{name}.json")), names)
    for trial, found in zip(names, contents, strict=True):
        wrong = found if isinstance(found, str) else _wrong(found)
        if planned and trial not in planned:
            problems.append(f"results/{trial}.json is not a trial of this study (its configuration has changed since, "
                            "or the file was copied here); it is left out.")
        elif isinstance(found, str) or wrong:
            failed[trial] = f"results/{trial}.json: {wrong}"
            log.warning("%s. It is left out; `rayexpand train` trains this trial again", failed[trial])
        elif other := _stale(found, planned.get(trial, {})):
            problems.append(f"results/{trial}.json was made with another {other} than the study has now; it is left "
                            "out until `rayexpand train` makes it again.")
        elif (place := (found["arm"], found["seed"])) in results:
            problems.append(f"results/{trial}.json is a second result of arm {place[0]}, seed {place[1]}; only "
                            f"{results[place]['trial']} is used.")
        else:
            results[place] = {**found, "trial": trial}
    return list(results.values()), failed


def _stale(result: Result, planned: Result) -> str | None:
    """What a result was made with that its trial no longer has."""
    for name, words in (("list_sha256", "training set"), ("recipe", "recipe"), ("ids_sha256", "subset"),
                        ("seed", "seed"), ("digest", "dataset, test set, further test set, pair of frequency limits, "
                                           "starting weights, order or number of workers")):
        if name in planned and name in result and planned[name] != result[name]:
            return words
    return None


def _wrong(result: Any) -> str | None:
    """What keeps a result from being used, None if nothing does."""
    if not isinstance(result, dict):
        return "expected an object"
    if result.get("error"):
        return f"the trial failed: {result['error']}"
    if not isinstance(result.get("arm"), str) or not isinstance(result.get("seed"), int):
        return "has no arm (text) and seed (whole number)"
    top1 = number(result, "last.top1")
    return None if top1 is not None and 0 <= top1 <= 1 else "last.top1 is not a share in [0, 1]"


def number(result: Result, place: str) -> float | None:
    """The finite number at a dotted place of a result, else None."""
    value: Any = result
    for name in place.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if fine else None


def _read_predicted(files: Files, trial: str) -> Predicted | str:
    name = f"predictions/{trial}.parquet"
    try:
        table = read_table(files, name).select(["item", "label", "predicted"]).sort_by("item")
    except FileNotFoundError:
        return f"{name} is missing; `rayexpand train` trains this trial again"
    except (DamagedFile, OSError, KeyError) as error:
        log.warning("%s. `rayexpand train` trains this trial again", error)
        return f"{name} cannot be read ({error}); `rayexpand train` trains this trial again"
    if not table.num_rows:
        return f"{name} is empty"
    return Predicted(*(table[column].to_numpy() for column in ("item", "label", "predicted")))


# Arms ----------------------------------------------------------------------------------------------------------------


def _by_arm(config: Mapping[str, Any], results: Iterable[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda r: (str(r.get("group") or ""), number(r, "ratio") or 0, r["arm"],
                                                  r["seed"])):
        found.setdefault(result["arm"], []).append(result)
    base = _baseline(config, found)
    named = [arm for arm in (*((base,) if base else ()), *_arm_names(config), *found) if arm in found]
    ordered: list[str] = []
    for arm in named:
        if not controlled(found[arm][0]):
            ordered += [arm, *(other for other in named if controlled(found[other][0]) == arm)]
    return {arm: found[arm] for arm in dict.fromkeys((*ordered, *named))}


def _arm_names(config: Mapping[str, Any]) -> list[str]:
    names = []
    for arm in _arm_configs(config):
        ratio, rounds, name = arm.get("ratio"), arm.get("rounds"), str(arm.get("name", ""))
        names += [f"{name} {one}x" for one in ratio] if isinstance(ratio, list) else [
            f"{name} round {one}" for one in rounds] if isinstance(rounds, list) else [name]
    return names


def _arm_configs(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    arms = config.get("arms") or ()
    return [arm for arm in arms if isinstance(arm, Mapping)] if isinstance(arms, list) else []


def arm_config(config: Mapping[str, Any], arm: str) -> Mapping[str, Any]:
    """The configuration of an arm by its name, or by its name before ratio or round; empty if there is none."""
    for one in _arm_configs(config):
        stem = arm.rpartition(" ")[0] if isinstance(one.get("ratio"), list) else arm
        stem = arm.rpartition(" round ")[0] if isinstance(one.get("rounds"), list) else stem
        if one.get("name") == stem:
            return one
    return {}


def controlled(result: Result) -> str:
    """The arm a trial's arm was made the control of; empty for an arm in its own right."""
    return str(result.get("control_of") or "")


def is_valued(result: Result) -> bool:
    """Whether a trial is of an arm of the section value, which is judged there and nowhere else."""
    return bool(result.get("value"))


def note_of(result: Result) -> str:
    """What must be said wherever a row is shown: that it knows other images; empty for an arm."""
    return str((result.get("baseline") or {}).get("note", ""))


def _baseline(config: Mapping[str, Any], arms: Mapping[str, Sequence[Result]]) -> str | None:
    """The arm named by `baseline`, else the first of the configuration, else the first that has real images only."""
    named = config.get("baseline") or next(iter(_arm_names(config)), None)
    if named is not None:
        return str(named) if named in arms else None
    plain = [arm for arm, (first, *_) in arms.items() if not controlled(first) and not first.get("synthetic_rows")]
    plain.sort(key=lambda arm: (arm != "original", arms[arm][0].get("augment") not in (None, "", "none")))
    return plain[0] if plain else None


def _control(study: StudyView, arm: str) -> str | None:
    """The control of an arm with synthetic rows: real rows alone with the same recipe, repeated to as many rows. One
    control serves every arm it fits, though it names only the arm it was made for. Arms that replace real rows keep
    their number and need none."""
    first = study.arms[arm][0]
    if controlled(first) or not first.get("synthetic_rows") or replaces(study, arm) or is_valued(first):
        return None
    alone = [name for name, (one, *_) in study.arms.items()
             if not one.get("synthetic_rows") and not note_of(one) and not is_valued(one)]
    named = [name for name in alone if controlled(study.arms[name][0]) == arm]
    rows = _rows_per_real(study, arm)
    same = [name for name in alone if rows is not None and _rows_per_real(study, name) == rows
            and study.arms[name][0].get("recipe") == first.get("recipe")]
    return next(iter(named + same), None)


def replaces(study: StudyView, arm: str) -> bool:
    """Whether an arm replaces real rows by synthetic ones instead of adding them."""
    return arm_config(study.config, arm).get("replace") is not None


def _rows_per_real(study: StudyView, arm: str) -> float | None:
    """Rows of an epoch over real rows: 1 + 5 for five samples beside each image; a control has those of its arm."""
    if arm in study.arms and (of := controlled(study.arms[arm][0])):
        return _rows_per_real(study, of)
    known = [*study.arms.get(arm, ()), *(one for one in study.planned.values() if one.get("arm") == arm)]
    ratio = next((value for one in known if (value := number(one, "ratio")) is not None), None)
    if not known or (ratio is None and known[0].get("synthetic_rows")):
        return None
    return round(float(arm_config(study.config, arm).get("real", 1.0)) + (ratio or 0.0), 6)


def _subset_problems(study: StudyView) -> list[str]:
    """Arms that were trained on other real images than the first arm with the same seed."""
    found = []
    for seed in sorted({r["seed"] for r in study.results}):
        hashes: dict[Any, list[str]] = {}
        for result in study.results:
            if result["seed"] == seed and result.get("ids_sha256") and not is_valued(result):
                hashes.setdefault(result["ids_sha256"], []).append(result["arm"])
        if len(hashes) > 1:
            sides = "; ".join(f"{ids[:12]}: {', '.join(arms)}" for ids, arms in hashes.items())
            found.append(f"Seed {seed}: arms were trained on different real images, so they are not paired ({sides}).")
    return found
