"""Which sampler call, or which row, was running when a process died.

A marker file is written before each call and removed after it. A marker whose process is dead blames that call. Two
dead processes at one call: its rows are run one by one, each with a row marker; two more dead at one row: that row is
refused, as `timeout` if a deadline ended the last process, else as `actor_died`. A preempted shard leaves one marker
at a random place, so lost machines never add up to a poisoned row.

The deadline uses faulthandler's watchdog thread, which ends the process even while a C extension holds the GIL.
"""

from __future__ import annotations

import faulthandler
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rayexpand.errors import Interrupted
from rayexpand.schema import Reason
from rayexpand.store import token_alive

DEAD_CALLS = 2  # dead processes at one call before its rows run one by one
DEAD_ROWS = 2  # dead processes at one row before it is refused


class ProcessFault(Interrupted):
    """This process cannot go on (sticky CUDA error, host out of memory). Its marker stays and blames the call."""


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What the dead say about one shard."""

    calls: frozenset[int]  # run these row by row
    rows: dict[int, Reason]  # refuse these


class Blame:
    def __init__(self, folder: Path, token: str, attempt: int) -> None:
        self.folder, self.token, self.attempt = folder, token, attempt
        self._trace: IO[str] | None = None

    def verdicts(self, shard_key: str) -> Verdicts:
        calls: dict[int, int] = {}
        rows: dict[int, list[str]] = {}
        for path in self.folder.glob(f"{shard_key}@*"):
            _, call, row, attempt, token = path.name.split("@", 4)
            if not self._dead(int(attempt), token):
                continue
            if row == "all":
                calls[int(call)] = calls.get(int(call), 0) + 1
            else:
                rows.setdefault(int(row), []).append(token)
                calls[int(call)] = DEAD_CALLS
        refused = {row: self._reason(tokens) for row, tokens in rows.items() if len(tokens) >= DEAD_ROWS}
        return Verdicts(frozenset(c for c, n in calls.items() if n >= DEAD_CALLS), refused)

    @contextmanager
    def watch(self, shard_key: str, call: int, row: int | None, deadline_s: float) -> Iterator[None]:
        """Marks a call (or one row of it) as running, and ends the process if it outlasts `deadline_s`."""
        who = "all" if row is None else str(row)
        marker = self.folder / "@".join([shard_key, str(call), who, str(self.attempt), self.token])
        marker.touch()
        if self._trace is None:
            self._trace = open(self._trace_path(self.token), "w")  # noqa: SIM115  (open for the life of the process)
        faulthandler.dump_traceback_later(deadline_s, exit=True, file=self._trace)
        try:
            yield
        except ProcessFault:
            raise
        except BaseException:
            marker.unlink(missing_ok=True)
            raise
        else:
            marker.unlink(missing_ok=True)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def clear(self, shard_key: str) -> None:
        """Forgets the dead of a committed shard."""
        for path in self.folder.glob(f"{shard_key}@*"):
            _, _, _, attempt, token = path.name.split("@", 4)
            if self._dead(int(attempt), token):
                path.unlink(missing_ok=True)
        self.sweep()

    def sweep(self) -> None:
        """Removes traces of dead processes that no marker needs any more."""
        needed = {path.name.split("@", 4)[4] for path in self.folder.glob("*@*")}
        for path in self.folder.glob("*.trace"):
            if path.stem not in needed and not token_alive(path.stem):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._trace is not None:
            self._trace.close()
            self._trace_path(self.token).unlink(missing_ok=True)
            self._trace = None

    def _dead(self, attempt: int, token: str) -> bool:
        # A marker from another host is dead once a shard came to this process: within one attempt a shard runs in
        # one place at a time, and an older attempt was replaced.
        if token.split("~", 1)[0] != socket.gethostname():
            return attempt <= self.attempt
        return not token_alive(token)

    def _reason(self, tokens: list[str]) -> Reason:
        traces = [self._trace_path(token) for token in tokens]
        timed_out = any(path.exists() and path.stat().st_size for path in traces)
        return Reason.TIMEOUT if timed_out else Reason.ACTOR_DIED

    def _trace_path(self, token: str) -> Path:
        return self.folder / f"{token}.trace"
