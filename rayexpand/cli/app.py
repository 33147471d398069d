"""The Typer app that the commands join."""

from __future__ import annotations

from typing import Annotated, Any

import typer
import typer.core

from rayexpand import __version__
from rayexpand.contract.errors import EXIT_DONE

ORDER = ("demo", "init", "data", "jobs", "validate", "schema", "plan", "bench", "fit", "expand", "status", "verify",
         "retry", "regen", "select", "evaluate", "convert", "audit", "train",
         "sweep", "report", "card", "export", "submit")


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
