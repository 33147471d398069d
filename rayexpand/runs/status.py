"""What a run folder says about its run, read without a driver, a model or a plan in memory.

`view_run` reads run.json, attempts/ and receipts/; `read_status` folds them into counts, a rate and a finishing time.
Both work while a driver is dead, and where receipts are missing (a footer replaces each). At 13 thousand shards on
a local disk `read_status` takes about half a second (measured, 13,000 receipts of 650 bytes, page cache warm).
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from rayexpand.contract.errors import DamagedFile, EnvironmentFault, UsageError, three_digits
from rayexpand.contract.schema import ClassTable, Reason, Receipt, Status
from rayexpand.runs.allocation import dealt_words
from rayexpand.runs.blame import running_here
from rayexpand.runs.growth import grown_words
from rayexpand.runs.store import Store, Totals, adopted_digests, attempt_names, read_facts, run_title, totals
from rayexpand.storage.files import Files, each
from rayexpand.storage.heartbeats import DriverSeen, drivers_in
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import read_json, read_table

_WINDOW_SHARDS = 5  # the time left follows from the rate of five typical shard times


@dataclass(frozen=True, slots=True)
class RunView:
    """What is on disk of one run at one moment."""

    run: dict[str, Any]  # run.json
    receipts: tuple[Receipt, ...]  # by shard, then generation
    committed: dict[str, float]  # data file -> modification time, unix seconds
    store: Store

    @property
    def files(self) -> Files:
        return self.store.files

    @property
    def title(self) -> str:
        """What it is called where it is spoken of."""
        return run_title(self.run, str(self.files.root))

    def attempts(self) -> list[dict[str, Any]]:
        """Every start of the run in order; reads one small file for each. Of one that is gone or damaged the number is
        known, and that it is."""
        def one(number: int) -> dict[str, Any]:
            name = f"attempts/{number:04d}.json"
            try:
                found = read_json(self.files, name)
            except DamagedFile:
                return {"attempt": number, "started": None, "host": f"{name} is damaged", "pid": None}
            return found or {"attempt": number, "started": None, "host": f"{name} is gone", "pid": None}

        last = max((int(name[:-5]) for name in attempt_names(self.files)), default=0)
        return list(each(self.files, one, range(1, last + 1)))

    @property
    def totals(self) -> Totals:
        return totals(int(self.run["planned"]), self.receipts)

    @property
    def reasons(self) -> dict[str, int]:
        """Refused rows by reason, most frequent first; rows that a retry has decided again count once."""
        return count_reasons(self.receipts)

    @property
    def stacks(self) -> list[tuple[dict[str, str], int]]:
        """The distinct stack fingerprints with the shards each has made, most shards first."""
        counts = Counter(json.dumps(receipt.stack, sort_keys=True) for receipt in self.receipts)
        return [(json.loads(stack), shards) for stack, shards in counts.most_common()]


class FolderStatus(ABC):
    """One look at what a folder holds; subclasses are dataclasses with these fields and their own."""

    __slots__ = ()
    kind: ClassVar[str]
    name: str
    folder: str
    drivers: tuple[DriverSeen, ...]  # that work in the folder, or did last
    problems: tuple[str, ...]  # files that are damaged; what they held is not counted

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Whether nothing is left to make."""

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self)  # type: ignore[call-overload]
        return {"kind": self.kind, **fields, "complete": self.complete,
                "drivers": [one.to_json() for one in self.drivers], "problems": list(self.problems)}


@dataclass(frozen=True, slots=True)
class RunStatus(FolderStatus):
    """One look at a run; planned = kept + rejected + failed + pending."""

    kind: ClassVar[str] = "run"
    name: str
    folder: str
    run_digest: str
    planned: int
    kept: int
    rejected: int
    failed: int
    pending: int
    shards_done: int
    shards: int
    reasons: dict[str, int]
    images_per_second: float | None  # see `Rate`; None before the first timed commit
    concurrency: float | None  # shards in work at once, on average
    eta_seconds: float | None  # pending rows at the rate of the last shards; None where that is unknown
    last_commit_age_seconds: float | None
    attempts: int
    processes: int  # sampler processes alive on this host
    mixed_stacks: bool  # shards were made on different stacks, so the reproducibility promise does not span them
    drivers: tuple[DriverSeen, ...] = ()
    problems: tuple[str, ...] = ()
    history: tuple[tuple[str, str], ...] = ()  # see `history`

    @property
    def complete(self) -> bool:
        return self.pending == 0

    def table(self) -> list[tuple[str, str]]:
        """(label, value) lines for people."""
        decided = 1 - self.pending / self.planned
        lines = [("planned", f"{self.planned:,}"), ("kept", f"{self.kept:,}"), ("rejected", f"{self.rejected:,}"),
                 ("failed", f"{self.failed:,}"), ("pending", f"{self.pending:,} ({100 * decided:.1f} % decided)"),
                 ("shards", f"{self.shards_done:,} of {self.shards:,}"),
                 *self.history,
                 *((f"  {reason}", f"{rows:,}") for reason, rows in self.reasons.items()),
                 ("images per second", "unknown" if self.images_per_second is None else
                  f"{three_digits(self.images_per_second)} with {self.concurrency:.1f} shards in work"),
                 ("time left", "none" if self.complete else duration(self.eta_seconds)),
                 ("last commit", "none yet" if self.last_commit_age_seconds is None else
                  f"{duration(self.last_commit_age_seconds)} ago"),
                 ("attempts", f"{self.attempts}"), ("processes here", f"{self.processes}")]
        if self.mixed_stacks:
            lines.append(("stacks", "mixed: shards were made on different stacks, see the report"))
        return lines + driver_lines(self.drivers, self.problems)


def view_run(folder: str | Path, on_damaged: Callable[[str], None] | None = None) -> RunView:
    """The run in `folder`, a path or a URL. Raises UsageError if there is none, StorageError if its store refuses,
    DigestMismatch if a data file is of another run, DamagedFile if one is damaged, unless `on_damaged` hears of it.
    """
    files = open_files(folder)
    run = read_facts(files)
    store = Store(files, run["run_digest"], adopted=adopted_digests(run))
    data = {name: entry.modified for name, entry in files.entries("data").items() if name.endswith(".parquet")}
    return RunView(run, tuple(store.receipts(data, on_damaged)), data, store)


def read_status(folder: str | Path, clock: Callable[[], float] = time.time) -> RunStatus:
    """Counts, rate and finishing time of a run. Raises UsageError if there is none below `folder`."""
    problems: list[str] = []
    view = view_run(folder, problems.append)
    counts, committed = view.totals, view.committed
    spans = shard_spans(view.receipts, committed)
    rate, now = Rate(spans), Rate(latest(spans)).images_per_second
    eta = 0.0 if not counts.pending else counts.pending / now if now else None
    return RunStatus(
        name=view.run["name"], folder=str(folder), run_digest=view.run["run_digest"],
        planned=counts.planned, kept=counts.kept, rejected=counts.rejected, failed=counts.failed,
        pending=counts.pending, shards_done=counts.shards, shards=int(view.run["shards"]), reasons=view.reasons,
        images_per_second=rate.images_per_second, concurrency=rate.concurrency, eta_seconds=eta,
        last_commit_age_seconds=max(0.0, clock() - max(committed.values())) if committed else None,
        attempts=len(attempt_names(view.files)), processes=running_here(view.files),
        mixed_stacks=len(view.stacks) > 1, drivers=tuple(drivers_in(view.files, problems, clock())),
        problems=tuple(problems), history=tuple(history(view.run)))


def shown_drivers(drivers: Iterable[DriverSeen]) -> list[DriverSeen]:
    """Those who work or were killed, or else the one that ended last."""
    seen = list(drivers)
    return [one for one in seen if one.state != "ended"] or seen[:1]


def driver_lines(drivers: Iterable[DriverSeen], problems: Iterable[str]) -> list[tuple[str, str]]:
    """(label, value) lines: drivers with their tasks; then what is damaged."""
    lines = [line for one in shown_drivers(drivers) for line in (
        ("driver", one.words), *((("works on" if one.state == "running" else "worked on", one.task),)
                                 if one.task and one.state != "ended" else ()))]
    return [*(lines or [("driver", "no heartbeat is known")]), *(("damaged", one) for one in problems)]


def history(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How the copies of a run came about, (what, in words): nothing where it was begun with what its method plans.
    `run`: its run.json."""
    return [*([("round", f"{run['follows']['round']} of a loop, by decision {run['follows']['decision'][:8]}")]
              if "follows" in run else []),
            *([("dealt", dealt_words(run["dealt"]))] if "dealt" in run else []),
            *([("grown", grown_words(run))] if "grown" in run else []),
            *([("made in rounds", rounds_words(run))] if "rounds" in run else [])]


def rounds_words(facts: Mapping[str, Any]) -> str:
    """'3 rounds of 40, 40 and 20 samples, guided from round 2'"""
    sizes, first = [f"{size:,}" for size in facts["rounds"]], facts["config"]["rounds"]["guided_from"]
    shown = sizes if len(sizes) <= 10 else [*sizes[:5], "...", sizes[-1]]
    return (f"{len(sizes)} round{'s' * (len(sizes) > 1)} of {', '.join(shown)} samples"
            + (f", guided from round {first}" if first and first <= len(sizes) else ""))


class Rate:
    """Images per second of a run, the same wherever it is said. A receipt of `total` seconds, committed at time c,
    worked during [c - total, c], and

        images/s = rows decided / time in which at least one shard was in work
                 = (rows / summed seconds) * (summed seconds / that time), the second factor being the concurrency,

    so any number of processes and hosts counts without being known, and hours in which no driver ran do not. A refused
    row is work too, and so is loading a model. Copying a folder without its file times makes all shards look
    simultaneous: the rate is then high.
    """

    def __init__(self, spans: Iterable[tuple[float, float, int]] = ()) -> None:
        self._rows, self._busy, self._working = 0, 0.0, 0.0
        self._worked: list[tuple[float, float]] = []  # apart from each other, in order
        for span in spans:
            self.add(*span)

    def add(self, committed: float, seconds: float, rows: int) -> None:
        """A shard, in the order of commits (unix seconds)."""
        begin, end = committed - seconds, committed
        self._rows, self._busy = self._rows + rows, self._busy + seconds
        while self._worked and self._worked[-1][1] >= begin:
            earlier = self._worked.pop()
            begin, end = min(begin, earlier[0]), max(end, earlier[1])
            self._working -= earlier[1] - earlier[0]
        self._worked.append((begin, end))
        self._working += end - begin

    @property
    def images_per_second(self) -> float | None:
        """None before the first timed commit."""
        return self._rows / self._working if self._working else None

    @property
    def concurrency(self) -> float | None:
        """Mean number of shards in work."""
        return self._busy / self._working if self._working else None


def shard_spans(receipts: Iterable[Receipt], committed: Mapping[str, float]) -> list[tuple[float, float, int]]:
    """(time of commit, seconds, rows) of each shard, by time. Retries do not count: they hold few rows, in calls that
    are as large as before. `committed`: data file -> modification time."""
    return sorted((committed[r.data_file], shard_seconds(r), r.decided) for r in receipts
                  if not r.generation and r.data_file in committed and shard_seconds(r) > 0)


def latest(spans: Sequence[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """The part of the spans in the last five median shard times, which says best when a run will end."""
    if not spans:
        return []
    begin = spans[-1][0] - _WINDOW_SHARDS * median(seconds for _, seconds, _ in spans)
    return [(end, min(seconds, end - begin), rows) for end, seconds, rows in spans if end > begin]


def shard_seconds(receipt: Receipt) -> float:
    """Wall seconds one process spent on a shard: `total`, or the sum of the phases where that is absent."""
    return receipt.seconds.get("total") or sum(receipt.seconds.values())


def count_reasons(receipts: Sequence[Receipt]) -> dict[str, int]:
    """Refused rows by reason. Of the failures of a shard only its last generation counts: retries replaced the rest."""
    latest = {receipt.shard_id: receipt.generation for receipt in receipts}  # receipts come by generation
    counts: Counter[str] = Counter()
    for receipt in receipts:
        for reason, rows in receipt.reasons.items():
            if Reason(reason).status is Status.REJECTED or receipt.generation == latest[receipt.shard_id]:
                counts[reason] += rows
    return dict(counts.most_common())


def class_counts(view: RunView) -> np.ndarray:
    """int64[K]: kept samples by target label. Reads the label column of every data file, about 1 ms each."""
    def one(receipt: Receipt) -> np.ndarray:
        labels = view.store.data(receipt, ["label"])["label"].to_numpy()
        return np.bincount(labels, minlength=n_classes)

    n_classes = len(read_classes(view))
    return sum(each(view.files, one, (r for r in view.receipts if r.kept)), np.zeros(n_classes, np.int64))


def read_classes(view: RunView) -> ClassTable:
    """Class table of the plan. Raises UsageError if the plan folder is gone."""
    return ClassTable.from_arrow(read_plan_table(view, "classes.parquet"))


def read_plan_table(view: RunView, name: str) -> pa.Table:
    """A table of the plan. Raises UsageError if it is gone, DamagedFile if it is damaged."""
    place = f"{view.run['plan']}/{name}"
    try:
        return read_table(view.files, place)
    except OSError as error:
        raise UsageError(f"{view.files.at(place)}: cannot be read ({error.strerror or error}). Restore the plan folder "
                         "of the run; the data files are whole without it.") from error


def duration(seconds: float | None) -> str:
    """3725 -> '62 min'; None -> 'unknown'."""
    if seconds is None:
        return "unknown"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min" if hours < 100 else f"{hours // 24} d {hours % 24} h"


def write_page(files: Files, name: str, text: str) -> Path | str:
    """Replaces a file of the run folder in one step. Raises EnvironmentFault if the folder takes no more files."""
    try:
        files.replace(name, text.encode(), "page")
    except OSError as error:
        raise EnvironmentFault(f"{files.at(name)}: {error.strerror}. Free space or allow writing there, then run the "
                               "same command again; no data file is touched.") from error
    return files.at(name)
