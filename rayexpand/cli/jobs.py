"""jobs ls, show, cp: the ready files that travel with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rayexpand.cli.app import Commands, app
from rayexpand.cli.options import Json
from rayexpand.cli.show import show_json, show_table

jobs = typer.Typer(cls=Commands, no_args_is_help=True, rich_markup_mode=None,
                   help="List, show and copy the ready files: digits, CIFAR-10, ImageNet, and the papers' settings.")
app.add_typer(jobs, name="jobs")

Name = Annotated[str, typer.Argument(metavar="NAME", help="as `jobs ls` prints it, e.g. digits/expand-img2img")]


@jobs.command()
def ls(word: Annotated[str, typer.Argument(metavar="[WORD]", help="only names with this word")] = "",
       as_json: Json = False) -> None:
    """List the ready files with what each is for.

    Example: rayexpand jobs ls distdiff
    """
    from rayexpand import api

    found = api.job_files(word)
    show_json(found) if as_json else show_table(("name", "verb", "what"), found)


@jobs.command(name="show")
def show_one(name: Name) -> None:
    """Print a ready file.

    Example: rayexpand jobs show digits/expand-img2img
    """
    from rayexpand import api

    print(api.job_text(name), end="")


@jobs.command()
def cp(name: Name, to: Annotated[str, typer.Argument(metavar="[FILE]", help="else its own name, here")] = "") -> None:
    """Copy a ready file, to change it, and into jobs/ here the ready files that it names.

    Example: rayexpand jobs cp digits/expand-img2img my.yaml
    """
    from rayexpand import api

    file = Path(to or f"{name.rpartition('/')[2]}.yaml")
    api.write_new(file, api.job_text(name))
    print(f"{file} written")
    for other in api.jobs_named_by(name):
        if not Path(other).exists():
            Path(other).parent.mkdir(parents=True, exist_ok=True)
            api.write_new(Path(other), api.job_text(other))
            print(f"{other} written")
