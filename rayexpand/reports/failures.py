"""Failure cases: the samples of a run in which a guide sees the least of their own class (GIF, figure 5b). Drawn from
figures/<name>.json, which evaluation/failures.py fills, and the pictures of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rayexpand.evaluation.failures import failures
from rayexpand.reports import drawing
from rayexpand.reports.figure import Figure, write_figures
from rayexpand.reports.run import Picture, about, encoded_picture, seed_pictures
from rayexpand.reports.templates import render
from rayexpand.runs.lookup import rows_of, seed_table
from rayexpand.runs.status import read_classes, view_run, write_page
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import read_json, replace_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

BINS = 20


@dataclass(frozen=True, slots=True)
class FailureCase:
    name: str
    sample_id: str
    probability: float
    seen_as: str
    seen_probability: float
    seed: Picture
    sample: Picture


def write_failures_page(folder: str, *, rows: int = 12, name: str = "failures", guide: str | None = None,
                        checkpoint: str | None = None, images: int = 2000) -> Path | str:
    """Lets the guide look at about `images` samples of a run, keeps what it says, and writes figures/<name>.html with
    the `rows` lowest; returns where."""
    files = open_files(folder)
    found = failures(folder, guide=guide, checkpoint=checkpoint, images=images)
    for where in ("figures", ".tmp"):
        files.make_folder(where)
    replace_json(files, f"figures/{name}.json", found)
    stored = read_json(files, f"figures/{name}.json")
    assert stored is not None
    figure = probabilities(stored, name)
    write_figures(files, [figure])
    page = render("failures.html.j2", {"percent": lambda share: f"{100 * share:.1f} %"}, found=stored, figure=figure,
                  cases=_cases(folder, stored["judged"][:rows]), judged=len(stored["judged"]), file=f"{name}.json",
                  written=datetime.now(UTC))
    return write_page(files, f"figures/{name}.html", page)


def probabilities(found: Mapping[str, Any], name: str) -> Figure:
    """How many samples have which probability of their own class."""
    counts, edges = np.histogram([one["probability"] for one in found["judged"]], BINS, (0.0, 1.0))

    def draw(canvas: Canvas) -> None:
        axes = drawing.axes_of(canvas, "probability of the sample's own class", "samples")
        axes.stairs(counts, edges, fill=True, color=drawing.colour_of(0))
        axes.set(xlim=(0, 1))

    svg = drawing.svg((drawing.WIDTH, 220), draw, "Histogram of the probability that the guide gives the own class")
    return Figure(f"{name}-probabilities", svg, {"edges": edges.tolist(), "samples": counts.tolist()})


def _cases(folder: str, judged: list[Mapping[str, Any]]) -> list[FailureCase]:
    view = view_run(folder)
    names, ids = read_classes(view).display, [one["seed_id"] for one in judged]
    kept = rows_of(view, seed_table(view), ids).kept
    seeds = dict(zip(ids, seed_pictures(view, ids), strict=True))
    cases = []
    for one in judged:
        row = kept[one["seed_id"], one["copy"]]
        cases.append(FailureCase(names[one["label"]], one["sample_id"], one["probability"], names[one["seen_as"]],
                                 one["seen_probability"], seeds[one["seed_id"]],
                                 encoded_picture(row["image"]["bytes"], about(row))))
    return cases
