"""Checks the folder of a study: every run that it made, and every result with its predictions."""

from __future__ import annotations

from dataclasses import fields

from rayexpand.contract.errors import DamagedFile, RayexpandError, UsageError, looked_at
from rayexpand.runs.run import open_run
from rayexpand.runs.store import Totals
from rayexpand.runs.verify import Findings
from rayexpand.runs.verify import verify as verify_run
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import read_json, read_table

AGAIN = "`rayexpand train` with the file of the study makes it again"


def verify_study(folder: str, *, pixels: bool = False) -> Findings:
    """Findings of all runs below the folder together, and damaged results and predictions. Results and runs that are
    not there yet are no problem. Raises UsageError where there is no study.json."""
    files, found = open_files(folder), Findings()
    if (facts := read_json(files, "study.json")) is None:
        raise UsageError(f"{folder}: there is no study.json{looked_at(folder)}, so what belongs to the study is not "
                         "known. Give the folder that `rayexpand train` makes, <out>/<name>; if the file is gone, the "
                         "same `train` writes it again")
    config = facts["config"]
    wanted = [f"{name}-{seed}" for name in config["expansions"] for seed in config["seeds"]]
    for name in dict.fromkeys([*files.list("runs"), *wanted]):  # an object store lists no folders
        if open_files(f"{folder}/runs/{name}").read("run.json") is None:
            continue
        try:
            one = verify_run(open_run(f"{folder}/runs/{name}"), pixels=pixels)
        except RayexpandError as error:
            found.problems.append(f"runs/{name}: {error}")
            continue
        found.problems += [f"runs/{name}/{line}" for line in one.problems]
        found.rebuilt_receipts += one.rebuilt_receipts
        found.garbage += one.garbage
        found.totals = Totals(**{field.name: getattr(found.totals, field.name) + getattr(one.totals, field.name)
                                 for field in fields(Totals)})
    for kind, read in (("results", read_json), ("predictions", read_table)):
        for name in files.list(kind):
            try:
                read(files, f"{kind}/{name}")
            except DamagedFile as error:
                said = str(error).replace(f"{files.root}/", "")
                found.problems.append(f"{'' if said.startswith(kind) else f'{kind}/{name}: '}{said}. {AGAIN}")
    return found
