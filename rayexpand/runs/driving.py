"""Driving runs to their end on this machine: in this process, or in a child of it. on_ray/expand.py drives them on Ray.

A driver is called with a run and keeps its models for the next run that needs the same ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from rayexpand.contract import log_lines, metrics
from rayexpand.contract.errors import EnvironmentFault, Interrupted, unpacked
from rayexpand.contract.protocols import Tools
from rayexpand.contract.schema import Receipt, Status
from rayexpand.contract.settings import digest
from rayexpand.methods import names
from rayexpand.runs.config import resolved
from rayexpand.runs.run import Job, OnCommit, Run, drive, in_process, pending_jobs, retry_jobs, start
from rayexpand.runs.status import Rate, shard_seconds, shard_spans
from rayexpand.runs.store import Totals
from rayexpand.runs.tools import load_tools

OWN_METHOD = "own"  # the label of every method that is not built in
DEATHS = 6  # of a child in a row without a commit between them, before its run is given up for now


class Listener(Protocol):
    """What a driver tells while it works. `rate`: images per second of the run, 0 before it is known."""

    def __call__(self, task: str, done: int, total: int, facts: Mapping[str, int] | None = None,
                 rate: float | None = None) -> None: ...


class Driver(Protocol):
    """Drives what is pending of a run, or with `retry` what failed, and returns its totals. Raises what `run.drive`
    raises."""

    def __call__(self, run: Run, progress: Listener, *, retry: bool = False) -> Totals: ...


class RunProgress:
    """Puts together what is known of a run: rows decided between commits, counts and rate at commits, actors alive."""

    def __init__(self, run: Run, progress: Listener, *, retry: bool = False) -> None:
        before = run.totals()
        self._run, self._task, self._progress = run, f"expanding {run.title}", progress
        self._decided = before.kept + before.rejected + (0 if retry else before.failed)
        self._facts, self._shown, self._rate = dict[str, int](), self._decided, rate_of([run])
        self._method = run.config.method.name if run.config.method.name in names() else OWN_METHOD

    def rows(self, made: int) -> None:
        self._decided += made
        self._show(self._decided)

    def committed(self, counts: Totals, receipt: Receipt) -> None:
        """A shard, just committed; `counts` with it."""
        if not receipt.generation:  # a retry is no measure of the rate
            self._rate.add(time.time(), shard_seconds(receipt), receipt.decided)
        record_shard(self._method, receipt)
        self._count(counts)
        self._show(self._shown)

    def actors(self, alive: int, hosts: int, rows: int) -> None:
        """`rows`: decided since the start by all actors."""
        self._facts |= {"actors": alive, "nodes": hosts}
        self._show(self._decided + rows)

    def ended(self, counts: Totals) -> Totals:
        self._rate = rate_of([self._run])
        self._count(counts)
        self._show(counts.planned - counts.pending)
        return counts

    def say(self, line: str) -> None:
        self._tell(line, self._shown)

    def _count(self, counts: Totals) -> None:
        self._facts |= {"kept": counts.kept, "rejected": counts.rejected, "failed": counts.failed}

    def _show(self, done: int) -> None:
        self._shown = done
        self._tell(self._task, done)

    def _tell(self, task: str, done: int) -> None:
        planned = self._run.plan.planned
        self._progress(task, min(done, planned), planned, self._facts, self._rate.images_per_second or 0.0)


def record_shard(method: str, receipt: Receipt) -> None:
    """Counts and logs a committed shard."""
    for status in Status:
        metrics.record(metrics.IMAGES, getattr(receipt, status.value), method=method, status=status.value)
    metrics.record(metrics.SHARDS, method=method)
    log_lines.say("commit", shard=receipt.shard_id, generation=receipt.generation, kept=receipt.kept,
                  rejected=receipt.rejected, failed=receipt.failed, seconds=round(shard_seconds(receipt), 3),
                  made_on=receipt.host)
    for reason, rows in receipt.reasons.items():
        metrics.record(metrics.REFUSED, rows, reason=reason)
    for stage, seconds in receipt.seconds.items():
        if stage != "total":
            metrics.record(metrics.STAGE_SECONDS, seconds, stage=stage)
    if receipt.generation:
        metrics.record(metrics.RETRIES, receipt.planned, cause="row")


def rate_of(runs: Sequence[Run]) -> Rate:
    """Images per second of what is committed, of several runs as of one."""
    spans = list[tuple[float, float, int]]()
    for run in runs:
        data = run.files.entries("data")
        spans += shard_spans(run.store.receipts(data), {name: one.modified for name, one in data.items()})
    return Rate(sorted(spans))


def jobs_of(run: Run, *, retry: bool) -> Callable[[], list[Job]]:
    """What is left to do, asked again before each wave."""
    return retry_jobs(run) if retry else lambda: pending_jobs(run)


class Here:
    """Drives in this process. A sampler call past its deadline ends the process; see `Child`."""

    def __init__(self) -> None:
        self._priors, self._guides, self._judges = dict[str, Any](), dict[str, Any](), dict[str, Any]()

    def __call__(self, run: Run, progress: Listener, *, retry: bool = False) -> Totals:
        heard = RunProgress(run, progress, retry=retry)
        metrics.record(metrics.ACTORS, 1)
        metrics.record(metrics.NODES, 1)
        return heard.ended(self.drive(run, heard.rows, heard.committed, retry=retry))

    def drive(self, run: Run, on_rows: Callable[[int], None], on_commit: OnCommit, *, retry: bool) -> Totals:
        expander = start(run, lambda: self.tools(run), on_rows)
        try:
            return drive(run, in_process(expander), jobs_of(run, retry=retry), to_the_end=retry, on_commit=on_commit)
        finally:
            expander.close()

    def tools(self, run: Run) -> Tools:
        """What a run needs, with the models of an earlier one where they are the same."""
        own, guide, judge = prior_key(run), guide_key(run), guide_key(run, "judge")
        found = load_tools(run.sampling, run.plan.index.classes, prior=self._priors.get(own),
                           guide=self._guides.get(guide), judge=self._judges.get(judge))
        if found.prior is not None:
            self._priors[own] = found.prior
        if found.guide is not None:
            self._guides[guide] = found.guide
        if found.judge is not None:
            self._judges[judge] = found.judge
        return found


def prior_key(run: Run) -> str:
    """Runs with one key have the same prior, loaded the same way; an adapter is in it."""
    models, has_adapter = run.facts["models"], "adapter" in run.facts["models"]
    return digest([models.get("prior"), models.get("adapter"), run.sampling.prior.model_dump(mode="json"),
                   getattr(run.config.method, "lora_scale", 1.0) if has_adapter else None])


def guide_key(run: Run, part: str = "guide") -> str:
    """Runs with one key have the same guide, or judge, asked the same about the same classes."""
    classes = run.plan.index.classes
    return digest([run.facts["models"].get(part), classes.key, classes.asked, run.config.prior.device,
                   getattr(run.config.method, "guide_text", None) if part == "guide" else None])


class Child:
    """Drives in one child process (child.py), so that a sampler that hangs or crashes ends that process and not this
    one; the next child goes on, and what two of them died of is found out and refused. Any exception that `progress`
    raises, and Ctrl-C, ends the child after its current call; then it is raised here."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, run: Run, progress: Listener, *, retry: bool = False) -> Totals:
        deaths = 0
        while True:
            heard = RunProgress(run, progress, retry=retry)
            found, committed = self._driven(run, heard, retry)
            if found is not None:
                return found
            deaths = 0 if committed else deaths + 1
            if deaths == DEATHS:
                raise EnvironmentFault(f"{DEATHS} sampler processes ended one after the other without a commit; their "
                                       "last words are on stderr. The same call tries again")

    def close(self) -> None:
        """Ends the child after its current call."""
        if (process := self._process) is not None:
            self._process = None
            with contextlib.suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
            for _ in process.stdout or ():  # a full pipe would keep it from ending
                pass
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _driven(self, run: Run, heard: RunProgress, retry: bool) -> tuple[Totals | None, bool]:
        """(totals, or None where the child died; whether it had committed anything)."""
        process = self._started()
        committed = False
        try:
            with contextlib.suppress(BrokenPipeError):  # a dead one says nothing, which ends the loop
                task = {"config": resolved(run.config), "retry": retry, "attempt": run.attempt}
                process.stdin.write(json.dumps(task) + "\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
            for said in _lines(process):
                if "rows" in said:
                    heard.rows(said["rows"])
                elif "counts" in said:
                    committed = True
                    heard.committed(Totals(**said["counts"]), Receipt(**said["receipt"]))
                elif "totals" in said:
                    return heard.ended(Totals(**said["totals"])), True
                else:
                    raise unpacked(json.dumps(said))
        except BaseException:
            self.close()
            raise
        self.close()
        return None, committed

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rayexpand.runs.child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                # it imports from where this process does, and from no other folder
                text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(one or os.getcwd() for one in sys.path)},
                start_new_session=True)  # Ctrl-C is for this process, which tells the child
        return self._process


def _lines(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    for line in process.stdout or ():
        yield json.loads(line)


def stopped() -> Interrupted:
    """What ends a child whose parent is gone, or wants it to end."""
    return Interrupted("the process that started this one is gone or wants it to stop; the same command continues")
