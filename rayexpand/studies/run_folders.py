"""The runs that a folder stands for: a run for itself, a study for one of each expansion, a sweep for its pilots."""

from __future__ import annotations

from collections.abc import Iterable

from rayexpand.contract.errors import UsageError
from rayexpand.runs.store import first_look
from rayexpand.storage.files import Files
from rayexpand.storage.places import open_files
from rayexpand.studies.results import read_study, runs_of
from rayexpand.studies.sweep.sweep import read_results


def run_folders(folder: str) -> list[str]:
    """Of a study those of its first repetition, of a sweep those of finished trials, in the order of their numbers.
    Raises UsageError where there is none."""
    files = open_files(folder)
    if first_look(files, "study.json") is not None:
        trials = [one for one in read_study(folder).planned.values() if one]
        first = min((one["seed"] for one in trials), default=None)
        found = _there(files, "runs", (run for one in trials if one["seed"] == first for run in runs_of(one)))
    elif first_look(files, "sweep.json") is not None:
        found = _there(files, "pilots", (f"{folder.rstrip('/')}/pilots/{name}" for one in read_results(files).values()
                                         for name in one.get("pilots") or ()))
    else:
        return [folder]
    if not found:
        raise UsageError(f"{folder}: no run of it is here yet; run `rayexpand train` or `rayexpand sweep` first, or "
                         "name run folders")
    return found


def _there(files: Files, below: str, runs: Iterable[str]) -> list[str]:
    """Runs as their trials name them, or below this folder where that was moved; each once, those that are there."""
    found: dict[str, None] = {}
    for run in runs:
        here = f"{files.root}/{below}/{run.rstrip('/').rpartition('/')[2]}"
        for one in (run, here):
            if open_files(one).read("run.json") is not None:
                found[one] = None
                break
    return list(found)
