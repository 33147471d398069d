"""What the folder of a sweep says of it, read without a driver: trials by state, the best so far, the time left."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rayexpand.contract.errors import DamagedFile
from rayexpand.runs.status import FolderStatus, driver_lines, duration
from rayexpand.storage.files import each
from rayexpand.storage.heartbeats import DriverSeen, drivers_in
from rayexpand.storage.tables import read_json
from rayexpand.studies.status import pace
from rayexpand.studies.sweep.search import describe
from rayexpand.studies.sweep.space import n_suggestions
from rayexpand.studies.sweep.sweep import best_of, read_test, scores_again, sweep_in


@dataclass(frozen=True, slots=True)
class SweepStatus(FolderStatus):
    """One look at a sweep; suggestions = decided + running + failed + pending. Suggestions that are equal are one
    trial, so there may be fewer trials than are decided."""

    kind: ClassVar[str] = "sweep"
    name: str
    folder: str
    suggestions: int
    trials: dict[str, int]  # finished, stopped, diverged
    running: int
    failed: int  # by what the last driver said
    pending: int
    best: dict[str, Any] | None  # number, values, score, epochs
    scored_again: bool | None  # whether the best was trained again for the test images; None: it is not asked for
    last_result_age_seconds: float | None
    eta_seconds: float | None  # without the training of the best for the test images
    drivers: tuple[DriverSeen, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return not (self.running or self.failed or self.pending) and self.scored_again is not False

    def table(self) -> list[tuple[str, str]]:
        states = "".join(f", {count:,} {state}" for state, count in self.trials.items())
        best = self.best
        again = () if self.scored_again is None else ((
            "best trained again", "done" if self.scored_again else "not yet"),)
        return [("suggestions", f"{self.suggestions:,}{states}, {self.running:,} running, {self.failed:,} failed, "
                 f"{self.pending:,} pending"),
                ("best so far", "none yet" if best is None else
                 f"{best['score']:.4f} with {describe(best['values'])}"),
                *again,
                ("last result", "none yet" if self.last_result_age_seconds is None else
                 f"{duration(self.last_result_age_seconds)} ago"),
                ("time left", "none" if self.complete else duration(self.eta_seconds)),
                *driver_lines(self.drivers, self.problems)]


def read_sweep_status(folder: str | Path, clock: Callable[[], float] = time.time) -> SweepStatus:
    """Raises UsageError where no sweep is, DamagedFile where sweep.json does not hold what was written."""
    sweep, now, problems = sweep_in(str(folder)), clock(), list[str]()
    files, config = sweep.files, sweep.config

    def read(name: str) -> dict[str, Any] | None:
        try:
            return read_json(files, name)
        except DamagedFile as error:
            problems.append(str(error))
            return None

    written = files.entries("trials")
    found = [one for one in each(files, read, [f"trials/{name}" for name in sorted(written) if name.endswith(".json")])
             if one is not None]
    results = {one["key"]: one for one in sorted(found, key=lambda one: one["number"])}
    names = sorted(name for name in files.list("suggestions") if name.endswith(".json"))
    suggested = [one for one in each(files, read, [f"suggestions/{name}" for name in names]) if one is not None]
    decided = sum(one["key"] in results for one in suggested)
    drivers = tuple(drivers_in(files, problems, now))
    said = next((one for one in drivers if one.beat.verb == "sweep"), None)
    total = n_suggestions(sweep.space, config.search, config.samples)
    failed = min(int(said.beat.facts.get("failed", 0)), total - decided) if said is not None else 0
    running = min(int(said.beat.facts.get("running", 0)), total - decided - failed) if (
        said is not None and said.state == "running") else 0
    best, ends = best_of(results), sorted(entry.modified for entry in written.values())
    step, left = pace(ends), total - decided - failed
    return SweepStatus(
        config.name, str(folder), total, dict(Counter(one["state"] for one in results.values()).most_common()), running,
        failed, left - running,
        None if best is None else {name: best[name] for name in ("number", "values", "score", "epochs")},
        read_test(sweep, best) is not None if scores_again(sweep) else None,
        max(0.0, now - ends[-1]) if ends else None, 0.0 if not left else None if step is None else step * left,
        drivers, tuple(problems))
