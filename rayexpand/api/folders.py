"""Folders of runs, studies and sweeps, opened: what they hold, and what can be done with them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rayexpand.api.driving import Relay, address_override, drive_rounds, drive_run
from rayexpand.api.files import Set, as_overrides
from rayexpand.api.results import Audited, Event, Result, Table, text
from rayexpand.contract.errors import OverBudget

if TYPE_CHECKING:
    from rayexpand.runs.run import Run
    from rayexpand.runs.store import Totals
    from rayexpand.studies.rounds.config import LoopConfig


class _Paged(Result):
    """A folder with a page, which the verb that made it has written."""

    folder: str

    @property
    def page(self) -> str:
        """Where the page is."""
        from rayexpand.storage.places import open_files

        return str(open_files(self.folder).at("report.html"))


@dataclass(frozen=True)
class RunFolder(_Paged):
    """A run. `last` says what the call that returned it did: rows made, seconds; and the run's images_per_second.
    `notes`: what its user should know."""

    folder: str
    last: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**_counts(self._run().totals()), **self.last, "run": self.folder}

    def table(self) -> Table:
        return (f"run {Path(self.folder).name or Path(self.folder).resolve().name}", ""), [
            (name.replace("_", " "), text(value)) for name, value in self.to_dict().items()]

    def status(self) -> Any:
        """How far it is, also while it runs; see runs.status.RunStatus."""
        from rayexpand.runs.status import read_status

        return read_status(self.folder)

    def verify(self, pixels: bool = False) -> Any:
        """Checks every file against the plan, with `pixels` every image too; see runs.verify.Findings."""
        from rayexpand.runs.verify import verify

        return verify(self._run(), pixels=pixels)

    def samples(self) -> Iterator[dict[str, Any]]:
        """The kept samples: `image` (PIL), `label`, `class_name`, and every column of its draw. They come in planned
        order, but what `retry` made comes after the others of its shard."""
        import io

        from PIL import Image

        run = self._run()
        names = run.plan.index.classes.display
        for receipt in sorted(run.store.receipts(), key=lambda one: (one.shard_id, one.generation)):
            for row in run.store.data(receipt).to_pylist() if receipt.kept else ():
                yield {**row, "image": Image.open(io.BytesIO(row["image"]["bytes"])), "class_name": names[row["label"]]}

    def retry(self, *, set: Set = (), ray: bool | str = False, on: Callable[[Event], None] | None = None,
              same_process: bool = False) -> RunFolder:
        """Makes once more what failed. Raises OverBudget where too much fails again."""
        from rayexpand.runs.run import open_run

        overrides = [*as_overrides(set), *address_override(ray)]
        return drive_to_end(open_run(self.folder, overrides, check_models=True), on, ray=ray,
                            same_process=same_process, retry=True)

    def regen(self, sample_id: str) -> dict[str, Any]:
        """Makes one sample again, alone: `image` (encoded bytes), `sample_sha256`, `committed_sha256`, `equal`, ..."""
        from rayexpand.runs import run as runs

        run = runs.open_run(self.folder, check_models=True)
        expander = runs.expander_of(run, attempt=0)
        try:
            sample = expander.regenerate(sample_id)
        finally:
            expander.close()
        committed = runs.committed_hash(run, sample_id)
        return {"sample_id": sample_id, "status": sample.status.value, "reason": sample.reason and sample.reason.value,
                "detail": sample.detail, "sample_sha256": sample.sample_sha256, "committed_sha256": committed,
                "equal": committed == sample.sample_sha256 if committed else None, "image": sample.image}

    def export(self, out: str | os.PathLike[str], layout: Literal["webdataset", "huggingface", "imagefolder"] =
               "webdataset", *, shard_images: int = 1000, selection: str | None = None, require: Sequence[str] = (),
               on: Callable[[Event], None] | None = None) -> Any:
        """Copies the kept samples into a new folder; see runs.export.Exported. `require`: lines of the release sheet
        that must pass. Raises UsageError with those that do not."""
        from rayexpand.evaluation import release
        from rayexpand.reports.card import sheet_text
        from rayexpand.runs.export import export
        from rayexpand.runs.selections import read_selection
        from rayexpand.runs.status import view_run

        chosen = read_selection(self._run(), selection) if selection else None
        sheet = release.release_sheet(view_run(self.folder), chosen, exported=True)
        release.require(sheet, require)
        return export(self.folder, os.fspath(out), layout, shard_images=shard_images, selection=selection,
                      release=sheet_text(sheet), on_rows=Relay(on))

    def report(self, strips: int = 0) -> str:
        """Writes the page and returns where. `strips`: of a guided run, so many samples beside plain ones."""
        from rayexpand.reports.guided import look
        from rayexpand.reports.run import write_report

        return str(write_report(self.folder, look=look(self.folder, strips) if strips else None))

    def card(self, license_id: str | None = None, license_of: Mapping[str, str] | None = None) -> str:
        """Writes the dataset card and returns where. `license_of`: licenses of `generator`, `adapter` and `seeds`."""
        from rayexpand.reports.card import write_card

        return str(write_card(self.folder, license_id=license_id, license_of=license_of))

    def _run(self) -> Run:
        from rayexpand.runs.run import open_run

        return open_run(self.folder)


@dataclass(frozen=True)
class StudyFolder(_Paged):
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
class SweepFolder(_Paged):
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
class LoopFolder(Result):
    """A loop: runs in rounds. `last` says what the call that returned it did: rows made, seconds."""

    folder: str
    last: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def rounds(self) -> list[RunFolder]:
        """The runs of its rounds, in order."""
        from rayexpand.runs.joined import run_folders
        from rayexpand.storage.places import open_files

        return [RunFolder(one) for one in run_folders(open_files(self.folder))]

    @property
    def page(self) -> str:
        """Where the page of its last round is."""
        return self.rounds[-1].page

    def verify(self, pixels: bool = False) -> Any:
        """Checks every round as a run, and whether decisions follow from each other and from scores; see
        studies.rounds.verify.LoopFindings."""
        from rayexpand.studies.rounds.verify import verify_loop

        return verify_loop(self.folder, pixels=pixels)

    def report(self) -> str:
        """Writes the page of every round and returns where that of the last one is."""
        return [one.report() for one in self.rounds][-1]

    def status(self) -> Any:
        """How far it is, also while it runs; see studies.rounds.status.LoopStatus."""
        from rayexpand.studies.rounds.status import read_loop_status

        return read_loop_status(self.folder)

    def to_dict(self) -> dict[str, Any]:
        totals = [one._run().totals() for one in self.rounds]
        counts = {name: sum(getattr(one, name) for one in totals) for name in _COUNTS}
        return {"rounds": len(totals), **counts, **self.last, "loop": self.folder}

    def table(self) -> Table:
        return (f"loop {Path(self.folder).name}", ""), [
            (name.replace("_", " "), text(value)) for name, value in self.to_dict().items()]

    def retry(self, *, set: Set = (), ray: bool | str = False, on: Callable[[Event], None] | None = None,
              same_process: bool = False) -> LoopFolder:
        """Makes once more what failed, in every round. What succeeds joins the data and every later decision; those
        that are taken stay. Raises OverBudget where too much fails again."""
        kept, started = self._kept(), time.perf_counter()
        for one in self.rounds:
            one.retry(set=set, ray=ray, on=on, same_process=same_process)
        last = {"made": self._kept() - kept, "seconds": round(time.perf_counter() - started, 3)}
        return LoopFolder(self.folder, last)

    def _after(self, decided: int, started: float, notes: tuple[str, ...]) -> LoopFolder:
        """With what a call has done since it `started` with so many rows decided."""
        last = {"made": self._decided() - decided, "seconds": round(time.perf_counter() - started, 3)}
        return LoopFolder(self.folder, last, notes)

    def _decided(self) -> int:
        found = self.to_dict()
        return int(found["planned"] - found["pending"])

    def _kept(self) -> int:
        return int(self.to_dict()["kept"])


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


def drive_to_end(run: Run, on: Callable[[Event], None] | None, *, ray: bool | str, same_process: bool,
                 retry: bool = False) -> RunFolder:
    """Drives a run. Raises what `driving.drive_run` raises; an OverBudget carries the run."""
    from rayexpand.runs.inputs import changed_seeds

    changed = "" if retry or not run.store.committed() else changed_seeds(run.config, run.plan.index)
    try:
        last = drive_run(run, Relay(on), ray=ray, same_process=same_process, retry=retry)
    except OverBudget as error:
        error.result = RunFolder(str(run.folder))
        raise
    return RunFolder(str(run.folder), last, (changed,) if changed else ())


def loop_to_end(config: LoopConfig, on: Callable[[Event], None] | None, *, ray: bool | str,
                same_process: bool) -> LoopFolder:
    """Makes what is left of a loop. Raises what `driving.drive_rounds` raises; an OverBudget carries the loop."""
    from rayexpand.studies.rounds.loop import open_loop

    progress, started, found = Relay(on), time.perf_counter(), LoopFolder(config.folder)
    loop = open_loop(config, progress, device_here=not ray)
    before = found._decided()
    try:
        end = loop.chain()[-1] if loop.is_over() else drive_rounds(loop, progress, ray=ray, same_process=same_process)
    except OverBudget as error:
        error.result = found
        raise
    return found._after(before, started, (f"the loop ended: {end.reason}",))


_COUNTS = ("planned", "kept", "rejected", "failed", "pending", "shards")


def _counts(totals: Totals) -> dict[str, int]:
    return {name: getattr(totals, name) for name in _COUNTS}
