"""How far something is: of a run, loop, study, sweep, audit, or of the fits in a folder of artifacts; while it runs,
and after its driver died."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rayexpand.fitting.status import FitStatus
    from rayexpand.runs.status import RunStatus
    from rayexpand.storage.files import Files
    from rayexpand.studies.audit_status import AuditStatus
    from rayexpand.studies.rounds.status import LoopStatus
    from rayexpand.studies.status import StudyStatus
    from rayexpand.studies.sweep.status import SweepStatus


def status(folder: str | os.PathLike[str], clock: Callable[[], float] = time.time,
           ) -> RunStatus | LoopStatus | StudyStatus | SweepStatus | FitStatus | AuditStatus:
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
    if first_look(files, "rounds.json") is not None:
        from rayexpand.studies.rounds.status import read_loop_status

        return read_loop_status(where, clock)
    if first_look(files, "sweep.json") is not None:
        from rayexpand.studies.sweep.status import read_sweep_status

        return read_sweep_status(where, clock)
    if first_look(files, "result.json") is not None or _is_audited(files):
        from rayexpand.studies.audit_status import read_audit_status

        return read_audit_status(where, clock)
    if first_look(files, "study.json") is not None:
        from rayexpand.studies.status import read_study_status

        return read_study_status(where, clock)
    from rayexpand.fitting.status import read_fits

    return read_fits(where, clock)


def _is_audited(files: Files) -> bool:
    """Whether an audit has begun in a folder, with nothing found yet."""
    return any(name.startswith("audit-") for name in files.list("heartbeats"))
