"""stderr as JSON lines of one schema (docs/cli.md), whoever writes to it: this package, a library, C code, a child.

A process beside the command or worker reads what goes to descriptor 2. Lines of this package are passed on with what
they lack of `verb`, `run`, `attempt`, `host`, `pid`; every other line becomes the message of one. It is a process of
its own so that the last words of a process that is killed arrive; the standard library is all this file imports.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal

PATIENCE_S = 5.0  # for a child that outlives the command and still holds its stderr
VARIABLE = "RAYEXPAND_LOG_JSON"  # holds what every line says, as JSON, where lines are JSON; workers inherit it
EVENTS = ("progress", "commit", "failed", "fault", "log", "error")
_BOUND = "\x1e"  # begins what `bind` writes, also in the middle of a line

Event = Literal["progress", "commit", "failed", "fault", "log", "error"]


def bind(**fields: Any) -> None:
    """What every line of this process says from now on; None takes a field away. Without JSON lines: nothing."""
    if VARIABLE not in os.environ:
        return
    known = {**json.loads(os.environ[VARIABLE]), **fields}
    os.environ[VARIABLE] = json.dumps({name: value for name, value in known.items()
                                       if value is not None or name == "attempt"})
    os.write(2, f"{_BOUND}{os.environ[VARIABLE]}\n".encode())


@contextlib.contextmanager
def about(**fields: Any) -> Iterator[None]:
    """Lines inside say these fields too, whichever thread writes them."""
    bind(**fields)
    try:
        yield
    finally:
        bind(**dict.fromkeys(fields))


def say(event: Event, **fields: Any) -> None:
    """One line, where lines are JSON."""
    if VARIABLE in os.environ:
        sys.stderr.write(line(event, **fields) + "\n")
        sys.stderr.flush()


def line(event: Event, **fields: Any) -> str:
    return json.dumps({"time": round(time.time(), 3), "event": event, **fields})


class _Handler(logging.Handler):
    """What is logged, as lines; sys.stderr may be another one each time."""

    def emit(self, record: logging.LogRecord) -> None:
        say("log", level=record.levelname.lower(), logger=record.name, message=_text.format(record))


_text, _handler = logging.Formatter("%(message)s"), _Handler()


@contextlib.contextmanager
def json_stderr(verb: str = "") -> Iterator[None]:
    """Everything written to stderr is one JSON object a line."""
    os.environ[VARIABLE] = json.dumps({"verb": verb, "run": "", "attempt": None})
    stderr, beside = _wrap()
    try:
        yield
    finally:
        logging.getLogger().removeHandler(_handler)
        sys.stderr.flush()
        del os.environ[VARIABLE]
        os.dup2(stderr, 2)
        os.close(stderr)
        with contextlib.suppress(subprocess.TimeoutExpired):
            beside.wait(PATIENCE_S)


def json_worker() -> None:
    """The same in a worker of a command whose lines are JSON, to its end; called once."""
    if VARIABLE in os.environ:
        _wrap()


def _wrap() -> tuple[int, subprocess.Popen[bytes]]:
    """(what stderr was, the process beside this one)."""
    stderr, own = os.dup(2), {**json.loads(os.environ[VARIABLE]), "host": socket.gethostname(), "pid": os.getpid()}
    os.environ[VARIABLE] = json.dumps(own)
    beside = subprocess.Popen([sys.executable, "-I", "-S", __file__, os.environ[VARIABLE]], stdin=subprocess.PIPE,
                              stdout=stderr, start_new_session=True)  # Ctrl-C is for the command
    assert beside.stdin is not None
    sys.stderr.flush()
    os.dup2(beside.stdin.fileno(), 2)
    beside.stdin.close()
    logging.getLogger().addHandler(_handler)
    return stderr, beside


def as_json(text: str, bound: Mapping[str, Any]) -> str:
    """A line of `line` with what it lacks, any other as the message of one."""
    found: Any = None
    with contextlib.suppress(ValueError):
        found = json.loads(text)
    if not isinstance(found, dict) or found.get("event") not in EVENTS or not isinstance(found.get("time"), float):
        found = {"time": round(time.time(), 3), "event": "log", "message": text}
    level = "error" if found["event"] == "error" else "warning" if found["event"] in ("failed", "fault") else "info"
    return json.dumps({"time": found["time"], "level": level, "event": found["event"], **bound, **found})


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends when nobody can write to stderr any more
    bound, begun = json.loads(sys.argv[1]), ""
    for raw in sys.stdin.buffer:
        text, mark, told = raw.decode(errors="replace").rstrip("\r\n").partition(_BOUND)
        begun += text
        if mark:
            with contextlib.suppress(ValueError):
                bound = {**bound, "shard": None, "sample": None, **json.loads(told)}
                bound = {name: value for name, value in bound.items() if value is not None or name == "attempt"}
        elif begun:
            os.write(1, f"{as_json(begun, bound)}\n".encode())
            begun = ""
    if begun:
        os.write(1, f"{as_json(begun, bound)}\n".encode())


if __name__ == "__main__":
    main()
