"""Who works in a folder, and when that was known last: one small file for each start of a verb.

    <folder>/heartbeats/<verb>-<name>~<host>~<pid>~<start>.json

The process that drives a verb writes it every INTERVAL_S seconds, also where nothing else happens, and once more when
it ends. Whoever sees the folder knows from it whether somebody works there, on which step, and since when nobody does.
Times are those of the driver's clock; on other machines ages are as right as the clocks agree.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

from rayexpand import __version__
from rayexpand.contract.errors import EXIT_DONE, EXIT_FAULT, EXIT_RESUMABLE, DamagedFile, EnvironmentFault, StorageError
from rayexpand.contract.log_lines import bind
from rayexpand.contract.metrics import ATTEMPT, HEARTBEAT, record
from rayexpand.contract.secrets import masked
from rayexpand.storage.files import Files, each, process_token, token_alive
from rayexpand.storage.tables import read_json, replace_json

INTERVAL_S = 8.0  # one request of an object store
GAP_S = 1.0  # between two of them, also where tasks change quickly
SILENT_S = 20.0  # a driver not heard of for so long is taken for dead: 12 to 20 s after its death
FOLDER = "heartbeats"

log = logging.getLogger(__name__)

State = Literal["running", "silent", "ended"]


@dataclass(frozen=True, slots=True)
class Beat:
    """What a driver said last. Times in unix seconds."""

    verb: str
    name: str  # of the run, study, sweep, ...
    host: str
    pid: int
    token: str
    attempt: int | None  # which start of this verb and name it is, from 1
    started: float
    time: float
    task: str = ""  # what it works on, with how much of that is done
    done: int = 0
    total: int = 0
    per_second: float | None = None
    facts: Mapping[str, float] = field(default_factory=dict)
    version: str = ""
    exit_code: int | None = None  # once it has ended
    said: str = ""  # what ended it, where that was no success


@dataclass(frozen=True, slots=True)
class DriverSeen:
    """A driver at one moment."""

    beat: Beat
    state: State
    age_seconds: float  # since its last heartbeat, or since its end

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self.beat), "state": self.state, "age_seconds": self.age_seconds}

    @property
    def words(self) -> str:
        """One line for people."""
        beat = self.beat
        where = f"{beat.verb} {beat.name}, attempt {beat.attempt}"
        if self.state == "running":
            return (f"{where}: running on {beat.host} (pid {beat.pid}) since {moment(beat.started)}, heartbeat "
                    f"{self.age_seconds:.0f} s ago")
        if self.state == "silent":
            gone = "" if _alive_here(beat.token) is not False else ", and its process is gone"
            return f"{where}: no heartbeat since {moment(beat.time)} on {beat.host} (pid {beat.pid}){gone}"
        ended = "done" if beat.exit_code == EXIT_DONE else f"exit code {beat.exit_code}: {beat.said}"
        return f"{where}: ended on {beat.host} at {moment(beat.time)}, {ended}"

    @property
    def task(self) -> str:
        """What it worked on last, in words."""
        beat = self.beat
        return f"{beat.task}: {beat.done:,}/{beat.total:,}" if beat.total else beat.task


def moment(when: float) -> str:
    """2026-11-30 10:12:33 UTC."""
    return f"{datetime.fromtimestamp(when, UTC):%Y-%m-%d %H:%M:%S} UTC"


def drivers_in(files: Files, problems: list[str], now: float | None = None) -> list[DriverSeen]:
    """Those that work in a folder or did last, running ones first, then the latest. A file that is damaged leaves a
    line in `problems`."""
    def one(name: str) -> Beat | None:
        try:
            found = read_json(files, f"{FOLDER}/{name}")
            return None if found is None else Beat(**found)
        except DamagedFile as error:
            problems.append(str(error))
        except TypeError:
            problems.append(f"{files.at(f'{FOLDER}/{name}')}: is of another version, or damaged")
        return None

    now = time.time() if now is None else now
    names = sorted(name for name in files.list(FOLDER) if name.endswith(".json"))
    beats = [beat for beat in each(files, one, names) if beat is not None]
    return sorted((_seen(beat, now) for beat in beats),
                  key=lambda one: (("running", "silent", "ended").index(one.state), -one.beat.time))


def _seen(beat: Beat, now: float) -> DriverSeen:
    age = max(0.0, now - beat.time)
    if beat.exit_code is not None:
        return DriverSeen(beat, "ended", age)
    silent = age > SILENT_S or _alive_here(beat.token) is False
    return DriverSeen(beat, "silent" if silent else "running", age)


def _alive_here(token: str) -> bool | None:
    """Whether the process runs; None for one of another host."""
    return token_alive(token) if token.split("~", 1)[0] == socket.gethostname() else None


class Heartbeat:
    """Of this process while it drives a verb. `attempt`: None counts the starts of this verb and name. `lazily`:
    nothing is written before `say` is called, for a verb that first has to find out whether it can work at all.

    A folder that takes no heartbeat costs a warning and never the work.
    """

    def __init__(self, files: Files, verb: str, name: str, *, attempt: int | None = None, lazily: bool = False,
                 clock: Callable[[], float] = time.time) -> None:
        self._folders, self._clock, self._lazily = [files], clock, lazily
        self._ending: dict[str, Any] = {"exit_code": EXIT_DONE, "said": ""}
        self._said: dict[str, Any] = {
            "verb": verb, "name": name, "host": socket.gethostname(), "pid": os.getpid(), "token": process_token(),
            "attempt": attempt, "started": clock(), "version": __version__}
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._ended, self._news = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")
        self._begun = self._warned = False

    def say(self, task: str, done: int, total: int, facts: Mapping[str, float] | None = None,
            rate: float | None = None) -> None:
        """What the driver works on; the next heartbeat has it, and a new task does not wait for that."""
        with self._lock:
            if task != self._said.get("task"):
                self._news.set()
            self._said |= {"task": task, "done": done, "total": total, "facts": dict(facts or {}),
                           "per_second": rate}
        self._begin()

    def ends_with(self, exit_code: int, said: str) -> None:
        """How the verb ends, where it raises nothing."""
        with self._lock:
            self._ending = {"exit_code": exit_code, "said": said}

    @contextlib.contextmanager
    def also_in(self, files: Files) -> Iterator[None]:
        """Beats in another folder too: that of a run which a study makes."""
        self._tidy(files)
        self._folders.append(files)
        self._write(files)
        try:
            yield
        finally:
            with self._writing, self._guarded():  # nothing is written after it
                self._folders.remove(files)
                files.delete(_file(Beat(**self._said, time=0.0)))

    def __enter__(self) -> Heartbeat:
        if not self._lazily:
            self._begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._ended.set()
        self._news.set()
        if not self._begun:
            return
        self._thread.join(timeout=INTERVAL_S)
        with self._lock:
            self._said |= self._ending if error is None else _ending_of(error)
        self._beat()

    def _begin(self) -> None:
        with self._lock:
            if self._begun:
                return
            self._begun = True
        before = self._tidy(self._folders[0])
        with self._lock:
            self._said["attempt"] = self._said["attempt"] or 1 + before
        bind(run=self._said["name"], attempt=self._said["attempt"])
        self._beat()
        self._thread.start()

    def _tidy(self, files: Files) -> int:
        """Takes the heartbeats of ended starts of this verb and name away; the number of the last start, 0 without."""
        with self._guarded():
            for folder in (FOLDER, ".tmp"):
                files.make_folder(folder)
            earlier = [one for one in drivers_in(files, []) if (one.beat.verb, one.beat.name)
                       == (self._said["verb"], self._said["name"])]
            if ended := [_file(one.beat) for one in earlier if one.state != "running"]:
                files.delete(*ended)
            return max((one.beat.attempt or 0 for one in earlier), default=0)
        return 0

    def _run(self) -> None:
        while not self._ended.wait(GAP_S):
            self._news.wait(INTERVAL_S - GAP_S)
            self._news.clear()
            self._beat()

    def _beat(self) -> None:
        record(HEARTBEAT, self._clock(), verb=self._said["verb"])
        record(ATTEMPT, self._said["attempt"], verb=self._said["verb"])
        for files in list(self._folders):
            self._write(files)

    def _write(self, files: Files) -> None:
        with self._lock:
            beat = Beat(**self._said, time=self._clock())
        with self._writing, self._guarded():
            if files in self._folders:
                replace_json(files, _file(beat), asdict(beat))

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EnvironmentFault, StorageError) as error:
            if not self._warned:
                self._warned = True
                log.warning("no heartbeat can be written, so `rayexpand status` does not see this driver (%s); the "
                            "work goes on", error)


def _ending_of(error: BaseException) -> dict[str, Any]:
    code = EXIT_RESUMABLE if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", EXIT_FAULT)
    said = masked(str(error).strip().partition("\n")[0][:500]) or type(error).__name__
    return {"exit_code": code, "said": said}


def _file(beat: Beat) -> str:
    verb, name = (re.sub(r"[^A-Za-z0-9._-]", "-", one)[:80] for one in (beat.verb, beat.name))
    return f"{FOLDER}/{verb}-{name}~{beat.token}.json"
