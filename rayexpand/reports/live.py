"""The page of a folder as it is now, for a browser that asks again every few seconds. It has no script.

    status --serve -> api/live.py, a server beside the browser -> live_page(what `status` says)

A file in the folder could not say that its driver is dead: without a script a page knows no time. A server can, so the
page is rendered anew for each look.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from rayexpand.contract.errors import RayexpandError
from rayexpand.contract.schema import Reason, Receipt
from rayexpand.reports.run import Picture, about, encoded_picture, picture_of, spread
from rayexpand.reports.templates import render
from rayexpand.runs.status import RunView, driver_lines, duration, shard_spans, shown_drivers, view_run
from rayexpand.storage.places import is_url, open_files

REFRESH_S = 5
LAST_SHARDS, SHARD_SAMPLES, ROWS_READ = 3, 8, 64
BUCKETS = 48  # bars of the throughput
PILOTS_SEARCHED = 20


@dataclass(frozen=True, slots=True)
class Bar:
    """A line with a bar of parts: (share of it, the colour's class)."""

    name: str
    parts: tuple[tuple[float, str], ...]
    words: str


@dataclass(frozen=True, slots=True)
class Throughput:
    """Rows decided a second in equal steps of time."""

    rates: tuple[float, ...]
    begin: float  # unix seconds
    end: float

    @property
    def bars(self) -> list[tuple[float, float, float]]:
        """(x, width, height), in hundredths of the picture."""
        top, width = max(self.rates, default=0.0), 100 / max(1, len(self.rates))
        return [(i * width, width * 0.85, 100 * rate / top) for i, rate in enumerate(self.rates) if top and rate]


@dataclass(frozen=True, slots=True)
class LastShard:
    name: str
    age_seconds: float
    samples: tuple[Picture, ...]


class LiveView:
    """Renders pages; pictures of a data file are made once."""

    def __init__(self) -> None:
        self._pictures: dict[tuple[str, str], tuple[Picture, ...]] = {}

    def page(self, status: Any, now: float | None = None) -> str:
        """The page of what api.status returned. Files that vanish meanwhile leave a gap and no error."""
        now = time.time() if now is None else now
        view, problem = None, ""
        if (folder := shown_run(status)) is not None:
            try:
                view = view_run(folder, lambda line: None)
            except (RayexpandError, OSError) as error:
                problem = str(error)
        spans = [] if view is None else shard_spans(view.receipts, view.committed)
        said = {label for label, _ in driver_lines(status.drivers, status.problems)}
        return render(
            "live.html.j2", _FILTERS, status=status, now=now, refresh=REFRESH_S, tiles=tiles(status), bars=bars(status),
            drivers=shown_drivers(status.drivers), lines=[line for line in status.table() if line[0] not in said],
            shown=None if view is None else view.title, throughput=throughput(spans, now), problem=problem,
            reasons=[] if view is None else _reasons(view), shards=[] if view is None else self._last(view, now),
            sheet=_sheet(status))

    def _last(self, view: RunView, now: float) -> list[LastShard]:
        """The shards that were committed last, with their first samples."""
        latest = sorted((one for one in view.receipts if one.kept and one.data_file in view.committed),
                        key=lambda one: -view.committed[one.data_file])[:LAST_SHARDS]
        keys = {(str(view.files.root), one.data_file): one for one in latest}
        self._pictures = {key: self._pictures[key] if key in self._pictures else _samples(view, one)
                          for key, one in keys.items()}
        return [LastShard(one.data_file.removeprefix("train-").removesuffix(".parquet"),
                          max(0.0, now - view.committed[one.data_file]), self._pictures[key])
                for key, one in keys.items()]


def _samples(view: RunView, receipt: Receipt) -> tuple[Picture, ...]:
    try:
        with view.store.open(receipt) as parquet:
            names = ["sample_id", "prompt", "strength", "steps_run", "scores", "image"]
            rows = spread(next(parquet.iter_batches(ROWS_READ, columns=names, use_threads=False)).to_pylist(),
                          SHARD_SAMPLES)
    except (RayexpandError, OSError, ValueError, StopIteration) as error:
        return (Picture(title=f"{receipt.data_file} cannot be read: {error}"),)
    return tuple(encoded_picture((row["image"] or {}).get("bytes"), about(row)) for row in rows)


def shown_run(status: Any) -> str | None:
    """The run whose samples are shown: that of a run, the one in work of a loop or study, the last pilot of a sweep."""
    if status.kind == "run":
        return status.folder
    study = status if status.kind == "study" else getattr(status, "study", None)
    if study is not None or status.kind == "loop":
        stages = study.runs if study is not None else [one.run for one in status.rounds]
        begun = [one.status for one in stages if one.status is not None and one.status.shards_done]
        working = [one for one in begun if not one.complete]
        return next((one.folder for one in (*working, *reversed(begun))), None)
    if status.kind == "sweep":
        files = open_files(status.folder)
        times = {name: max((one.modified for one in files.entries(f"pilots/{name}/data").values()), default=0.0)
                 for name in sorted(files.list("pilots"))[:PILOTS_SEARCHED]}
        latest = max(times, key=lambda name: times[name], default=None)
        return f"{status.folder.rstrip('/')}/pilots/{latest}" if latest is not None and times[latest] else None
    return None


def tiles(status: Any) -> list[tuple[str, str, str]]:
    """(number, what it is, colour's class or "")."""
    works = status.complete or any(one.state == "running" for one in status.drivers)
    eta = ("none" if status.complete else duration(status.eta_seconds),
           "time left" if works else "time left, once it runs", "")
    if status.kind == "run":
        counts = [(f"{getattr(status, kind):,}", kind, kind) for kind in ("kept", "rejected", "failed", "pending")]
        rate = status.images_per_second
        return [*counts, ("unknown" if rate is None else f"{rate:,.3g}", "images per second", ""), eta, *_alive(status)]
    if status.kind == "loop":
        counts = [(f"{getattr(status, kind):,}", kind, kind) for kind in ("kept", "rejected", "failed", "pending")]
        return [*counts, (f"{status.left:,}", "not dealt", ""), eta, *_alive(status)]
    if status.kind == "sweep":
        best = "none" if status.best is None else f"{100 * status.best['score']:.1f} %"
        return [(best, "best so far", ""), (f"{sum(status.trials.values()):,}", "trials with a result", "kept"),
                (f"{status.running:,}", "running", ""), (f"{status.failed:,}", "failed", "failed"),
                (f"{status.pending:,}", "pending", "pending"), eta]
    study = status if status.kind == "study" else getattr(status, "study", None)
    if study is not None:
        return [*((f"{getattr(study, kind):,}", f"trials {kind}", colour) for kind, colour in (
            ("done", "kept"), ("running", ""), ("failed", "failed"), ("pending", "pending"))), eta, *_alive(status)]
    return [eta]


def _alive(status: Any) -> list[tuple[str, str, str]]:
    """Actors and nodes, where a living driver has said so."""
    facts: Mapping[str, float] = next((one.beat.facts for one in status.drivers if one.state == "running"), {})
    return [(f"{facts[name]:,.0f}", f"{name} alive", "") for name in ("actors", "nodes") if name in facts]


def bars(status: Any) -> list[Bar]:
    """One for each run, training and group of trials."""
    if status.kind == "run":
        return [_run_bar(status.name, status)]
    if status.kind == "loop":
        return [_run_bar(name, one.run.status, one.words) if one.run.status is not None else Bar(name, (), one.words)
                for one in status.rounds for name in (f"round {one.decision.round}",)]
    found = []
    fits = status if status.kind == "fit" else getattr(status, "fits", None)
    for part in fits.parts if fits is not None else ():
        share = 1.0 if part.done else part.step / part.total if part.total else 0.0
        found.append(Bar(part.folder, ((share, "kept"),), part.words))
    study = status if status.kind == "study" else getattr(status, "study", None)
    for one in study.runs if study is not None else ():
        found.append(Bar(one.name, (), one.words) if one.status is None else _run_bar(one.name, one.status, one.words))
    if study is not None and study.trials:
        found.append(Bar("trials", tuple((count / study.trials, colour) for count, colour in (
            (study.done, "kept"), (study.running, "s0"), (study.failed, "failed"))),
            f"{study.done:,} of {study.trials:,} done"))
    if status.kind == "sweep":
        decided = sum(status.trials.values())
        colours = {"finished": "kept", "stopped": "rejected", "diverged": "failed"}
        found.append(Bar("suggestions", (
            *((count / max(status.suggestions, decided), colours.get(state, "grey"))
              for state, count in status.trials.items()), (status.running / status.suggestions, "s0")),
            ", ".join(f"{count:,} {state}" for state, count in status.trials.items()) or "none is over"))
    return found


def _run_bar(name: str, run: Any, words: str = "") -> Bar:
    parts = tuple((getattr(run, kind) / run.planned, kind) for kind in ("kept", "rejected", "failed"))
    return Bar(name, parts, words or f"{run.shards_done:,} of {run.shards:,} shards")


def throughput(spans: Sequence[tuple[float, float, int]], now: float) -> Throughput | None:
    """Rows of each shard spread evenly over the time it took. None before the first timed commit."""
    if not spans:
        return None
    begin, end = min(end - seconds for end, seconds, _ in spans), max(spans[-1][0], now)
    if spans[-1][0] < now - 10 * (spans[-1][0] - begin):
        end = spans[-1][0]  # over for long: what was, not the nothing since
    step = max((end - begin) / BUCKETS, 1e-9)
    rows = [0.0] * BUCKETS
    for stop, seconds, count in spans:
        first, last = (stop - seconds - begin) / step, (stop - begin) / step
        for i in range(max(0, math.floor(first)), min(BUCKETS, math.ceil(last))):
            rows[i] += count * (min(last, i + 1) - max(first, i)) / max(last - first, 1e-9)
    return Throughput(tuple(one / step for one in rows), begin, end)


def _reasons(view: RunView) -> list[tuple[str, str, int, float]]:
    """(reason, status, rows, share of the refused rows)."""
    total = sum(view.reasons.values())
    return [(reason, Reason(reason).status.value, rows, rows / total) for reason, rows in view.reasons.items()]


def _sheet(status: Any) -> Picture | None:
    """The latest sample grid of a fine-tuning under way."""
    if status.kind != "fit" or is_url(status.folder):
        return None
    found = sorted(Path(status.folder).glob(".*.work/sheets/step-*.png"), key=lambda one: one.name)
    if not found:
        return None
    step = re.findall(r"\d+", found[-1].stem)[-1]
    try:
        with Image.open(found[-1]) as image:
            return picture_of(image.convert("RGB"), f"samples at step {int(step):,}")
    except (OSError, ValueError):
        return None


def failed_page(folder: str, error: str) -> str:
    """The page of a folder that cannot be read now."""
    return render("unread.html.j2", _FILTERS, folder=folder, error=error, refresh=REFRESH_S, now=time.time())


def _clock(unix: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(unix))


_FILTERS = {"number": lambda n: f"{n:,}", "percent": lambda share: f"{100 * share:.1f} %", "duration": duration,
            "clock": _clock}
