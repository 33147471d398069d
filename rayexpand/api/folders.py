"""Folders of runs, loops, studies, sweeps and audits, opened."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayexpand.api.results import Audited, Paged, Result, Table
from rayexpand.api.runs import LoopFolder, RunFolder


@dataclass(frozen=True)
class StudyFolder(Paged):
    """A study. `failed`: one line for each trial that the call could not train."""

    folder: str
    failed: tuple[str, ...] = ()

    def verify(self, pixels: bool = False) -> Any:
        """Checks every file of its runs, results and predictions; see runs.verify.Findings."""
        from rayexpand.studies.verify import verify_study

        return verify_study(self.folder, pixels=pixels)

    def summary(self) -> dict[str, Any]:
        """Every number of the page."""
        from rayexpand.studies.summary import summary

        return summary(self.folder)

    def to_dict(self, summary: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return {**(summary or self.summary()), "study": self.folder, "failed": list(self.failed)}

    def table(self, summary: Mapping[str, Any] | None = None) -> Table:
        """Arms with their accuracy, and what each is compared with the baseline and with its control. `summary`: what
        the method of this name gave, so that it need not be counted again."""
        from rayexpand.studies.spreads import plus_minus, points

        found = summary or self.summary()
        against = {(one["arm"], one["kind"]): points(one["mean"]) + (
                       "" if (known := one["adjusted"]) is None else
                       f" [{points(known['low'])}, {points(known['high'])}]")
                   for one in found["comparisons"] if one["mean"] is not None}
        rows: list[tuple[str, ...]] = []
        for arm in found["arms"]:
            top1 = arm["last"]["top1"]
            rows.append((arm["arm"], plus_minus(top1), str(top1["n"]),
                         against.get((arm["arm"], "baseline"), ""), against.get((arm["arm"], "control"), "")))
        return ("arm", "top-1 %, mean ± s.e.", "n", "against baseline", "against its control"), rows

    def further(self, summary: Mapping[str, Any] | None = None) -> Table | None:
        """The scores on further test sets, where there are any."""
        from rayexpand.studies.summary import further_scores

        return further_scores(summary or self.summary())

    def in_rounds(self, summary: Mapping[str, Any] | None = None) -> list[Table]:
        """Arms in rounds beside their controls, and what they spent; none of a study without."""
        from rayexpand.studies.round_table import cost_table, round_table

        found = summary or self.summary()
        return [one for one in (round_table(found), cost_table(found)) if one is not None]

    def compared(self, summary: Mapping[str, Any] | None = None) -> Table | None:
        """Accuracy, coverage, distance and cost of every arm, where the study compares its samples with real images."""
        from rayexpand.studies.score_table import score_table

        return score_table(summary or self.summary())

    def said_of_top1(self, summary: Mapping[str, Any] | None = None) -> list[str]:
        """Do arms whose samples score higher teach better? In words."""
        from rayexpand.studies.score_table import said_of_top1

        return said_of_top1(summary or self.summary())

    def report(self) -> str:
        """Writes the page and returns where."""
        from rayexpand.reports.study import write_study_report

        return str(write_study_report(self.folder))


@dataclass(frozen=True)
class SweepFolder(Paged):
    """A sweep. `failed`: one line for each trial that the call could not run."""

    folder: str
    failed: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """Every number of the page, which is written too, as are best.yaml and final.yaml."""
        from rayexpand.reports.sweep import write_sweep_report
        from rayexpand.studies.sweep.sweep import sweep_in

        return write_sweep_report(sweep_in(self.folder), self.failed)

    def to_dict(self) -> dict[str, Any]:
        return self.summary()

    def table(self, summary: Mapping[str, Any] | None = None) -> Table:
        from rayexpand.studies.spreads import plus_minus
        from rayexpand.studies.sweep.search import describe

        found = summary or self.summary()
        return ("configuration", f"{found['metric']} %, mean ± s.e.", "n", "epochs", ""), [
            (describe(one["values"]), plus_minus(one["spread"], 2) if one["spread"] else "",
             str(one["spread"]["n"] if "scores" in one else ""),
             f"{one['epochs']}/{one['of_epochs']}", "best" if one["key"] == found["best"] else one["state"]
             + ", within noise" * (one["key"] in found["within_noise"])) for one in found["trials"]]

    def report(self) -> str:
        """Writes the page and returns where."""
        return str(self.summary()["report"])


@dataclass(frozen=True)
class AuditFolder(Result):
    """An audit: the folder in which result.json lies."""

    folder: str

    def to_dict(self) -> dict[str, Any]:
        from rayexpand.storage.places import open_files
        from rayexpand.storage.tables import read_json

        return read_json(open_files(self.folder), "result.json") or {}

    def table(self) -> Table:
        return Audited(self.to_dict()).table()

    def report(self) -> str:
        """Writes the page of the audit `membership` and returns where."""
        from rayexpand.reports.membership import write_membership_page

        return str(write_membership_page(self.folder))


def open(folder: str | os.PathLike[str]) -> RunFolder | StudyFolder | SweepFolder | LoopFolder | AuditFolder:
    """What a folder holds. Raises UsageError where it is none of these."""
    from rayexpand.runs.store import first_look, read_facts
    from rayexpand.storage.places import open_files

    files = open_files(os.fspath(folder))
    for name, kind in (("study.json", StudyFolder), ("sweep.json", SweepFolder), ("rounds.json", LoopFolder),
                       ("result.json", AuditFolder)):
        if first_look(files, name) is not None:
            return kind(os.fspath(folder))
    read_facts(files)
    return RunFolder(os.fspath(folder))
