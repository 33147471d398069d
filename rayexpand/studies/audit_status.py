"""What the folder of an audit says of it: what was found, and how far its shadow pipelines are."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from rayexpand.contract.errors import DamagedFile
from rayexpand.evaluation.audit_files import RESULT
from rayexpand.runs.status import FolderStatus, driver_lines
from rayexpand.storage.heartbeats import DriverSeen, drivers_in, moment
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import read_json
from rayexpand.studies.membership import STUDY
from rayexpand.studies.status import StudyStatus, read_study_status

DRIVER_LINES = ("driver", "works on", "worked on", "damaged")  # of the shadow study, whose driver is that of the audit


@dataclass(frozen=True, slots=True)
class AuditStatus(FolderStatus):
    """One look at an audit that has a folder of its own."""

    kind: ClassVar[str] = "audit"
    name: str
    folder: str
    sections: dict[str, float]  # what is found -> when, unix seconds
    study: StudyStatus | None  # of the shadow pipelines
    drivers: tuple[DriverSeen, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return bool(self.sections) and all(one.state == "ended" for one in self.drivers)

    @property
    def eta_seconds(self) -> float | None:
        return None if self.study is None else self.study.eta_seconds

    def to_json(self) -> dict[str, Any]:
        return {**FolderStatus.to_json(self), "eta_seconds": self.eta_seconds,
                "study": None if self.study is None else self.study.to_json()}

    def table(self) -> list[tuple[str, str]]:
        study = [] if self.study is None else [line for line in self.study.table() if line[0] not in DRIVER_LINES]
        return [*((f"audit {name}", f"found {moment(when)}") for name, when in self.sections.items()), *study,
                *driver_lines(self.drivers, self.problems)]


def read_audit_status(folder: str, clock: Callable[[], float] = time.time) -> AuditStatus:
    """What is found so far in a folder of an audit. Damaged files are named in `problems`."""
    files, problems, found = open_files(folder), list[str](), dict[str, Any]()
    try:
        found = read_json(files, RESULT) or {}
    except DamagedFile as error:
        problems.append(str(error))
    sections = {name: float(one["created"]) for name, one in found.items()
                if isinstance(one, dict) and "created" in one}
    place = f"{folder.rstrip('/')}/membership/{STUDY}"
    shadows = read_study_status(place, clock) if open_files(place).read("study.json") is not None else None
    name = folder.rstrip("/").rpartition("/")[2]
    return AuditStatus(name, folder, sections, shadows, tuple(drivers_in(files, problems, clock())), tuple(problems))
