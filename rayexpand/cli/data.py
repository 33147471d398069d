"""data ls, prepare: published datasets, from their official layout to the section `data` of a job."""

from __future__ import annotations

from typing import Annotated

import typer

from rayexpand.cli.app import Commands, app
from rayexpand.cli.options import Json
from rayexpand.cli.show import show_json, show_table, warn

data = typer.Typer(cls=Commands, no_args_is_help=True, rich_markup_mode=None,
                   help="List published datasets, and make the official layout of one readable.")
app.add_typer(data, name="data")


@data.command()
def ls(word: Annotated[str, typer.Argument(metavar="[WORD]", help="only names with this word")] = "",
       as_json: Json = False) -> None:
    """List the published datasets with their splits, and how many images each part has; of one, also its files.

    Example: rayexpand data ls flowers
    """
    from rayexpand import api

    found = [one for one in api.published_sets() if word in one["name"]]
    if as_json:
        show_json(found)
        return
    rows = []
    for one in found:
        same: dict[str, list[str]] = {}
        for split, by in one["splits"].items():
            counts = ", ".join(f"{part} {count:,}" for part, count in by["images"].items())
            about = f"; {by['about']}" if by["about"] else ""
            same.setdefault(f"{counts}; {by['classes']:,} classes{about}", []).append(split)
        rows += [("" if number else one["name"], ", ".join(splits), what)
                 for number, (what, splits) in enumerate(same.items())]
    show_table(("name", "split", "images"), rows)
    if len(found) == 1:
        for what in ("files", "labels"):
            if found[0][what]:
                print(f"{what}: {', '.join(found[0][what])}")


@data.command()
def prepare(
    name: Annotated[str, typer.Argument(metavar="NAME", help="as `data ls` prints it, e.g. cub")],
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="where its official archives were unpacked")],
    split: Annotated[str, typer.Option(metavar="NAME", help="the official split, or that of a paper")] = "official",
    label: Annotated[str, typer.Option(metavar="NAME", help="which labels, where a set has several: an attribute of "
                                       "celeba, family of aircraft, species of waterbirds, a partition of dtd")] = "",
    allow_counts: Annotated[bool, typer.Option("--allow-counts", help="take the set although it has other counts than "
                                               "those published; they are said")] = False,
    as_json: Json = False,
) -> None:
    """Make a dataset in its official layout readable: a manifest with the published split, and class names.

    Both files are written beside the images; no image is copied. What is printed belongs into a job file. Counts that
    are not the published ones are an error. Examples:

        rayexpand data prepare cub data/cub >> birds.yaml

        rayexpand data prepare aircraft data/aircraft --split diffmix

        rayexpand data prepare waterbirds data/waterbird --label species
    """
    from rayexpand import api

    found = api.prepare_data(name, folder, split=split, label=label, allow_counts=allow_counts)
    if as_json:
        show_json(found.to_dict())
        return
    counts = ", ".join(f"{part} {count:,}" for part, count in found.images.items())
    warn([f"{name}, split {split}: {counts} images, {found.classes:,} classes", *found.notes,
          *(f"{file} {'written' if new else 'is there already'}" for file, new in found.files.items())])
    print(found.job_text())
