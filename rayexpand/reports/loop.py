"""The page of a loop: what is spent and left, who was dealt what, what classifiers made of it, and what that took.

It is written from the files of the loop at any moment; it has no script, loads nothing, and escapes what comes from
files. The pages of its rounds lie in their folders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from rayexpand.classifier.statistics import crossed
from rayexpand.contract.errors import UsageError
from rayexpand.reports.drawing import FigurePoint
from rayexpand.reports.figure import Figure, write_figures
from rayexpand.reports.guided import Look, look
from rayexpand.reports.lines import Line, Panel, lines
from rayexpand.reports.run import Picture, about, encoded_picture, painted_as, picture_pages, seed_pictures
from rayexpand.reports.templates import render, settings_of
from rayexpand.runs.allocation import dealt_words
from rayexpand.runs.joined import read_loop_facts, run_folders
from rayexpand.runs.lookup import SeedRows, keyed_seeds, rows_of, seed_table
from rayexpand.runs.status import RunView, duration, read_classes, view_run, write_page
from rayexpand.storage.files import Files
from rayexpand.storage.places import open_files
from rayexpand.studies.rounds.decisions import read_chain
from rayexpand.studies.rounds.status import read_loop_status
from rayexpand.studies.rounds.summary import last_guided, loop_summary

SHOWN_SEEDS, OF_A_ROUND = 10, 2  # seeds with pictures, and samples of each round
ALL_CLASSES = 50  # up to here every class has its line
MOST_ROUNDS = 8  # with a column of pictures
ASKED_FOR = {"folds": "seeds, by classifiers trained without them",
             "in_sample": "seeds, by classifiers trained on them", "validation": "validation images"}


@dataclass(frozen=True, slots=True)
class RoundsRow:
    """A seed beside its samples by round."""

    name: str  # class
    seed: Picture
    cells: tuple[tuple[Picture, ...], ...]


def write_loop_report(folder: str, strips: int = 0) -> Path | str:
    """Writes report.html and figures/ into a loop folder and returns the path or URL of the page. `strips`: of the last
    guided round, so many samples beside plain ones of the same noise, for which its models are loaded.

    Raises UsageError where there is no loop, or no guided round to compare; DamagedFile; EnvironmentFault if the page
    cannot be written.
    """
    files = open_files(folder)
    found, facts = loop_summary(folder), read_loop_facts(files)
    views = [view_run(one) for one in run_folders(files)]
    figures = [one for one in (_accuracy_figure(found),) if one is not None]
    write_figures(files, figures)
    page = render("loop.html.j2", _FILTERS, found=found, facts=facts, asked_for=ASKED_FOR,
        status=read_loop_status(folder), figures=figures, dealt=_dealt_lines(found), costs=_costs(found),
        all_classes=len(found["classes"]) <= ALL_CLASSES,
        sheet=_sheet(views[:MOST_ROUNDS]), shown_rounds=min(len(views), MOST_ROUNDS),
        look=_look(files, facts, strips) if strips else None, settings=settings_of({
            **facts["config"]["run"], **{name: facts["config"][name] for name in ("rounds", "training")}}),
        folder=str(folder), pictures=picture_pages(files), begun=len(views), written=datetime.now(UTC))
    return write_page(files, "report.html", page)


def _look(files: Files, facts: Mapping[str, Any], strips: int) -> Look:
    run = last_guided(files, read_chain(files, facts))
    if run is None:
        raise UsageError(f"--strips: no guided round of {files.root} has samples; leave it out, or guide one with "
                         "rounds.guided_from")
    return look(run, strips)


# Numbers -------------------------------------------------------------------------------------------------------------


def _accuracy_figure(found: Mapping[str, Any]) -> Figure | None:
    """Share named right after each round, with standard errors over images."""
    drawn = [Line(ASKED_FOR[on], tuple(
        FigurePoint(f"after round {one['after']}", 100 * one["accuracy"], _error(one), one["after"])
        for one in found["accuracy"] if one["on"] == on), series) for series, on in enumerate(ASKED_FOR)]
    drawn = [one for one in drawn if one.points]
    if not drawn:
        return None
    return lines("accuracy-by-round", [Panel("named right", "named right, %", tuple(drawn))], "rounds trained on",
                 "Accuracy by round")


def _error(line: Mapping[str, Any]) -> float | None:
    return 100 * crossed(np.arange(line["images"]) < line["right"]).se if line["images"] > 1 else None


def _dealt_lines(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Samples of each class by round; where there are many, the classes that got the most and the fewest."""
    by_class = [{"name": name, "rounds": list(of_rounds), "total": sum(of_rounds)} for name, *of_rounds in zip(
        found["classes"], *found["dealt"], strict=True)] if found["dealt"] else []
    top = max((one["total"] for one in by_class), default=0) or 1
    chosen = by_class
    if len(by_class) > ALL_CLASSES:
        ordered = sorted(by_class, key=lambda one: -one["total"])
        chosen = [*ordered[:ALL_CLASSES // 2], *ordered[-(ALL_CLASSES // 2):]]
    return [{**one, "share": one["total"] / top} for one in chosen]


def _costs(found: Mapping[str, Any]) -> dict[str, Any]:
    """What sampling, scoring and guides took, and a guided sample against a plain one."""
    rounds = found["rounds"]
    total = {name: sum(one.get(f"{name}_seconds", 0.0) for one in (*rounds, found["further"]))
             for name in ("sampling", "scoring", "guide")}
    each = {guided: [(one["sampling_seconds"], one["planned"] - one["pending"]) for one in rounds
                     if one["guided"] == guided and one["seconds_per_sample"]] for guided in (False, True)}
    plain, guided = (sum(one for one, _ in each[key]) / n if (n := sum(n for _, n in each[key])) else None
                     for key in (False, True))
    whole = sum(total.values())
    return {**total, "whole": whole, "scoring_share": (total["scoring"] + total["guide"]) / whole if whole else None,
            "ratio": guided / plain if plain and guided else None}


# Pictures ------------------------------------------------------------------------------------------------------------


def _sheet(views: Sequence[RunView]) -> list[RoundsRow]:
    """A seed of some classes, those that most rounds dealt to, chosen by a key; its first samples of each round."""
    if not views:
        return []
    tables = [seed_table(view) for view in views]
    chosen = [(label, seeds[0]) for label, seeds in keyed_seeds(tables, 1, SHOWN_SEEDS).items()]
    ids, classes = [one for _, one in chosen], read_classes(views[0])
    found = [rows_of(view, table, ids, OF_A_ROUND) for view, table in zip(views, tables, strict=True)]
    pictures = seed_pictures(views[0], ids)

    def cell(rows: SeedRows, seed_id: str) -> tuple[Picture, ...]:
        there = [rows.kept[place] for place in rows.places([seed_id], OF_A_ROUND) if place in rows.kept]
        return tuple(encoded_picture(one["image"]["bytes"], about(one), painted_as(one, classes)) for one in there)

    return [RoundsRow(classes.display[label], picture, tuple(cell(rows, seed_id) for rows in found))
            for (label, seed_id), picture in zip(chosen, pictures, strict=True)]


_FILTERS: dict[str, Callable[..., Any]] = {
    "number": lambda n: f"{n:,}", "percent": lambda share: f"{100 * share:.1f} %", "duration": duration,
    "dealt": dealt_words, "moment": lambda unix: datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M UTC")}
