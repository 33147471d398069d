"""How far a training is, in the folder of its unfinished work, for whoever looks at that folder meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

POSITION = "position.json"
EVERY_S = 2.0  # between two writes


class Position:
    """Writes position.json: task, step, total, `begun` and `time` (unix seconds), the step of this start, and numbers
    such as the loss. A disk that takes no file costs nothing here; what matters more will say so."""

    def __init__(self, folder: Path | str) -> None:
        self._folder = Path(folder)
        self._task, self._begun, self._first, self._written = "", 0.0, 0, 0.0

    def __call__(self, task: str, step: int, total: int,
                 numbers: Callable[[], Mapping[str, float]] = dict) -> None:
        """`numbers` is asked only when they are written: a loss on a GPU is waited for."""
        now = time.time()
        if task != self._task:
            self._task, self._begun, self._first = task, now, step
        elif step < total and now - self._written < EVERY_S:
            return
        self._written = now
        said = {"task": task, "step": step, "total": total, "first": self._first, "begun": self._begun, "time": now,
                "numbers": {name: float(value) for name, value in numbers().items()}}
        write_position(self._folder, said)

    def remove(self) -> None:
        (self._folder / POSITION).unlink(missing_ok=True)


def write_position(folder: Path, said: Mapping[str, Any]) -> None:
    """Position's file, of what it or `read_position` on another machine gave."""
    partial = folder / f".{POSITION}.{os.getpid()}"
    with contextlib.suppress(OSError):
        partial.write_text(json.dumps(said))
        os.replace(partial, folder / POSITION)


def read_position(folder: Path | str) -> dict[str, Any] | None:
    """What `Position` wrote last; None where there is nothing, or nothing that can be read."""
    try:
        found = json.loads((Path(folder) / POSITION).read_text())
    except (OSError, ValueError):
        return None
    known = ("task", "step", "total", "first", "begun", "time", "numbers")
    return found if isinstance(found, dict) and all(name in found for name in known) else None
