"""train, sweep: does it help."""

from __future__ import annotations

from typing import Any

import typer

from rayexpand.cli.app import app
from rayexpand.cli.options import File, Json, LogJson, Machine, Metrics, NoRay, Set, Trust
from rayexpand.cli.show import quiet_stdout, show_json, show_table, warn
from rayexpand.contract.errors import EXIT_FAILURE


@app.command()
def train(file: File, set_: Set = None, machine: Machine = None, trust: Trust = None, no_ray: NoRay = False,
          metrics: Metrics = None, log_json: LogJson = False, as_json: Json = False) -> None:
    """Train the same classifier on every arm of a study and compare them; expands first what the arms need.

    Example: rayexpand train jobs/digits/study.yaml
    """
    from rayexpand import api
    from rayexpand.cli.progress import Progress

    with Progress(log_json) as progress, quiet_stdout():
        found = api.train(file, set=set_ or [], machine=machine, ray=not no_ray, on=progress, same_process=True)
    numbers = found.summary()
    if as_json:
        show_json({**found.to_dict(numbers), "report": found.page})
    else:
        print("test accuracy after the last epoch, mean ± standard error over n seeds; differences to "
              f"{numbers['baseline']} and to the originals repeated, with 95 % intervals that hold together\n")
        show_table(*found.table(numbers))
        for line in numbers.get("notes", ()):
            print(f"\n{line}")
        if worth := numbers.get("value"):
            print("".join(f"\n{line}" for line in [worth["first"], *(one["sentence"] for one in (
                *worth.get("arms", ()), *worth.get("crossovers", ())))]))
        if numbers["sees"]:
            print(f"\nthis study {numbers['sees']['sentence']}")
        for rounds in found.in_rounds(numbers):
            print()
            show_table(*rounds)
        if further := found.further(numbers):
            print()
            show_table(*further)
        if samples := found.compared(numbers):
            compared = numbers["samples"]
            print(f"\nsamples beside {compared['reference'] or 'no'} real images, features of {compared['extractor']}, "
                  "mean ± standard error over n repetitions\n")
            show_table(*samples)
            print("".join(f"\n{line}" for line in found.said_of_top1(numbers)))
            warn(compared["warnings"])
        print(f"\nreport: {found.page}")
    _failures(found)


@app.command()
def sweep(file: File, set_: Set = None, machine: Machine = None, trust: Trust = None, no_ray: NoRay = False,
          metrics: Metrics = None, log_json: LogJson = False, as_json: Json = False) -> None:
    """Find the values of a study's fields that give the best classifier; killed anywhere, the same command goes on.

    Example: rayexpand sweep jobs/digits/sweep-img2img.yaml
    """
    from rayexpand import api
    from rayexpand.cli.progress import Progress

    with Progress(log_json) as progress, quiet_stdout():
        found = api.sweep(file, set=set_ or [], machine=machine, ray=not no_ray, on=progress,
                          say=lambda line: warn([line], "sweep: "))
    numbers = found.summary()
    if as_json:
        show_json(numbers)
    else:
        show_table(*found.table(numbers))
        for line in numbers["words"]:
            print(line)
    _failures(found)


def _failures(found: Any) -> None:
    warn(found.failed, "rayexpand: a trial failed, the same command tries it again: ")
    if found.failed:
        raise typer.Exit(EXIT_FAILURE)
