"""stderr as JSON lines, whoever writes to it: a library, C code, a child.

A process beside the command reads what goes to descriptor 2, passes JSON objects on and wraps every other line. It is a
process of its own so that the last words of a command that is killed arrive; the standard library is all it imports.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

PATIENCE_S = 5.0  # for a child that outlives the command and still holds its stderr


@contextlib.contextmanager
def json_stderr() -> Iterator[None]:
    """Everything written to stderr is one JSON object a line."""
    stderr = os.dup(2)
    beside = subprocess.Popen([sys.executable, "-I", "-S", __file__], stdin=subprocess.PIPE, stdout=stderr,
                              start_new_session=True)  # Ctrl-C is for the command
    assert beside.stdin is not None
    sys.stderr.flush()
    os.dup2(beside.stdin.fileno(), 2)
    beside.stdin.close()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)
        with contextlib.suppress(subprocess.TimeoutExpired):
            beside.wait(PATIENCE_S)


def as_json(line: str) -> str:
    """A line that is a JSON object as it is, any other as the message of one."""
    with contextlib.suppress(ValueError):
        if isinstance(json.loads(line), dict):
            return line
    return json.dumps({"time": round(time.time(), 1), "message": line})


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends when nobody can write to stderr any more
    for raw in sys.stdin.buffer:
        if line := raw.decode(errors="replace").rstrip("\r\n"):
            os.write(1, f"{as_json(line)}\n".encode())


if __name__ == "__main__":
    main()
