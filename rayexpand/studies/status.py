"""What the folder of a study says of its stages, read without a driver: fits, runs, trials."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from rayexpand.contract.errors import DamagedFile, RayexpandError, UsageError, looked_at
from rayexpand.fitting.maker import ARTIFACTS
from rayexpand.fitting.status import FitStatus, read_fits
from rayexpand.runs.joined import LOOP
from rayexpand.runs.status import FolderStatus, driver_lines, duration
from rayexpand.storage.files import Files, each
from rayexpand.storage.heartbeats import DriverSeen, drivers_in
from rayexpand.storage.places import is_url, open_files
from rayexpand.storage.tables import read_json
from rayexpand.studies.rounds.status import read_loop_status
from rayexpand.studies.run_stage import RunStage, stage_in

PACE_RESULTS = 20  # the time left follows from so many results at most


@dataclass(frozen=True, slots=True)
class StudyStatus(FolderStatus):
    """One look at a study; trials = done + running + failed + pending."""

    kind: ClassVar[str] = "study"
    name: str
    folder: str
    fits: FitStatus | None
    runs: tuple[RunStage, ...]
    trials: int  # known so far: controls are added once the samples are there
    trials_are_final: bool
    done: int
    running: int
    failed: int  # by what the last driver said
    last_result_age_seconds: float | None
    eta_seconds: float | None  # None where it is unknown, also of a stage that has not begun
    drivers: tuple[DriverSeen, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def pending(self) -> int:
        return self.trials - self.done - self.running - self.failed

    @property
    def complete(self) -> bool:
        return self.trials_are_final and self.done == self.trials and all(one.complete for one in self.runs)

    def to_json(self) -> dict[str, Any]:
        return {**FolderStatus.to_json(self), "pending": self.pending,
                "fits": None if self.fits is None else self.fits.to_json(),
                "runs": [{"name": one.name, "problem": one.problem, "complete": one.complete,
                          "status": None if one.status is None else one.status.to_json(),
                          **({"now": one.now} if one.now else {})} for one in self.runs]}

    def table(self) -> list[tuple[str, str]]:
        fits = () if self.fits is None else self.fits.parts
        trials = f"{self.trials:,}{'' if self.trials_are_final else ' and controls'}"
        return [*((f"fit {one.folder}", one.words) for one in fits),
                *((f"run {one.name}", one.words) for one in self.runs),
                ("trials", f"{trials}: {self.done:,} done, {self.running:,} running, {self.failed:,} failed, "
                 f"{self.pending:,} pending"),
                ("last result", "none yet" if self.last_result_age_seconds is None else
                 f"{duration(self.last_result_age_seconds)} ago"),
                ("time left", "none" if self.complete else duration(self.eta_seconds)),
                *driver_lines(self.drivers, self.problems)]


def read_study_status(folder: str | Path, clock: Callable[[], float] = time.time) -> StudyStatus:
    """Raises UsageError where no study is, DamagedFile where study.json does not hold what was written."""
    files, now, problems = open_files(folder), clock(), list[str]()
    facts = read_json(files, "study.json")
    if facts is None:
        raise UsageError(f"{folder}: no study is here (no study.json){looked_at(folder)}. Give the folder that "
                         "`rayexpand train` makes, <out>/<name>")
    drivers = tuple(drivers_in(files, problems, now))
    runs = tuple(stage for one in facts.get("runs") or () for stage in _stages(files, one, clock))
    trials = [str(one) for one in facts.get("trials") or ()]
    results = files.entries("results")
    done = sum(each(files, lambda trial: _is_done(files, trial, problems),
                    [trial for trial in trials if f"{trial}.json" in results]))
    said = next((one for one in drivers if one.beat.verb in ("train", "audit")), None)
    told = said.beat.facts if said is not None else {}
    left = max(len(trials), facts.get("trainings") or 0) - done
    failed = min(int(told.get("failed", 0)), left)
    running = min(int(told.get("running", 0)), left - failed) if said is not None and said.state == "running" else 0
    ends = sorted(entry.modified for name, entry in results.items() if name.endswith(".json"))
    return StudyStatus(
        str(facts.get("config", {}).get("name") or Path(str(files.root)).name), str(folder), _fits(folder, clock),
        runs, done + left, bool(trials), done, running, failed, max(0.0, now - ends[-1]) if ends else None,
        _eta(runs, pace(ends), left), drivers, tuple(problems))


def pace(ends: Sequence[float]) -> float | None:
    """Seconds from one result to the next, by the last of them; None of fewer than two."""
    last = ends[-PACE_RESULTS - 1:]
    return (last[-1] - last[0]) / (len(last) - 1) if len(last) > 1 else None


def _eta(runs: Sequence[RunStage], seconds: float | None, left: int) -> float | None:
    open_runs = [one.status.eta_seconds if one.status is not None else None for one in runs if not one.complete]
    parts = [*open_runs, *([seconds * left if seconds is not None else None] if left else [])]
    known = [one for one in parts if one is not None]
    return sum(known) if len(known) == len(parts) else None


def _is_done(files: Files, trial: str, problems: list[str]) -> bool:
    """Whether a trial has the result of what it would train now."""
    try:
        result, planned = read_json(files, f"results/{trial}.json"), read_json(files, f"trials/{trial}.json")
    except DamagedFile as error:
        problems.append(str(error))
        return False
    return result is not None and (planned is None or result.get("digest") == planned.get("digest"))


def _stages(files: Files, run: Mapping[str, Any], clock: Callable[[], float]) -> Sequence[RunStage]:
    """A run, or a loop with its rounds, where the study says it is, or below the study where that was moved."""
    folder, name = str(run["folder"]), str(run["name"])
    for place in (folder, f"{files.root}/runs/{folder.rstrip('/').rpartition('/')[2]}"):
        found = open_files(place)
        if found.read("run.json") is not None:
            return [stage_in(place, name, clock)]
        if found.read(LOOP) is not None:
            return _of_loop(place, name, clock)
    return [RunStage(name)]


def _of_loop(folder: str, name: str, clock: Callable[[], float]) -> list[RunStage]:
    try:
        loop = read_loop_status(folder, clock)
    except RayexpandError as error:
        return [RunStage(name, problem=str(error))]
    rounds = [replace(one.run, name=f"{name}, round {one.decision.round}") for one in loop.rounds]
    return [*rounds, RunStage(name, problem="; ".join(loop.problems), now=loop.stage, ended=loop.complete)]


def _fits(folder: str | Path, clock: Callable[[], float]) -> FitStatus | None:
    if is_url(folder):
        return None
    try:
        return read_fits(Path(folder) / ARTIFACTS, clock)
    except UsageError:
        return None
