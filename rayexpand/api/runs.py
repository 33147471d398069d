"""Folders of runs and loops, opened: what they hold, and what can be done with them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rayexpand.api.driving import Relay, address_override, drive_rounds, drive_run, write_loop_pages
from rayexpand.api.files import Set, as_overrides
from rayexpand.api.results import Event, Paged, Table, text
from rayexpand.contract.errors import OverBudget

if TYPE_CHECKING:
    from rayexpand.runs.run import Run
    from rayexpand.runs.store import Totals
    from rayexpand.studies.rounds.config import LoopConfig


class _SampleFolder(Paged):
    """A folder of samples: a run, or a loop, whose rounds are read as one run."""

    folder: str

    def samples(self) -> Iterator[dict[str, Any]]:
        """The kept samples: `image` (PIL), `label`, `class_name`, and every column of its draw; of a loop also `round`.
        They come in planned order, round by round, but what `retry` made comes after the others of its shard."""
        import io

        from PIL import Image

        from rayexpand.runs.joined import open_samples, round_of

        run = open_samples(self.folder)
        names = run.plan.index.classes.display
        for receipt in sorted(run.store.receipts(), key=lambda one: (one.shard_id, one.generation)):
            number = round_of(receipt.data_file)
            further = {} if number is None else {"round": number}
            for row in run.store.data(receipt).to_pylist() if receipt.kept else ():
                yield {**row, **further, "image": Image.open(io.BytesIO(row["image"]["bytes"])),
                       "class_name": names[row["label"]]}

    def export(self, out: str | os.PathLike[str], layout: Literal["webdataset", "huggingface", "imagefolder"] =
               "webdataset", *, shard_images: int = 1000, selection: str | None = None, require: Sequence[str] = (),
               on: Callable[[Event], None] | None = None) -> Any:
        """Copies the kept samples into a new folder; see runs.export.Exported. `require`: lines of the release sheet
        that must pass. Raises UsageError with those that do not."""
        from rayexpand.evaluation import release
        from rayexpand.reports.card import sheet_text
        from rayexpand.runs.export import export
        from rayexpand.runs.joined import open_samples, view_samples
        from rayexpand.runs.selections import read_selection

        chosen = read_selection(open_samples(self.folder), selection) if selection else None
        sheet = release.release_sheet(view_samples(self.folder), chosen, exported=True)
        release.require(sheet, require)
        return export(self.folder, os.fspath(out), layout, shard_images=shard_images, selection=selection,
                      release=sheet_text(sheet), on_rows=Relay(on))

    def card(self, license_id: str | None = None, license_of: Mapping[str, str] | None = None) -> str:
        """Writes the dataset card and returns where. `license_of`: licenses of `generator`, `adapter` and `seeds`."""
        from rayexpand.reports.card import write_card

        return str(write_card(self.folder, license_id=license_id, license_of=license_of))


@dataclass(frozen=True)
class RunFolder(_SampleFolder):
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

    def report(self, strips: int = 0) -> str:
        """Writes the page and returns where. `strips`: of a guided run, so many samples beside plain ones."""
        from rayexpand.reports.guided import look
        from rayexpand.reports.run import write_report

        return str(write_report(self.folder, look=look(self.folder, strips) if strips else None))

    def _run(self) -> Run:
        from rayexpand.runs.run import open_run

        return open_run(self.folder)


@dataclass(frozen=True)
class LoopFolder(_SampleFolder):
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

    def verify(self, pixels: bool = False) -> Any:
        """Checks every round as a run, and whether decisions follow from each other and from scores; see
        studies.rounds.verify.LoopFindings."""
        from rayexpand.studies.rounds.verify import verify_loop

        return verify_loop(self.folder, pixels=pixels)

    def report(self, strips: int = 0) -> str:
        """Writes the page and returns where. `strips`: of a guided loop, so many samples of its last guided round
        beside plain ones."""
        from rayexpand.reports.loop import write_loop_report

        return str(write_loop_report(self.folder, strips))

    def regen(self, sample_id: str) -> dict[str, Any]:
        """Makes one sample again, alone, by the round that its copy is of; as that of a run, and `round`."""
        from rayexpand.runs.joined import round_with

        number = round_with(self.folder, sample_id)
        return {"round": number, **self.rounds[number - 1].regen(sample_id)}

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
        write_loop_pages(self.folder)
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
        if loop.is_over():
            end = loop.chain()[-1]
            write_loop_pages(config.folder)
        else:
            end = drive_rounds(loop, progress, ray=ray, same_process=same_process)
    except OverBudget as error:
        error.result = found
        raise
    return found._after(before, started, (f"the loop ended: {end.reason}",))


_COUNTS = ("planned", "kept", "rejected", "failed", "pending", "shards")


def _counts(totals: Totals) -> dict[str, int]:
    return {name: getattr(totals, name) for name in _COUNTS}
