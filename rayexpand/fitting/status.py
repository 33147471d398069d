"""What a folder of artifacts says of the fits that make them: finished parts, and how far unfinished ones are."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rayexpand.artifacts.store import read_facts
from rayexpand.contract.errors import StorageError, UsageError, looked_at, three_digits
from rayexpand.runs.status import FolderStatus, driver_lines, duration
from rayexpand.storage.heartbeats import DriverSeen, drivers_in
from rayexpand.storage.places import is_url, open_files
from rayexpand.storage.position import read_position

_UNFINISHED = re.compile(r"^\.(.+-[0-9a-f]{8})\.(work|steps|partial-[0-9a-f]+)$")


@dataclass(frozen=True, slots=True)
class FitPart:
    """One artifact. `step` of `total` and `numbers` (the loss) are of a training."""

    folder: str
    done: bool
    seconds: float | None = None  # that it took
    task: str = ""
    step: int = 0
    total: int = 0
    numbers: dict[str, float] = field(default_factory=dict)
    eta_seconds: float | None = None
    age_seconds: float | None = None  # of the last word of it

    @property
    def words(self) -> str:
        if self.done:
            return f"done in {duration(self.seconds)}"
        if not self.total:
            return "begun"
        numbers = "".join(f", {name} {three_digits(value)}" for name, value in self.numbers.items())
        return (f"{self.task}: step {self.step:,} of {self.total:,}{numbers}, {duration(self.eta_seconds)} left, "
                f"{duration(self.age_seconds)} ago")


@dataclass(frozen=True, slots=True)
class FitStatus(FolderStatus):
    """One look at the artifacts of a folder; all fits that make artifacts there share it."""

    kind: ClassVar[str] = "fit"
    name: str
    folder: str
    parts: tuple[FitPart, ...]
    drivers: tuple[DriverSeen, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether nothing is unfinished and nobody works."""
        return all(one.done for one in self.parts) and all(one.state == "ended" for one in self.drivers)

    @property
    def eta_seconds(self) -> float | None:
        """Of the part that is trained now."""
        return next((one.eta_seconds for one in self.parts if one.eta_seconds is not None), None)

    def to_json(self) -> dict[str, Any]:
        return {**FolderStatus.to_json(self), "eta_seconds": self.eta_seconds}

    def table(self) -> list[tuple[str, str]]:
        return [*((one.folder, one.words) for one in self.parts), *driver_lines(self.drivers, self.problems)]


def read_fits(folder: str | Path, clock: Callable[[], float] = time.time) -> FitStatus:
    """The artifacts in a folder and the fits that work there. Raises UsageError where it holds neither."""
    now, problems, parts = clock(), list[str](), dict[str, FitPart]()
    files = open_files(folder)
    root = Path(folder)
    drivers = tuple(one for one in drivers_in(files, problems, now) if one.beat.verb == "fit")
    for one in sorted(root.iterdir()) if not is_url(str(folder)) and root.is_dir() else ():
        if match := _UNFINISHED.match(one.name):
            parts[match[1]] = _further(parts.get(match[1]), _unfinished(match[1], one, now))
        elif one.is_dir() and not one.is_symlink() and not one.name.startswith("."):
            try:
                facts = read_facts(one)
            except StorageError as error:
                problems.append(str(error))
                continue
            if facts:
                parts[one.name] = FitPart(one.name, True, facts.get("seconds"))
    if not parts and not drivers and not problems:
        raise UsageError(f"{folder}: no run, study, sweep, audit or artifact is here{looked_at(folder)}. Give "
                         "<out>/<name> of one, or the folder that holds artifacts")
    found = sorted(parts.values(), key=lambda one: (not one.done, one.folder))
    return FitStatus(root.name or str(folder), str(folder), tuple(found), drivers, tuple(problems))


def _unfinished(name: str, folder: Path, now: float) -> FitPart:
    said = read_position(folder)
    if said is None:
        return FitPart(name, False)
    made, spent = said["step"] - said["first"], said["time"] - said["begun"]
    return FitPart(name, False, None, said["task"], said["step"], said["total"], said["numbers"],
                   (said["total"] - said["step"]) * spent / made if made > 0 else None, max(0.0, now - said["time"]))


def _further(one: FitPart | None, other: FitPart) -> FitPart:
    """Of two folders of one artifact, what the one says that knows more."""
    return other if one is None or not (one.total or one.done) else one
