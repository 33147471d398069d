"""A run as part of something larger: an expansion of a study, a round of a loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rayexpand.contract.errors import RayexpandError
from rayexpand.runs.status import RunStatus, duration, read_status
from rayexpand.storage.places import open_files


@dataclass(frozen=True, slots=True)
class RunStage:
    """`status` is None where it has not begun; then `problem` says what is wrong, if anything is. A loop has one stage
    of its own beside those of its rounds: it is at `now`, or `ended`."""

    name: str
    status: RunStatus | None = None
    problem: str = ""
    now: str = ""
    ended: bool = False

    @property
    def complete(self) -> bool:
        return self.ended or (self.status is not None and self.status.complete)

    @property
    def words(self) -> str:
        if self.status is None:
            return self.problem or self.now or "not begun"
        one = self.status
        left = "" if one.complete else f", {duration(one.eta_seconds)} left"
        return (f"{one.planned - one.pending:,} of {one.planned:,} decided ({one.kept:,} kept, {one.rejected:,} "
                f"rejected, {one.failed:,} failed){left}")


def stage_in(folder: str, name: str, clock: Callable[[], float]) -> RunStage:
    """The stage of a run in a folder, where it has begun."""
    if open_files(folder).read("run.json") is None:
        return RunStage(name)
    try:
        return RunStage(name, read_status(folder, clock))
    except RayexpandError as error:
        return RunStage(name, problem=str(error))
