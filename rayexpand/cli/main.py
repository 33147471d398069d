"""What every command shares: exit codes, error messages, signals.

Results go to stdout (with --json one object and nothing else), everything else to stderr. Nothing heavy is imported
before a command needs it, so help answers at once.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import tempfile
import traceback
from typing import Any

from rayexpand.cli import cluster, data, expand, fit, jobs, judge, pages, start, study, validate
from rayexpand.cli.app import app
from rayexpand.contract.errors import EXIT_FAULT, Interrupted, RayexpandError, Stopped
from rayexpand.contract.log_lines import json_stderr, line
from rayexpand.contract.secrets import masked, masked_output

LOG_JSON = "--log-json"
COMMANDS = (start, data, jobs, validate, fit, expand, judge, study, pages, cluster)  # each joins the app by its import


def main() -> None:
    """Runs a command and ends with its exit code."""

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _stopped)
    lines = json_stderr(sys.argv[1]) if LOG_JSON in sys.argv else contextlib.nullcontext()
    with lines, masked_output(sys.stdout, sys.stderr):
        _run()


def _run() -> None:
    try:
        app()
    except Stopped as stop:
        _fail(Interrupted.__name__, str(stop), stop.exit_code)
    except RayexpandError as error:
        _fail(type(error).__name__, str(error), error.exit_code)
    except Exception as error:
        with tempfile.NamedTemporaryFile("w", prefix="rayexpand-", suffix=".txt", delete=False) as file:
            file.write(masked(traceback.format_exc()))
        _fail(type(error).__name__, f"{type(error).__name__}: {error}. This should have been a clear message and is a "
              f"fault of rayexpand; the traceback is in {file.name}", EXIT_FAULT)


def _stopped(number: int, frame: Any) -> None:
    raise Stopped(f"{signal.Signals(number).name} received; the same command continues where this one was")


def _fail(kind: str, message: str, exit_code: int) -> None:
    error = {"error": {"type": kind, "message": message, "exit_code": exit_code}}
    if "--json" in sys.argv:
        print(json.dumps(error))
    print(line("error", message=message, **error) if LOG_JSON in sys.argv else f"rayexpand: {message}",
          file=sys.stderr)
    sys.exit(exit_code)
