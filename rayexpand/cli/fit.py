"""fit: what methods need and a dataset has not."""

from __future__ import annotations

from typing import Annotated

import typer

from rayexpand.cli.app import app
from rayexpand.cli.options import File, Json, LogJson, Machine, Metrics, NoRay, Set, Trust
from rayexpand.cli.show import quiet_stdout, show_json, show_table

FIELDS = {"guide": {"guide.weights": ""}, "prompts": {"method.prompts": ""}, "generator": {"prior.weights": ""},
          "scores": {"allocate.scores": ""}}


@app.command()
def fit(file: File, set_: Set = None, machine: Machine = None, trust: Trust = None,
        out: Annotated[str, typer.Option(help="folder that holds artifacts; else `out` of the FILE, for a run's FILE "
                                         "./artifacts")] = "",
        no_ray: NoRay = False, metrics: Metrics = None, log_json: LogJson = False, as_json: Json = False) -> None:
    """Make what methods need of the data: a guide, prototypes, captions, features, adapters. Or what a run needs.

    Examples:

        rayexpand fit jobs/digits/expand-distdiff.yaml

        rayexpand fit jobs/digits/fit-diffmix.yaml --no-ray
    """
    from rayexpand import api
    from rayexpand.cli.progress import Progress

    with Progress(log_json) as progress, quiet_stdout():
        made = api.fit(file, set=set_ or [], machine=machine, out=out or None, ray=not no_ray, on=progress)
    if as_json:
        show_json({role: one.to_dict() for role, one in made.items()})
        return
    show_table(("made", "folder", "seconds"),
               [(role, one.folder, f"{one.facts['seconds']:,.1f}") for role, one in made.items()])
    for line in (line for one in made.values() for line in one.facts.get("summary", [])):
        print(line)
    prior = {"prior.weights": "/pipeline", **({} if "guide" in made else {"guide.weights": "/guide"})}
    print("in a run: " + " ".join(
        f"--set {field}={one.link}{part}" for role, one in made.items()
        for field, part in {**FIELDS, "prior": prior}.get(role, {f"artifacts.{role}": ""}).items()))
