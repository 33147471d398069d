"""What a verb shows while it works, on stderr: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Any

from rayexpand.api.results import Event
from rayexpand.contract import log_lines
from rayexpand.contract.errors import three_digits


class Progress:
    """A bar on a terminal; elsewhere a line every 30 seconds and one at the beginning and at the end of each task, as
    JSON if asked. On stderr."""

    QUIET_S = 30

    def __init__(self, as_json: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                             console=console) if console.is_terminal and not as_json else None
        self._as_json = as_json
        self._tasks: dict[str, Any] = {}
        self._begun: dict[str, tuple[float, Event]] = {}
        self._last: dict[str, Event] = {}
        self._spoken = ("", 0.0)
        self._unsaid: tuple[Event, float | None] | None = None

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        last = self._last.get(event.task)
        if last is None or event.done < last.done or event.total != last.total or last.done == last.total:
            self._begun[event.task] = now, event  # also one of that name that begins again
        self._last[event.task] = event
        (at, first), rate = self._begun[event.task], event.rate
        if rate is None and now - at > 1:
            rate = (event.done - first.done) / (now - at)
        if self._bar:
            self._show(self._bar, event, rate)
            return
        last_task, last_time = self._spoken
        if event.task != last_task:
            self._say_rest()
        if event.task != last_task or now - last_time >= self.QUIET_S:
            self._spoken, self._unsaid = (event.task, now), None
            self._say(event, rate)
        else:
            self._unsaid = event, rate

    def _show(self, bar: Any, event: Event, rate: float | None) -> None:
        if event.task not in self._tasks:
            self._tasks[event.task] = bar.add_task(event.task, total=event.total)
        bar.update(self._tasks[event.task], completed=event.done, total=event.total,
                   description=", ".join([event.task, *_how_fast(event, rate), *_counts(event)]))

    def _say_rest(self) -> None:
        """How far the last task came after its last line."""
        if self._unsaid is not None:
            self._say(*self._unsaid)
            self._unsaid = None

    def _say(self, event: Event, rate: float | None) -> None:
        left = round((event.total - event.done) / rate) if rate else None
        if self._as_json:
            line = log_lines.line("progress", task=event.task, done=event.done, total=event.total,
                                  per_second=rate or None, eta_seconds=left, **event.facts)
        else:
            line = ", ".join([f"{event.task}: {event.done:,}/{event.total:,}", *_how_fast(event, rate),
                              *([f"{left:,} s left"] if left else []), *_counts(event)])
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        self._say_rest()
        if self._bar:
            self._bar.stop()


def _how_fast(event: Event, rate: float | None) -> list[str]:
    return [f"{three_digits(rate)}{'/s' if event.rate is None else ' images/s'}"] if rate else []


def _counts(event: Event) -> list[str]:
    return [f"{n:,} {what}" for what, n in event.facts.items()]
