"""expand, retry, status, verify, regen: one run, from its first sample to its last."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from rayexpand.cli.app import app
from rayexpand.cli.options import File, Folder, Json, LogJson, Machine, Metrics, NoRay, Set, Trust, samples_in
from rayexpand.cli.show import quiet_stdout, show, show_json, show_table, warn
from rayexpand.contract.errors import Stopped, UsageError

WATCH_S = 10.0
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@app.command()
def expand(file: File, set_: Set = None, machine: Machine = None, trust: Trust = None, no_ray: NoRay = False,
           metrics: Metrics = None, log_json: LogJson = False, as_json: Json = False) -> None:
    """Make every planned sample, once. Killed or stopped anywhere, the same command continues.

    Examples:

        rayexpand expand my.yaml

        rayexpand expand my.yaml --no-ray --set method.ratio=2

        rayexpand expand my.yaml --machine cluster.yaml

        rayexpand expand jobs/digits/loop.yaml --no-ray
    """
    from rayexpand import api
    from rayexpand.cli.progress import Progress

    with Progress(log_json) as progress, quiet_stdout():
        found = api.expand(file, set=set_ or [], machine=machine, ray=not no_ray, on=progress, same_process=True)
    _ended(found, as_json)


@app.command()
def retry(folder: Folder, set_: Set = None, trust: Trust = None, no_ray: NoRay = False, metrics: Metrics = None,
          log_json: LogJson = False, as_json: Json = False) -> None:
    """Make once more only the rows of a run, or of all rounds of a loop, that failed.

    Example: rayexpand retry runs/birds
    """
    from rayexpand.cli.progress import Progress

    opened = samples_in(folder)
    with Progress(log_json) as progress, quiet_stdout():
        found = opened.retry(set=set_ or [], ray=not no_ray, on=progress, same_process=True)
    _ended(found, as_json)


def _ended(found: Any, as_json: bool) -> None:
    if not found.last["made"]:
        pending = found.to_dict()["pending"]
        warn([f"nothing to retry: no row has failed; {pending:,} are pending, which `rayexpand expand` makes" if pending
              else "nothing to do: every planned row is decided"], "")
    warn(found.notes)
    show(found, as_json)
    if not as_json:
        print(f"report: {found.page}")


@app.command()
def status(folder: Annotated[str, typer.Argument(metavar="FOLDER", help="of a run, loop, study, sweep or audit, or a "
                                                 "folder that holds artifacts; a path or a URL")],
           watch: Annotated[bool, typer.Option("--watch", help="show it again every ten seconds, until it is complete "
                                               "or Ctrl-C")] = False,
           serve: Annotated[int | None, typer.Option(metavar="PORT", min=0, max=65535, help="show it in a browser, at "
                                                     "http://127.0.0.1:PORT/, until Ctrl-C; 0: any free port")] = None,
           as_json: Json = False) -> None:
    """Say how far a run, a loop, a study, a sweep or a fit is, and whether its driver lives.

    It reads the folder alone, so it works on every machine that sees it, while the driver runs and after it died.

    Examples:

        rayexpand status runs/birds

        rayexpand status s3://bucket/runs/my-study --watch

        rayexpand status runs/birds --serve 8700
    """
    from rayexpand import api

    if serve is not None:
        if watch:
            raise UsageError("--serve shows it in a browser and --watch here; give one of them")
        _serve(folder, serve, as_json)
        return

    while True:
        found = api.status(folder)
        show_json(found.to_json()) if as_json else show_table((f"{found.kind} {found.name}", ""), found.table())
        if not watch or found.complete:
            return
        time.sleep(WATCH_S)
        print("" if as_json else "\n", end="", flush=True)


def _serve(folder: str, port: int, as_json: bool) -> None:
    from rayexpand import api

    server = api.serve_status(folder, port)
    show_json({"url": server.url}) if as_json else print(f"{server.url} shows {folder} until Ctrl-C", flush=True)
    with contextlib.suppress(Stopped):
        server.serve_forever()


@app.command()
def verify(folder: Folder, trust: Trust = None,
           pixels: Annotated[bool, typer.Option(help="also decode every image and check its hash")] = False,
           marks: Annotated[bool, typer.Option(help="of an export: check that every image says that it is "
                                                    "synthetic")] = False,
           as_json: Json = False) -> None:
    """Check every file of a run, of all rounds of a loop, or of all runs and results of a study; or the marks of an
    export.

    Examples:

        rayexpand verify runs/birds --pixels

        rayexpand verify runs/my-study

        rayexpand verify birds-5x --marks
    """
    from rayexpand import api

    if marks and pixels:
        raise UsageError("--marks looks at an export and --pixels at a run; give one of them")
    opened = None if marks else api.open(folder)
    if opened is not None and not isinstance(opened, (api.RunFolder, api.StudyFolder, api.LoopFolder)):
        raise UsageError(f"{folder} holds neither a run, a loop nor a study; give the folder of one")
    found = api.check_marks(folder) if opened is None else opened.verify(pixels)
    if as_json:
        show_json(found.to_json())
    else:
        show_table(("verify", folder), found.table())
        for problem in found.problems:
            print(problem)
    if found.problems:
        raise typer.Exit(1)


@app.command()
def regen(folder: Folder,
          sample_id: Annotated[str, typer.Argument(help="<seed id>/<copy>, as in the sample_id column")],
          to: Annotated[str, typer.Option(help="file to write the image to; its folder must exist")] = "",
          trust: Trust = None, as_json: Json = False) -> None:
    """Make one sample again, alone, and compare it with the committed one.

    Example: rayexpand regen runs/birds ant/3.png/1 --to one.png
    """

    if to and (Path(to).suffix.lower() not in PICTURES or not Path(to).parent.is_dir()):
        raise UsageError(f"--to {to}: give a file ending in {', '.join(PICTURES)} in a folder that exists")
    found = samples_in(folder).regen(sample_id)
    image = found.pop("image")
    if to and image:
        _save(image, Path(to))
    found["image"] = to if to and image else None
    if as_json:
        show_json(found)
    else:
        for key, value in found.items():
            print(f"{key.replace('_', ' ')}: {'none' if value is None else value}")
    if found["equal"] is False:
        raise typer.Exit(1)


def _save(encoded: bytes, path: Path) -> None:
    import io

    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        if path.suffix.lower() in (".jpg", ".jpeg") and image.format == "JPEG":
            path.write_bytes(encoded)
        else:
            image.save(path)
