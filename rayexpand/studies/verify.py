"""Checks the folder of a study: every run and loop that it made, what controls of loops were dealt, and every result
with its predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rayexpand.contract.errors import DamagedFile, RayexpandError, UsageError, looked_at
from rayexpand.runs.joined import is_loop
from rayexpand.runs.run import Run, open_run
from rayexpand.runs.verify import Findings
from rayexpand.runs.verify import verify as verify_run
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import read_json, read_table
from rayexpand.studies.rounds.controls import CALLED, Beside
from rayexpand.studies.rounds.loop import loop_in
from rayexpand.studies.rounds.verify import verify_loop
from rayexpand.studies.sections import OVERSAMPLE

AGAIN = "`rayexpand train` with the file of the study makes it again"


def verify_study(folder: str, *, pixels: bool = False) -> Findings:
    """Findings of all runs and loops below the folder together, and damaged results and predictions. What is not there
    yet is no problem. Raises UsageError where there is no study.json."""
    files, found = open_files(folder), Findings()
    if (facts := read_json(files, "study.json")) is None:
        raise UsageError(f"{folder}: there is no study.json{looked_at(folder)}, so what belongs to the study is not "
                         "known. Give the folder that `rayexpand train` makes, <out>/<name>; if the file is gone, the "
                         "same `train` writes it again")
    config = facts["config"]
    wanted = [f"{name}-{seed}" for name in config["expansions"] for seed in config["seeds"]]
    for name in dict.fromkeys([*files.list("runs"), *wanted]):  # an object store lists no folders
        place = f"{folder}/runs/{name}"
        try:
            if is_loop(place):
                one: Findings = verify_loop(place, pixels=pixels)
            elif open_files(place).read("run.json") is not None:
                one = verify_run(run := open_run(place), pixels=pixels)
                one.problems += [] if one.problems else _dealt_otherwise(folder, config, run)
            else:
                continue
        except RayexpandError as error:
            found.problems.append(f"runs/{name}: {error}")
            continue
        found.add(one, f"runs/{name}")
    for kind, read in (("results", read_json), ("predictions", read_table)):
        for name in files.list(kind):
            try:
                read(files, f"{kind}/{name}")
            except DamagedFile as error:
                said = str(error).replace(f"{files.root}/", "")
                found.problems.append(f"{'' if said.startswith(kind) else f'{kind}/{name}: '}{said}. {AGAIN}")
    return found


def _dealt_otherwise(folder: str, config: Mapping[str, Any], run: Run) -> list[str]:
    """The problem of a control of a loop that was not dealt what follows from the decisions of that loop."""
    follows = run.facts.get("follows") or {}
    if (called := follows.get("control")) is None:
        return []
    name = run.config.name.removesuffix(f"-{called}-{follows['round']:04d}")
    expansion = config["expansions"].get(name.rpartition("-")[0]) or {}
    beside = Beside(loop_in(f"{folder}/runs/{name}"), run.config.out, expansion.get("oversample", OVERSAMPLE))
    for made, part in beside.runs(CALLED[called], None):
        if made.name == run.config.name and part is not None and part.follows == follows and np.array_equal(
                part.copies, run.plan.copies) and np.array_equal(part.first, run.plan.first):
            return []
    return [f"{run.facts['plan']}: is not what {called.replace('-', ' ')} of {name} are dealt by its decisions; delete "
            f"this run, and {AGAIN}"]
