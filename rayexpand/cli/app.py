"""The Typer app, and what every command shares: exit codes, error messages, signals.

Results go to stdout (with --json one object and nothing else), everything else to stderr. Nothing heavy is imported
before a command needs it, so help answers at once.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import traceback
from typing import Annotated, Any

import typer
import typer.core

from rayexpand import __version__
from rayexpand.contract.errors import EXIT_DONE, EXIT_FAULT, Interrupted, RayexpandError

ORDER = ("demo", "init", "jobs", "validate", "schema", "plan", "bench", "fit", "expand", "status", "verify", "retry",
         "regen",
         "select", "evaluate", "train", "sweep", "report", "card", "export", "submit")


class Commands(typer.core.TyperGroup):
    """Commands in the order of the work, each with its whole first sentence."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        rows = [(name, " ".join(str(self.commands[name].help).partition("\n\n")[0].split()))
                for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
                  context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
                  help="Turn a labelled image dataset into a bigger one with diffusion models. "
                       "Start with `rayexpand demo`.")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version and leave")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit(EXIT_DONE)


def main() -> None:
    """Runs a command and ends with its exit code."""
    from rayexpand.cli import cluster, expand, fit, jobs, judge, pages, start, study, validate  # noqa: F401  (commands)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stopped)
    try:
        app()
    except RayexpandError as error:
        _fail(type(error).__name__, str(error), error.exit_code)
    except Exception as error:
        with tempfile.NamedTemporaryFile("w", prefix="rayexpand-", suffix=".txt", delete=False) as file:
            file.write(traceback.format_exc())
        _fail(type(error).__name__, f"{type(error).__name__}: {error}. This should have been a clear message and is a "
              f"fault of rayexpand; the traceback is in {file.name}", EXIT_FAULT)


def _stopped(number: int, frame: Any) -> None:
    raise Interrupted(f"{signal.Signals(number).name} received; the same command continues where this one was")


def _fail(kind: str, message: str, exit_code: int) -> None:
    if "--json" in sys.argv:
        print(json.dumps({"error": {"type": kind, "message": message, "exit_code": exit_code}}))
    print(f"rayexpand: {message}", file=sys.stderr)
    sys.exit(exit_code)
