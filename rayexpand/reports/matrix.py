"""The same seeds by several runs, side by side: what a method, a prompt, a strength, a scale or fine-tuning changes.

Runs are joined by seed id and copy. Seeds are chosen by a key of their id, those that the most of the runs share, and a
row that is not there says why. figures/<name>.json holds which samples the page shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rayexpand.contract.errors import UsageError
from rayexpand.contract.schema import ClassTable
from rayexpand.reports.run import Picture, about, encoded_picture, painted_as, seed_pictures
from rayexpand.reports.templates import render
from rayexpand.runs.differences import differences_of
from rayexpand.runs.lookup import SeedRows, keyed_seeds, rows_of, seed_table
from rayexpand.runs.status import RunView, read_classes, view_run, write_page
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import replace_json

MOST_RUNS, MOST_PICTURES = 16, 800
LINES = 5  # of settings above a column


@dataclass(frozen=True, slots=True)
class Column:
    """A run: its name and the settings that it does not share with all others."""

    name: str
    folder: str
    method: str
    settings: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class MatrixRow:
    """Seeds of one class, and of each run what it made of them; where nothing is shown, the title says why."""

    name: str
    seeds: tuple[Picture, ...]
    cells: tuple[tuple[Picture, ...], ...]


def write_matrix(folders: Sequence[str], out: str, *, name: str = "matrix", rows: int = 10, copies: int = 1,
                 by_class: bool = False) -> Path | str:
    """Writes figures/<name>.html and .json below `out`; returns where the page is.

    A row is one seed, `rows` of them over the classes in turn, with its first `copies` samples in a cell. `by_class`: a
    row is one of `rows` classes, and a cell has the first sample of each of `copies` of its seeds. Raises UsageError
    for runs of other classes, or without a seed.
    """
    views = [view_run(folder) for folder in folders]
    problems = _problems(views, rows * copies)
    if problems:
        raise UsageError("\n  ".join(["--matrix: these runs cannot stand side by side:", *problems]))
    tables = [seed_table(view) for view in views]
    chosen = _chosen(tables, rows, copies, by_class)
    if not chosen:
        raise UsageError(f"--matrix: {folders[0]} plans no sample; run `rayexpand expand` with a ratio above 0")
    ids = [seed_id for of_row in chosen for seed_id in of_row[1]]
    found = [rows_of(view, table, ids, 1 if by_class else copies) for view, table in zip(views, tables, strict=True)]
    classes = read_classes(views[0])
    numbers = {"chosen": "by a key of the seed id", "runs": _facts(views), "rows": [
        {"class": classes.display[label], "label": label, "seed_ids": seeds,
         "cells": [list(_cell_facts(one, seeds, 1 if by_class else copies)) for one in found]}
        for label, seeds in chosen]}
    strips = list(_strips(views, chosen, found, classes, 1 if by_class else copies))
    page = render("matrix.html.j2", {}, columns=_columns(views), strips=strips, by_class=by_class,
                  notes=_notes(views), absent=_absent(numbers), file=f"{name}.json", written=datetime.now(UTC))
    files = open_files(out)
    for where in ("figures", ".tmp"):
        files.make_folder(where)
    replace_json(files, f"figures/{name}.json", numbers)
    return write_page(files, f"figures/{name}.html", page)


def _problems(views: Sequence[RunView], pictures: int) -> list[str]:
    found = []
    if len(views) > MOST_RUNS:
        found.append(f"there are {len(views)}, and a page has room for {MOST_RUNS}; name fewer")
    elif pictures * (len(views) + 1) > MOST_PICTURES:
        found.append(f"{pictures * (len(views) + 1):,} pictures are more than the {MOST_PICTURES} of a page; lower "
                     "--rows or --copies, or name fewer runs")
    first = read_classes(views[0])
    found += [f"{view.files.root} has other classes than {views[0].files.root}, so a row would mean two things"
              for view in views[1:] if read_classes(view).key != first.key]
    return found


def _chosen(tables: Sequence[Any], rows: int, copies: int, by_class: bool) -> list[tuple[int, list[str]]]:
    """(label, seeds) of every row, by label."""
    if by_class:
        return list(keyed_seeds(tables, copies, rows).items())
    in_turn = keyed_seeds(tables, rows, rows)
    turns = [(label, seeds[turn]) for turn in range(rows) for label, seeds in in_turn.items() if turn < len(seeds)]
    return [(label, [seed_id]) for label, seed_id in sorted(turns[:rows], key=lambda one: one[0])]


def _cell_facts(found: SeedRows, seeds: Sequence[str], copies: int) -> Iterator[dict[str, Any]]:
    """What stands in a cell: the sample with its draw and scores, or why there is none."""
    for place in found.places(seeds, copies):
        row = found.kept.get(place)
        if row is None:
            yield {"sample_id": f"{place[0]}/{place[1]}", "absent": found.absence(place)}
        else:
            yield {**{name: row[name] for name in ("sample_id", "sample_sha256", "label", "prompt", "strength",
                                                   "steps_run", "attempt")},
                   "scores": {one["name"]: one["value"] for one in row["scores"] or ()}}


def _strips(views: Sequence[RunView], chosen: Sequence[tuple[int, list[str]]], found: Sequence[SeedRows],
            classes: ClassTable, copies: int) -> Iterator[MatrixRow]:
    ids = [seed_id for _, seeds in chosen for seed_id in seeds]
    pictures = dict(zip(ids, seed_pictures(_owner(views, found, ids), ids), strict=True))
    for label, seeds in chosen:
        cells = tuple(tuple(_shown(one, place, classes) for place in one.places(seeds, copies)) for one in found)
        yield MatrixRow(classes.display[label], tuple(pictures[seed_id] for seed_id in seeds), cells)


def _owner(views: Sequence[RunView], found: Sequence[SeedRows], ids: Sequence[str]) -> RunView:
    """A run that has all of the seeds, or the one with the most."""
    return max(zip(views, found, strict=True), key=lambda one: sum(seed_id in one[1].planned for seed_id in ids))[0]


def _shown(found: SeedRows, place: tuple[str, int], classes: ClassTable) -> Picture:
    row = found.kept.get(place)
    if row is None:
        return Picture(title=f"{place[0]}/{place[1]}: {found.absence(place)}", caption=found.absence(place))
    return encoded_picture(row["image"]["bytes"], about(row), painted_as(row, classes))


# What tells runs apart -----------------------------------------------------------------------------------------------


def _facts(views: Sequence[RunView]) -> list[dict[str, Any]]:
    return [{"run": str(view.files.root), "run_digest": view.run["run_digest"], "differs": dict(differing)}
            for view, differing in zip(views, differences_of([view.run["config"] for view in views]), strict=True)]


def _columns(views: Sequence[RunView]) -> list[Column]:
    differing = differences_of([view.run["config"] for view in views])
    return [Column(view.title, str(view.files.root), view.run["config"]["method"]["name"],
                   tuple(lines[:LINES]) + ((("and more", f"{len(lines) - LINES} settings"),) if len(lines) > LINES
                                           else ()))
            for view, lines in zip(views, differing, strict=True)]


def _notes(views: Sequence[RunView]) -> list[str]:
    places = {view.run["config"]["data"].get("path") or view.run["config"]["data"].get("source") for view in views}
    return [] if len(places) == 1 else [f"The runs name {len(places)} seed datasets ({', '.join(map(str, places))}); "
                                        "rows are joined by seed id, and the seed shown is that of one of them."]


def _absent(numbers: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(why, how many) of the rows that are not shown."""
    reasons = [one["absent"] for row in numbers["rows"] for cell in row["cells"] for one in cell if "absent" in one]
    return [(reason, reasons.count(reason)) for reason in dict.fromkeys(reasons)]
