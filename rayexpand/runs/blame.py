"""Which sampler call, or which row, was running when a process died.

A marker file is written before each call and removed after it. A marker whose process is dead blames that call. Two
dead processes at one call: its rows are run one by one, each with a row marker; two more dead at one row: that row is
refused, as `timeout` if a deadline ended the last process, else as `actor_died`. A preempted shard leaves one marker
at a random place, so lost machines never add up to a poisoned row.

A whole shard is marked as well, for a death can come from outside a sampler call: a decoder that crashes on a seed, an
encoder, the commit. After two deaths its seeds are decoded and its samples encoded one by one under row markers.

The deadline uses faulthandler's watchdog thread, which ends the process even while a C extension holds the GIL. It
writes a stack trace into a local folder that outlives the process, one file per process and run: that file tells
`timeout` from `actor_died`, and while its process runs, that it runs. Only processes of the same host can look it up.
"""

from __future__ import annotations

import faulthandler
import hashlib
import os
import socket
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rayexpand.contract.errors import EnvironmentFault, Interrupted
from rayexpand.contract.schema import Reason
from rayexpand.storage.files import Files, token_alive

DEAD_CALLS = 2  # dead processes at one call before its rows run one by one
DEAD_ROWS = 2  # dead processes at one row before it is refused
DEAD_SHARDS = 2  # dead processes at one shard, wherever, before its seeds are decoded one by one
DEAD_UNEXPLAINED = 6  # dead processes that blame neither a call nor a row of their shard, before it is given up for now
SHARD, DECODE, ENCODE = -1, -2, -3  # in the place of a call number: the whole shard, and work on one row outside calls


class ProcessFault(Interrupted):
    """This process cannot go on (sticky CUDA error, host out of memory). Its marker stays and blames the call."""


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What the dead say about one shard."""

    careful: bool  # decode and encode row by row, each under a marker of its own
    unexplained: int  # processes that died at the shard but at no call or row of it
    calls: frozenset[int]  # run these row by row
    rows: dict[tuple[int, int], Reason]  # (row, attempt of its draw): refuse these
    seeds: dict[int, Reason]  # first row of a seed whose decoding ended processes: refuse all its rows


class Blame:
    """Markers in blame/ of a run, as `<shard key>@<call>@<row or all>@<attempt>@<process token>`."""

    def __init__(self, files: Files, token: str, attempt: int) -> None:
        self.files, self.token, self.attempt = files, token, attempt
        self._trace: IO[str] | None = None

    def verdicts(self, shard_key: str) -> Verdicts:
        calls: Counter[int] = Counter()
        at_row: dict[tuple[int, int, int], list[str]] = {}  # call, row, attempt of its draw
        shard: set[str] = set()
        explained: set[str] = set()
        for name in self.files.list("blame", f"{shard_key}@"):
            _, call, row, attempt, token = name.split("@", 4)
            if not self._dead(int(attempt), token):
                continue
            if int(call) == SHARD:
                shard.add(token)
                continue
            explained.add(token)
            if row == "all":
                calls[int(call)] += 1
            else:
                number, _, redraw = row.partition(".")
                at_row.setdefault((int(call), int(number), int(redraw)), []).append(token)
                calls[int(call)] = DEAD_CALLS
        refused = {key: self._reason(tokens) for key, tokens in at_row.items() if len(tokens) >= DEAD_ROWS}
        return Verdicts(
            careful=len(shard) >= DEAD_SHARDS, unexplained=len(shard - explained),
            calls=frozenset(call for call, dead in calls.items() if dead >= DEAD_CALLS),
            rows={(row, redraw): reason for (call, row, redraw), reason in refused.items() if call != DECODE},
            seeds={row: reason for (call, row, _), reason in refused.items() if call == DECODE})

    @contextmanager
    def watch(self, shard_key: str, call: int, row: tuple[int, int] | None, deadline_s: float) -> Iterator[None]:
        """Marks a call (or one row of it) as running, and ends the process if it outlasts `deadline_s`."""
        with self.mark(shard_key, call, row):
            if self._trace is None:
                self._trace = open(self._trace_path(self.token), "w")  # noqa: SIM115  (open while the process lives)
            faulthandler.dump_traceback_later(deadline_s, exit=True, file=self._trace)
            try:
                yield
            finally:
                faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def mark(self, shard_key: str, call: int, row: tuple[int, int] | None) -> Iterator[None]:
        """Marks work as running. The marker stays when the process dies, or raises ProcessFault."""
        who = "all" if row is None else f"{row[0]}.{row[1]}"
        marker = "blame/" + "@".join([shard_key, str(call), who, str(self.attempt), self.token])
        self.files.mark(marker)
        try:
            yield
        except ProcessFault:
            raise
        except BaseException:
            self.files.delete(marker)
            raise
        else:
            self.files.delete(marker)

    def clear(self, shard_key: str) -> None:
        """Forgets the dead of a committed shard."""
        dead = []
        for name in self.files.list("blame", f"{shard_key}@"):
            _, _, _, attempt, token = name.split("@", 4)
            if self._dead(int(attempt), token):
                dead.append(f"blame/{name}")
        if dead:
            self.files.delete(*dead)
            self.sweep()

    def sweep(self) -> None:
        """Removes traces of dead processes that no marker needs any more."""
        traces = [path for path in trace_folder(self.files).glob("*.trace") if not token_alive(path.stem)]
        if traces:
            needed = {name.split("@", 4)[4] for name in self.files.list("blame") if "@" in name}
            for path in traces:
                if path.stem not in needed:
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
        return trace_folder(self.files) / f"{token}.trace"


def forget_unexplained(files: Files) -> None:
    """Forgets who died at a shard but at no call of it, for a run that ends in order: its next start tries again."""
    if spent := [f"blame/{name}" for name in files.list("blame") if f"@{SHARD}@" in name]:
        files.delete(*spent)


def trace_folder(files: Files) -> Path:
    """The folder of this host and user for traces of a run. Raises EnvironmentFault if it is somebody else's."""
    user = Path(tempfile.gettempdir(), f"rayexpand-traces-{os.getuid()}")
    user.mkdir(mode=0o700, exist_ok=True)
    found = user.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise EnvironmentFault(f"{user} is not a folder of this user; remove it, or set TMPDIR to another place")
    root = files.root if isinstance(files.root, str) else str(files.root.resolve())
    folder = user / hashlib.sha256(root.encode()).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    return folder


def running_here(files: Files) -> int:
    """Sampler processes of a run alive on this host: each keeps a trace from its first sampler call to its end."""
    return sum(token_alive(path.stem) for path in trace_folder(files).glob("*.trace"))
