"""report, card, export: what leaves a run folder."""

from __future__ import annotations

from typing import Annotated

import typer

from rayexpand.cli.app import app
from rayexpand.cli.options import Folder, Json, Trust
from rayexpand.cli.show import show_json, show_table, warn
from rayexpand.contract.errors import UsageError


@app.command()
def report(folder: Folder,
           strips: Annotated[int, typer.Option(min=0, help="of a guided run: load its models and also show so many "
                                               "samples beside plain ones of the same noise, those the guide is least "
                                               "sure of, and where samples lie among the prototypes")] = 0,
           trust: Trust = None, as_json: Json = False) -> None:
    """Write the page of a run (counts, reasons, samples beside their seeds), of a study, or of a sweep.

    Examples:

        rayexpand report runs/birds

        rayexpand report runs/digits-distdiff --strips 8
    """
    from rayexpand import api

    found = api.open(folder)
    if strips and not isinstance(found, api.RunFolder):
        raise UsageError(f"--strips: {folder} is no run; leave it out")
    page = found.report(strips) if isinstance(found, api.RunFolder) else found.report()
    show_json({"report": page}) if as_json else print(page)


@app.command()
def card(folder: Folder, license_id: Annotated[str | None, typer.Option("--license", help="e.g. cc-by-4.0")] = None,
         trust: Trust = None, as_json: Json = False) -> None:
    """Write the dataset card of a run (README.md in its folder).

    Example: rayexpand card runs/birds --license cc-by-4.0
    """
    from rayexpand import api

    page = api.RunFolder(folder).card(license_id)
    show_json({"card": page}) if as_json else print(page)


@app.command()
def export(folder: Folder,
           out: Annotated[str, typer.Argument(metavar="OUT", help="new folder for the export")],
           layout: Annotated[str, typer.Option(
               help="webdataset, huggingface, or imagefolder (up to about 100,000 images)")] = "webdataset",
           shard_images: Annotated[int, typer.Option(help="samples of one tar or parquet file")] = 1000,
           selection: Annotated[str, typer.Option(help="a decision in selections/; only the rows it keeps")] = "",
           trust: Trust = None, as_json: Json = False) -> None:
    """Copy the kept samples of a run into the layout of another tool.

    Example: rayexpand export runs/birds birds-5x --layout imagefolder
    """
    from rayexpand import api
    from rayexpand.cli.progress import Progress

    with Progress() as progress:
        made = api.RunFolder(folder).export(out, layout, shard_images=shard_images,  # type: ignore[arg-type]
                                            selection=selection or None, on=progress)
    if made.pending:
        warn([f"{made.pending:,} planned samples are not decided yet and are not in this export"], "")
    summary = {"folder": str(made.folder), "layout": made.layout, "count": made.count, "files": made.files,
               "pending": made.pending}
    show_json(summary) if as_json else show_table(("export", folder), list(summary.items()))
