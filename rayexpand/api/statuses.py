"""How far something is: of a run, study, sweep, audit, or of the fits in a folder of artifacts; while it runs, and
after its driver died."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rayexpand.contract.errors import DamagedFile

if TYPE_CHECKING:
    from rayexpand.fitting.status import FitStatus
    from rayexpand.runs.status import RunStatus
    from rayexpand.storage.files import Files
    from rayexpand.storage.heartbeats import DriverSeen
    from rayexpand.studies.status import StudyStatus
    from rayexpand.studies.sweep.status import SweepStatus


@dataclass(frozen=True, slots=True)
class AuditStatus:
    """One look at an audit that has a folder of its own."""

    name: str
    folder: str
    sections: dict[str, float]  # what is found -> when, unix seconds
    study: StudyStatus | None  # of the shadow pipelines
    drivers: tuple[DriverSeen, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return "audit"

    @property
    def complete(self) -> bool:
        return bool(self.sections) and all(one.state == "ended" for one in self.drivers)

    @property
    def eta_seconds(self) -> float | None:
        return None if self.study is None else self.study.eta_seconds

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self), "complete": self.complete, "eta_seconds": self.eta_seconds,
                "study": None if self.study is None else self.study.to_json(),
                "drivers": [one.to_json() for one in self.drivers], "problems": list(self.problems)}

    def table(self) -> list[tuple[str, str]]:
        from rayexpand.runs.status import driver_lines
        from rayexpand.storage.heartbeats import moment

        study = [] if self.study is None else [line for line in self.study.table() if line[0] not in (
            "driver", "works on", "worked on", "damaged")]
        return [*((f"audit {name}", f"found {moment(when)}") for name, when in self.sections.items()), *study,
                *driver_lines(self.drivers, self.problems)]


def status(folder: str | os.PathLike[str], clock: Callable[[], float] = time.time,
           ) -> RunStatus | StudyStatus | SweepStatus | FitStatus | AuditStatus:
    """How far what a folder (a path or a URL) holds is. Each status has `kind`, `name`, `complete`, `eta_seconds`,
    `drivers`, `problems`, `to_json()` and `table()`.

    A damaged file is named in `problems`. Raises UsageError where nothing of this package is, DamagedFile where the one
    file that says what the folder is does not hold what was written.
    """
    from rayexpand.runs.status import read_status
    from rayexpand.runs.store import first_look
    from rayexpand.storage.places import open_files

    where = os.fspath(folder)
    files = open_files(where)
    if first_look(files) is not None:
        return read_status(where, clock)
    if first_look(files, "sweep.json") is not None:
        from rayexpand.studies.sweep.status import read_sweep_status

        return read_sweep_status(where, clock)
    if first_look(files, "result.json") is not None or _is_audited(files):
        return _audit(where, files, clock)
    if first_look(files, "study.json") is not None:
        from rayexpand.studies.status import read_study_status

        return read_study_status(where, clock)
    from rayexpand.fitting.status import read_fits

    return read_fits(where, clock)


def _is_audited(files: Files) -> bool:
    return any(name.startswith("audit-") for name in files.list("heartbeats"))


def _audit(folder: str, files: Files, clock: Callable[[], float]) -> AuditStatus:
    from rayexpand.evaluation.audit_files import RESULT
    from rayexpand.storage.heartbeats import drivers_in
    from rayexpand.storage.places import open_files
    from rayexpand.storage.tables import read_json
    from rayexpand.studies.membership import STUDY
    from rayexpand.studies.status import read_study_status

    problems: list[str] = []
    try:
        found = read_json(files, RESULT) or {}
    except DamagedFile as error:
        problems.append(str(error))
        found = {}
    sections = {name: float(one["created"]) for name, one in found.items()
                if isinstance(one, dict) and "created" in one}
    place = f"{folder.rstrip('/')}/membership/{STUDY}"
    shadows = read_study_status(place, clock) if open_files(place).read("study.json") is not None else None
    name = folder.rstrip("/").rpartition("/")[2]
    return AuditStatus(name, folder, sections, shadows, tuple(drivers_in(files, problems, clock())), tuple(problems))
