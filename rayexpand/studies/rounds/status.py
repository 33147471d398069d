"""What the folder of a loop says of it, read without a driver: rounds, the stage it is at, what is spent."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rayexpand.contract.errors import RayexpandError
from rayexpand.runs.allocation import dealt_words
from rayexpand.runs.joined import read_loop_facts, round_folder
from rayexpand.runs.status import FolderStatus, driver_lines, duration
from rayexpand.storage.files import Files
from rayexpand.storage.heartbeats import DriverSeen, drivers_in
from rayexpand.storage.places import open_files
from rayexpand.studies.rounds.decisions import RoundDecision, read_chain, round_problem
from rayexpand.studies.run_stage import RunStage, stage_in


@dataclass(frozen=True, slots=True)
class RoundStatus:
    """A round that is decided; `run` is how far its run is."""

    decision: RoundDecision
    run: RunStage

    @property
    def words(self) -> str:
        guided = ", guided" if self.decision.guide else ""
        return f"{self.run.words}; dealt {dealt_words(self.decision.dealt)}{guided}"


@dataclass(frozen=True, slots=True)
class LoopStatus(FolderStatus):
    """One look at a loop; planned = kept + rejected + failed + pending of the rounds that are decided, and `left` of
    the budget is not dealt yet, or never will be where it has ended."""

    kind: ClassVar[str] = "loop"
    name: str
    folder: str
    rounds: tuple[RoundStatus, ...]
    count: int  # rounds at most
    stage: str  # what it is at now, in words
    ended: str  # why it has ended, "" where it has not
    planned: int
    kept: int
    rejected: int
    failed: int
    pending: int
    left: int
    eta_seconds: float | None  # None where a training or another round is still to come
    drivers: tuple[DriverSeen, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return bool(self.ended) and not self.pending

    def to_json(self) -> dict[str, Any]:
        return {**FolderStatus.to_json(self), "rounds": [
            {"round": one.decision.round, "state": one.decision.state, "decision": one.decision.sha256,
             "planned": one.decision.planned, "guided": bool(one.decision.guide), "gain": one.decision.gain,
             "problem": one.run.problem, "complete": one.run.complete,
             "status": None if one.run.status is None else one.run.status.to_json()} for one in self.rounds]}

    def table(self) -> list[tuple[str, str]]:
        return [*((f"round {one.decision.round} of {self.count}", one.words) for one in self.rounds),
                ("now", self.stage),
                ("samples", f"{self.planned:,} dealt ({self.kept:,} kept, {self.rejected:,} rejected, {self.failed:,} "
                 f"failed, {self.pending:,} pending), {self.left:,} left"),
                ("time left", "none" if self.complete else duration(self.eta_seconds)),
                *driver_lines(self.drivers, self.problems)]


def read_loop_status(folder: str | Path, clock: Callable[[], float] = time.time) -> LoopStatus:
    """Raises UsageError where no loop is, DamagedFile where rounds.json does not hold what was written."""
    files, problems = open_files(folder), list[str]()
    facts, chain = read_loop_facts(files), list[RoundDecision]()
    try:
        chain = read_chain(files, facts)
    except RayexpandError as error:
        problems.append(str(error))
    rounds = tuple(RoundStatus(one, _stage_of(files, one.round, clock))
                   for one in chain if one.state == "run")
    known = [one.run.status for one in rounds if one.run.status is not None]
    problems += [one.run.problem for one in rounds if one.run.problem]
    problems += [line for one in known for line in one.problems]
    counts = {name: sum(getattr(one, name) for one in known) for name in ("kept", "rejected", "failed")}
    planned, count = sum(one.decision.planned for one in rounds), int(facts["config"]["rounds"]["count"])
    ended = chain[-1].reason if chain and chain[-1].state == "stop" else ""
    pending = planned - sum(counts.values())
    last = rounds[-1].run.status if len(rounds) == count else None  # before it nothing tells how long trainings take
    eta = None if last is None else last.eta_seconds
    return LoopStatus(
        str(facts["name"]), str(folder), rounds, count, _stage(files, rounds, count, ended), ended, planned, **counts,
        pending=pending, left=int(facts["planned"]) - planned, eta_seconds=0.0 if ended and not pending else eta,
        drivers=tuple(drivers_in(files, problems, clock())), problems=tuple(problems))


def _stage_of(files: Files, number: int, clock: Callable[[], float]) -> RunStage:
    stage = stage_in(round_folder(files, number), f"{number:04d}", clock)
    with contextlib.suppress(RayexpandError):  # which the stage says
        if problem := round_problem(files, number):
            return RunStage(stage.name, problem=problem)
    return stage


def _stage(files: Files, rounds: tuple[RoundStatus, ...], count: int, ended: str) -> str:
    """What is done now, or by the next start of the same command."""
    unfinished = next((one.decision.round for one in rounds if not one.run.complete), None)
    if unfinished is not None:
        return f"expanding round {unfinished}"
    if ended:
        return f"ended, {ended}"
    number = len(rounds) + 1
    if number > count:
        return "all rounds are made"
    prefix = f"r{number:04d}-"
    wanted = {name for name in files.list("trials", prefix) if name.endswith(".json")}
    done = wanted & {*files.list("results", prefix)}
    trainings = f": {len(done)} of {len(wanted)} trainings done" if wanted else ""
    return f"deciding round {number}{trainings}"
