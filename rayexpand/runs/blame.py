"""Which sampler call, or which row, was running when a process died, and whether the row is to blame for that.

A marker file is written before each call and removed after it. A marker whose process is dead blames that call. Two
dead processes at one call: its rows are run one by one, each with a row marker.

A death is *seen* where the process itself left a trace of it: a fatal signal (segmentation fault, bus error, abort), a
deadline, a ProcessFault. Two seen deaths at one row refuse it, as `timeout` if a deadline was among them, else as
`actor_died`. Of a death that nobody saw, one cannot tell a row that ends its process (os._exit, a host out of memory)
from a kill from outside: a lost machine, a job slot that is over. It counts only where it repeats at a row while others
were made alone by the same processes before, and where it also happened with that row tried first; what was made alone
after such a death is cleared for good. So kills from outside do not add up to a refused row, not even those that come
after the same time again and again.

A whole shard is marked as well, for a death can come from outside a sampler call: a decoder that crashes on a seed, an
encoder, the commit. After two deaths its seeds are decoded and its samples encoded one by one under row markers.

A process that ended with its machine says nothing at all of what it did. Where somebody can tell (`lost`; on Ray,
on_ray/expand.py), its markers count as none, unless MANY_LOST machines were lost at one shard: then it may be the shard
that takes them down, and their ends are deaths that nobody saw. A process that leaves a machine in time takes its
markers with it.

Traces are written by faulthandler into a local folder that outlives the process, one file per process and run: by its
handler of fatal signals, and by its watchdog thread, which ends the process at a deadline even while a C extension
holds the GIL. While a process runs, its trace says that it runs. Only processes of the same host can look it up, so a
death on another host is one that nobody saw.
"""

from __future__ import annotations

import faulthandler
import hashlib
import os
import socket
import stat
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from rayexpand.contract.errors import EnvironmentFault, Interrupted
from rayexpand.contract.schema import Reason
from rayexpand.storage.files import Files, token_alive

DEAD_CALLS = 2  # dead processes at one call before its rows run one by one
DEAD_ROWS = 2  # deaths at one row that tell something before it is refused
DEAD_SHARDS = 2  # dead processes at one shard, wherever, before its seeds are decoded one by one
DEAD_UNEXPLAINED = 6  # dead processes that tell nothing of a call or row of their shard, before it is given up for now
MANY_LOST = 12  # machines lost at one shard before that counts as deaths that nobody saw
SHARD, DECODE, ENCODE = -1, -2, -3  # in the place of a call number: the whole shard, and work on one row outside calls
SOUND = "sound"

Row = tuple[int, int]  # row, attempt of its draw


class ProcessFault(Interrupted):
    """This process cannot go on (sticky CUDA error, host out of memory). Its marker stays and blames the call."""


@dataclass(slots=True)
class Suspect:
    """Deaths at one row while it was worked on alone."""

    seen: list[Reason] = field(default_factory=list)
    first: int = 0  # nobody saw it, and the row was the first that its process made of the call
    later: int = 0  # nobody saw it, and others had been made alone before
    sound: bool = False  # made alone since

    def reason(self, call: int) -> Reason | None:
        """Why the row is refused, None where the deaths do not show that it is to blame. What is encoded has been
        sampled by the same process, so it never comes first."""
        if len(self.seen) >= DEAD_ROWS:
            return Reason.TIMEOUT if Reason.TIMEOUT in self.seen else Reason.ACTOR_DIED
        repeats = self.later >= DEAD_ROWS and (self.first > 0 or (call == ENCODE and self.later > DEAD_ROWS))
        return Reason.ACTOR_DIED if repeats and not self.sound else None

    @property
    def turn(self) -> tuple[int, int]:
        """Its place among rows made one by one, where (1, 0) is that of a row without deaths: first where it was never
        tried first, else after all others."""
        deaths = len(self.seen) + self.first + self.later
        return (2, 0) if self.sound else (0, deaths) if self.later and not self.first else (3, deaths)


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What the dead say about one shard."""

    careful: bool  # decode and encode row by row, each under a marker of its own
    unexplained: int  # processes that died at the shard and tell nothing of a call or row of it
    calls: frozenset[int]  # run these row by row
    suspects: dict[tuple[int, Row], Suspect]  # by call and row
    rows: dict[Row, Reason]  # refuse these
    seeds: dict[int, Reason]  # first row of a seed whose decoding ended processes: refuse all its rows

    def turn(self, call: int, row: Row) -> tuple[int, int]:
        """Sort key of a row among those made one by one."""
        suspect = self.suspects.get((call, row))
        return suspect.turn if suspect else (1, 0)


class Blame:
    """Markers in blame/ of a run, as `<shard key>@<call>@<who>@<attempt>@<process token>`; who is `all`, or
    `<row>.<attempt of its draw>.<others made alone before>`, or `<row>.<attempt of its draw>.sound`."""

    def __init__(self, files: Files, token: str, attempt: int,
                 lost: Callable[[set[str]], set[str]] = lambda tokens: set()) -> None:
        """`lost`: which of these processes ended with their machine, as far as that is known."""
        self.files, self.token, self.attempt, self._lost = files, token, attempt, lost
        self._trace: IO[str] | None = None

    def verdicts(self, shard_key: str) -> Verdicts:
        calls: Counter[int] = Counter()
        suspects: dict[tuple[int, Row], Suspect] = defaultdict(Suspect)
        shard: set[str] = set()
        telling: set[str] = set()
        cleared: set[tuple[int, Row]] = set()
        markers = [name.split("@", 4) for name in self.files.list("blame", f"{shard_key}@")]
        dead = {token for _, _, who, attempt, token in markers if not who.endswith(SOUND)
                and self._dead(int(attempt), token)}
        lost = self._lost(dead) if dead else set()
        if len(lost) < MANY_LOST:
            dead -= lost
        for _, text, who, _, token in markers:
            call = int(text)
            if who.endswith(SOUND):
                cleared.add((call, _row(who)))
            elif token not in dead:
                continue
            elif call == SHARD:
                shard.add(token)
            elif who == "all":
                calls[call] += 1
                if calls[call] <= DEAD_CALLS:
                    telling.add(token)
            else:
                calls[call] = max(calls[call], DEAD_CALLS)
                suspect, others = suspects[call, _row(who)], who.split(".")[2:]
                if reason := self._seen(token):
                    suspect.seen.append(reason)
                elif others and int(others[0]):
                    suspect.later += 1
                else:
                    suspect.first += 1
                if reason or suspect.first == 1 or suspect.later:
                    telling.add(token)
        for key in cleared & suspects.keys():
            suspects[key].sound = True
        refused = {(call, row): why for (call, row), suspect in suspects.items() if (why := suspect.reason(call))}
        return Verdicts(
            careful=len(shard) >= DEAD_SHARDS, unexplained=len(shard - telling),
            calls=frozenset(call for call, dead in calls.items() if dead >= DEAD_CALLS), suspects=dict(suspects),
            rows={row: why for (call, row), why in refused.items() if call != DECODE},
            seeds={row: why for (call, (row, _)), why in refused.items() if call == DECODE})

    @contextmanager
    def supervised(self) -> Iterator[None]:
        """While the block runs, a fatal signal of this process leaves a trace."""
        before = faulthandler.is_enabled()
        faulthandler.enable(self._open_trace())
        try:
            yield
        finally:
            faulthandler.disable()
            if before:
                faulthandler.enable(2)

    @contextmanager
    def watch(self, shard_key: str, call: int, row: Row | None, deadline_s: float, others: int = 0) -> Iterator[None]:
        """Marks a call (or one row of it) as running, and ends the process if it outlasts `deadline_s`."""
        with self.mark(shard_key, call, row, others):
            faulthandler.dump_traceback_later(deadline_s, exit=True, file=self._open_trace())
            try:
                yield
            finally:
                faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def mark(self, shard_key: str, call: int, row: Row | None, others: int = 0) -> Iterator[None]:
        """Marks work as running; `others`: rows that this process made alone before this one. The marker stays when the
        process dies, or raises ProcessFault."""
        marker = self._marker(shard_key, call, "all" if row is None else f"{row[0]}.{row[1]}.{others}")
        self.files.mark(marker)
        try:
            yield
        except ProcessFault as fault:
            print(f"ProcessFault: {fault}", file=self._open_trace(), flush=True)
            raise
        except BaseException:
            self.files.delete(marker)
            raise
        else:
            self.files.delete(marker)

    def clear_suspect(self, shard_key: str, call: int, row: Row) -> None:
        """A row at which processes died was made alone: deaths that nobody saw do not count against it."""
        self.files.mark(self._marker(shard_key, call, f"{row[0]}.{row[1]}.{SOUND}"))

    def _marker(self, shard_key: str, call: int, who: str) -> str:
        return "blame/" + "@".join([shard_key, str(call), who, str(self.attempt), self.token])

    def clear(self, shard_key: str) -> None:
        """Forgets the dead of a committed shard."""
        dead = []
        for name in self.files.list("blame", f"{shard_key}@"):
            _, _, who, attempt, token = name.split("@", 4)
            if who.endswith(SOUND) or self._dead(int(attempt), token):
                dead.append(f"blame/{name}")
        if dead:
            self.files.delete(*dead)
            self.sweep()

    def withdraw(self) -> None:
        """Takes back every marker of this process, which ends now and is to blame nothing for that."""
        if mine := [f"blame/{name}" for name in self.files.list("blame") if name.endswith(f"@{self.token}")
                    and not name.split("@", 4)[2].endswith(SOUND)]:
            self.files.delete(*mine)

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
            if not self._seen(self.token):
                self._trace_path(self.token).unlink(missing_ok=True)
            self._trace = None

    def _dead(self, attempt: int, token: str) -> bool:
        # A marker from another host is dead once a shard came to this process: within one attempt a shard runs in
        # one place at a time, and an older attempt was replaced.
        if token.split("~", 1)[0] != socket.gethostname():
            return attempt <= self.attempt
        return not token_alive(token)

    def _seen(self, token: str) -> Reason | None:
        """How a process ended, as far as it left a trace of that."""
        try:
            found = self._trace_path(token).read_text(errors="replace")
        except OSError:
            return None
        if not found:
            return None
        return Reason.TIMEOUT if found.startswith("Timeout") else Reason.ACTOR_DIED

    def _open_trace(self) -> IO[str]:
        if self._trace is None:
            self._trace = open(self._trace_path(self.token), "w")  # noqa: SIM115  (open while the process lives)
        return self._trace

    def _trace_path(self, token: str) -> Path:
        return trace_folder(self.files) / f"{token}.trace"


def _row(who: str) -> Row:
    row, attempt = who.split(".")[:2]
    return int(row), int(attempt)


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
    """Sampler processes of a run alive on this host: each keeps a trace from its first shard to its end."""
    return sum(token_alive(path.stem) for path in trace_folder(files).glob("*.trace"))
