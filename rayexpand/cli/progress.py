"""What a verb shows while it works, on stderr: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from rayexpand.api.results import Event


class Progress:
    """A bar on a terminal; elsewhere a line every 30 seconds and one for each new task, as JSON if asked. On stderr."""

    QUIET_S = 30

    def __init__(self, as_json: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                             console=console) if console.is_terminal and not as_json else None
        self._as_json = as_json
        self._tasks: dict[str, Any] = {}
        self._begun: dict[str, tuple[float, int]] = {}
        self._spoken = ("", 0.0)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __call__(self, event: Event) -> None:
        task, done, total, facts = event.task, event.done, event.total, event.facts
        now = time.monotonic()
        at, first = self._begun.setdefault(task, (now, done))
        rate = (done - first) / (now - at) if now - at > 1 and done > first else 0.0
        if self._bar:
            known = [f"{n:,} {what}" for what, n in facts.items()]
            words = [task, *([f"{rate:,.1f}/s"] if rate else []), *known]
            if task not in self._tasks:
                self._tasks[task] = self._bar.add_task(task, total=total)
            self._bar.update(self._tasks[task], completed=done, total=total, description=", ".join(words))
            return
        last_task, last_time = self._spoken
        if task != last_task or now - last_time >= self.QUIET_S:
            self._spoken = (task, now)
            print(self._line(task, done, total, rate, facts), file=sys.stderr, flush=True)

    def _line(self, task: str, done: int, total: int, rate: float, facts: Mapping[str, int]) -> str:
        left = round((total - done) / rate) if rate else None
        if self._as_json:
            return json.dumps({"time": round(time.time(), 1), "task": task, "done": done, "total": total,
                               "per_second": round(rate, 2), "eta_seconds": left, **facts})
        words = [f"{task}: {done:,}/{total:,}", *([f"{rate:,.1f}/s", f"{left:,} s left"] if rate else []),
                 *(f"{n:,} {what}" for what, n in facts.items())]
        return ", ".join(words)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
