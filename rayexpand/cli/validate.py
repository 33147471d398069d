"""validate, plan, bench: before anything is made."""

from __future__ import annotations

from typing import Annotated

import typer

from rayexpand.cli.app import app
from rayexpand.cli.options import File, Json, Machine, Set, Trust
from rayexpand.cli.show import show, show_json, show_table, warn
from rayexpand.contract.errors import ConfigError


@app.command()
def validate(file: File, set_: Set = None, machine: Machine = None, trust: Trust = None, as_json: Json = False) -> None:
    """Check a file of any kind without loading a model, and print it with every default filled in.

    Examples:

        rayexpand validate my.yaml

        rayexpand validate study.yaml --set recipe.epochs=3
    """
    from rayexpand import api

    found = api.validate(file, set=set_ or [], machine=machine)
    if found.problems:
        raise ConfigError(file, found.problems)
    if as_json:
        show_json(found.config)
    else:
        import yaml

        print(yaml.safe_dump(found.config, sort_keys=False, allow_unicode=True), end="")
    warn((f"{name}: {value}" for name, value, *_ in found.table()[1] if name != "sampling"), "data: ")
    warn(found.notes, "sampling: ")
    warn([found.sees] if found.sees else [], "study: ")
    warn(found.counts, "sweep: ")


@app.command()
def plan(file: File, set_: Set = None, machine: Machine = None, trust: Trust = None, as_json: Json = False) -> None:
    """Count what a run, loop, fit, study or sweep makes, by stage, and estimate hours, bytes and cost on a fleet that
    loses nodes, without loading a model. Of a study also which difference it can show, of a sweep how many trials.

    Examples:

        rayexpand plan jobs/imagenet/expand-img2img.yaml --set estimate.gpus=64

        rayexpand plan jobs/imagenet/fit-distdiff.yaml --set estimate.seeds=1281167 --set estimate.classes=1000

        rayexpand plan study.yaml --machine spot.yaml
    """
    from rayexpand import api

    show(api.plan(file, set=set_ or [], machine=machine), as_json)


@app.command()
def bench(file: File, set_: Set = None, machine: Machine = None, trust: Trust = None,
          rows: Annotated[int, typer.Option(help="measure at least so many rows; 0: one shard, or 30 steps "
                                                 "of each arm")] = 0,
          as_json: Json = False) -> None:
    """Measure a run on this machine: images/s, share of the bare sampler's speed, seconds by phase. Of a study whose
    samples are there: seconds of loader and optimiser step of each arm, and its overhead over the baseline.

    Examples:

        rayexpand bench my.yaml --rows 100

        rayexpand bench study.yaml --set recipe.batch=16
    """
    from rayexpand import api

    found = api.bench(file, rows=rows, set=set_ or [], machine=machine)
    show_json(found.to_json()) if as_json else show_table(*found.table())
