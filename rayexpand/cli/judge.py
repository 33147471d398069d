"""evaluate, audit, select: what finished samples are worth, whether they may be released, and which stay; convert: by
which published extractor."""

from __future__ import annotations

from typing import Annotated

import typer

from rayexpand.cli.app import app
from rayexpand.cli.options import File, Json, LogJson, Machine, Metrics, NoRay, Set, Trust
from rayexpand.cli.show import quiet_stdout, show, show_json, show_table, warn


@app.command()
def evaluate(file: File, set_: Set = None, machine: Machine = None, trust: Trust = None, no_ray: NoRay = False,
             metrics: Metrics = None, log_json: LogJson = False, as_json: Json = False) -> None:
    """Say how far the samples of a run are from real images, what they cover, and how different they are.

    Example: rayexpand evaluate jobs/digits/evaluate-img2img.yaml
    """
    from rayexpand import api
    from rayexpand.cli.progress import Progress

    with Progress(log_json) as progress, quiet_stdout():
        found = api.evaluate(file, set=set_ or [], machine=machine, ray=not no_ray, on=progress)
    show(found, as_json)
    if not as_json:
        print(f"written: {found.facts['file']}")
    warn(found.facts["warnings"])


@app.command()
def audit(file: File, set_: Set = None, machine: Machine = None, trust: Trust = None, no_ray: NoRay = False,
          metrics: Metrics = None, log_json: LogJson = False, as_json: Json = False) -> None:
    """Say whether samples may be released: which are copies of seeds, and whether they tell who was in the dataset.

    Example: rayexpand audit jobs/digits/audit-copies.yaml
    """
    from rayexpand import api
    from rayexpand.cli.progress import Progress

    with Progress(log_json) as progress, quiet_stdout():
        found = api.audit(file, set=set_ or [], machine=machine, ray=not no_ray, on=progress)
    show(found, as_json)
    if not as_json:
        print(*(f"written: {found.facts[name]}" for name in ("file", "page") if name in found.facts), sep="\n")


@app.command()
def convert(
    preset: Annotated[str, typer.Argument(metavar="PRESET", help="inception2015 (also for inception2015_clean), "
                                          "dinov2_l14 or clip_l14_336")],
    file: Annotated[str, typer.Argument(metavar="FILE", help="as its publisher gives it out")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="the safetensors file to write")],
    as_json: Json = False,
) -> None:
    """Make the safetensors file of a published extractor, which gives distances their known names.

    FILE is read once its sha256 is the published one; where to fetch it is said where it is missing.

    Example: rayexpand convert inception2015 pt_inception-2015-12-05-6726825d.pth models/inception2015.safetensors
    """
    from rayexpand import api

    found = api.convert(preset, file, out)
    if as_json:
        show_json(found)
    else:
        show_table(("", found["file"]), [(name, one) for name, one in found.items() if name != "file"])


@app.command()
def select(file: File, set_: Set = None, machine: Machine = None, trust: Trust = None, no_ray: NoRay = False,
           metrics: Metrics = None, log_json: LogJson = False, as_json: Json = False) -> None:
    """Decide which samples of a run stay: by a guide's confidence, a score, chance, for each seed or class.

    Example: rayexpand select jobs/digits/select-quantile.yaml
    """
    from rayexpand import api
    from rayexpand.cli.progress import Progress

    with Progress(log_json) as progress, quiet_stdout():
        found = api.select(file, set=set_ or [], machine=machine, ray=not no_ray, on=progress)
    show(found, as_json)
    if not as_json:
        print(f"{'written' if found.facts['made'] else 'there already'}: {found.facts['file']}")
    warn(found.facts["warnings"])
