"""The runs that a folder stands for: a run for itself, a loop for its rounds, a study for one of each expansion, a
sweep for its pilots."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rayexpand.contract.errors import UsageError
from rayexpand.runs import joined
from rayexpand.runs.joined import is_loop, read_loop_facts
from rayexpand.runs.store import first_look, read_facts
from rayexpand.storage.files import Files
from rayexpand.storage.places import open_files
from rayexpand.studies.results import read_study, run_name, runs_of
from rayexpand.studies.sweep.sweep import read_results


def run_folders(folder: str) -> list[str]:
    """Of a study those of its first repetition, of a sweep those of its trials in the order of their numbers, of each
    its first repetition. Raises UsageError where there is none."""
    files = open_files(folder)
    if first_look(files, "study.json") is not None:
        trials = [one for one in read_study(folder).planned.values() if one]
        first = min((one["seed"] for one in trials), default=None)
        found = list(_there(files, "runs", (run for one in trials if one["seed"] == first for run in runs_of(one))))
    elif first_look(files, "sweep.json") is not None:
        found = list(dict.fromkeys(run for one in read_results(files).values()
                                   for run in _first_seed(_there(files, "pilots", one.get("pilots") or ()))))
    else:
        found = [folder]
    found = [run for one in found for run in (joined.run_folders(open_files(one)) if is_loop(one) else [one])]
    if not found:
        raise UsageError(f"{folder}: no run of it is here yet; run `rayexpand expand`, `rayexpand train` or "
                         "`rayexpand sweep` first, or name run folders")
    return found


def _there(files: Files, below: str, runs: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Runs as their trials name them, or below this folder where that was moved, with their run.json; each once, those
    that are there."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        for one in (run, f"{files.root}/{below}/{run_name(run)}"):
            if is_loop(one) or open_files(one).read("run.json") is not None:
                found[one] = read_loop_facts(open_files(one)) if is_loop(one) else read_facts(open_files(one))
                break
    return found


def _first_seed(runs: dict[str, dict[str, Any]]) -> list[str]:
    """Runs of the lowest random seed."""
    seeds = [facts["config"].get("run", facts["config"]).get("seed", 0) for facts in runs.values()]
    return [run for run, seed in zip(runs, seeds, strict=True) if seed == min(seeds)]
