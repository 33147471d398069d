"""report, card, export: what leaves a run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from rayexpand.cli import picture_options as pictured
from rayexpand.cli.app import app
from rayexpand.cli.options import Folder, Json, Set, Trust, samples_in
from rayexpand.cli.show import show_json, show_table, warn
from rayexpand.contract.errors import UsageError


@app.command()
def report(folders: Annotated[list[str] | None, typer.Argument(
               metavar="[FOLDER]...", help="a run, loop, study or sweep; with --matrix, --sheet, --map and --latents "
               "several runs; none with --pivot")] = None,
           pivot: Annotated[str | None, typer.Option("--pivot", metavar="FILE", help="instead: tables and figures over "
                                                     "several studies and sweeps, as this YAML file says")] = None,
           set_: Set = None,
           strips: Annotated[int, typer.Option(min=0, help="of a guided run or loop: load its models and also show so "
                                               "many samples beside plain ones of the same noise")] = 0,
           matrix: pictured.Matrix = False, sheet: pictured.Sheet = False, map_: pictured.Map = False,
           failures: pictured.Failures = False, latents: pictured.Latents = False, batch: pictured.Batch = False,
           saliency: pictured.Saliency = False, rows: pictured.Rows = None, copies: pictured.Copies = None,
           images: pictured.Images = None, classes: pictured.Classes = None, guide: pictured.Guide = None,
           checkpoint: pictured.Checkpoint = None, out: pictured.Out = None, name: pictured.Name = None,
           trust: Trust = None, as_json: Json = False) -> None:
    """Write the page of a run (counts, reasons, samples beside their seeds), of a loop, of a study, or of a sweep.

    Examples:

        rayexpand report runs/birds

        rayexpand report runs/digits-distdiff --strips 8

        rayexpand report --matrix runs/birds-plain runs/birds-distdiff

        rayexpand report --batch runs/my-study

        rayexpand report --pivot jobs/digits/report-figures.yaml
    """
    from rayexpand import api

    asked = {"matrix": matrix, "sheet": sheet, "map": map_, "failures": failures, "latents": latents, "batch": batch,
             "saliency": saliency}
    options = {"rows": rows, "copies": copies, "images": images, "classes": classes, "guide": guide,
               "checkpoint": checkpoint}
    if pivot is not None:
        if folders or strips or any(asked.values()) or any(one is not None for one in (*options.values(), out, name)):
            raise UsageError("--pivot: its file says what is shown, of which studies; leave folders and other options "
                             "out, or change a field of the file with --set")
        page = api.report(pivot, set=set_ or [])
    elif not folders or set_:
        raise UsageError("report: " + ("--set changes fields of the file of --pivot; leave it out" if set_ else
                                       "name the folder of a run, loop, study or sweep, or --pivot FILE"))
    elif kinds := [kind for kind, wanted in asked.items() if wanted]:
        if strips or len(kinds) > 1:
            raise UsageError(f"--{kinds[0]}: is a page of its own; leave --{kinds[1] if len(kinds) > 1 else 'strips'} "
                             "out, or run it after this")
        page = api.pictures(kinds[0], *folders, out=out, name=name, **options)  # type: ignore[arg-type]
    else:
        page = _own_page(folders, strips, {**options, "out": out, "name": name})
    show_json({"report": page}) if as_json else print(page)


def _own_page(folders: Sequence[str], strips: int, options: Mapping[str, Any]) -> str:
    """The page that every run, loop, study and sweep has."""
    from rayexpand import api

    if given := [key for key, value in options.items() if value is not None]:
        raise UsageError(f"--{given[0]}: is about pages with pictures; name one of them too, such as --matrix")
    if len(folders) > 1:
        raise UsageError(f"{len(folders)} folders are named, and a page is of one; name one, or a page that shows "
                         "several, such as --matrix")
    found = api.open(folders[0])
    if isinstance(found, (api.RunFolder, api.LoopFolder)):
        return found.report(strips)
    if strips:
        raise UsageError(f"--strips: {folders[0]} is neither a run nor a loop; leave it out")
    return found.report()


@app.command()
def card(folder: Folder, license_id: Annotated[str | None, typer.Option("--license", help="e.g. cc-by-4.0")] = None,
         license_of: Annotated[list[str] | None, typer.Option(metavar="WHAT=ID", help="of generator, adapter or seeds; "
                                                              "repeatable")] = None,
         trust: Trust = None, as_json: Json = False) -> None:
    """Write the dataset card of a run or loop (README.md in its folder).

    Example: rayexpand card runs/birds --license cc-by-4.0 --license-of seeds=cc-by-4.0
    """

    given = [one.partition("=") for one in license_of or []]
    if wrong := [name for name, sign, license_of_it in given if not (sign and license_of_it)]:
        raise UsageError(f"--license-of {wrong[0]}: give what and its license, for example seeds=cc-by-4.0")
    page = samples_in(folder).card(license_id, {name: one for name, _, one in given})
    show_json({"card": page}) if as_json else print(page)


@app.command()
def export(folder: Folder,
           out: Annotated[str, typer.Argument(metavar="OUT", help="new folder for the export")],
           layout: Annotated[str, typer.Option(
               help="webdataset, huggingface, or imagefolder (up to about 100,000 images)")] = "webdataset",
           shard_images: Annotated[int, typer.Option(help="samples of one tar or parquet file")] = 1000,
           selection: Annotated[str, typer.Option(help="a decision in selections/; only the rows it keeps")] = "",
           require: Annotated[str, typer.Option(metavar="LINE,...", help="lines of the release sheet that must pass, "
                                                "e.g. copies,membership")] = "",
           trust: Trust = None, as_json: Json = False) -> None:
    """Copy the kept samples of a run, or of all rounds of a loop, into the layout of another tool.

    Examples:

        rayexpand export runs/birds birds-5x --layout imagefolder

        rayexpand export runs/birds birds-5x --require copies,licenses
    """
    from rayexpand.cli.progress import Progress

    with Progress() as progress:
        made = samples_in(folder).export(out, layout, shard_images=shard_images,  # type: ignore[arg-type]
                                            selection=selection or None, on=progress,
                                            require=[one.strip() for one in require.split(",")] if require else [])
    if made.pending:
        warn([f"{made.pending:,} planned samples are not decided yet and are not in this export"], "")
    summary = {"folder": str(made.folder), "layout": made.layout, "count": made.count, "files": made.files,
               "pending": made.pending}
    show_json(summary) if as_json else show_table(("export", folder), list(summary.items()))
