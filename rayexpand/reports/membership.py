"""The page of the audit `membership`: ROC of every attack beside the private line and chance, and what it says.

Drawn from result.json of the audit alone; nothing is attacked again.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayexpand.contract.errors import UsageError
from rayexpand.reports.drawing import DASHES, GREY, INK, SERIES, SOFT, WIDTH, axes_of, key, key_rows, svg
from rayexpand.reports.figure import Figure, write_figures
from rayexpand.reports.templates import render, settings_of
from rayexpand.runs.status import write_page
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

LEAST = 1e-4  # of either axis, where there are non-members enough
PRIVATE, CHANCE, NULL = "private", "chance", "permuted"
NAMES = {"classifier": "classifier trained on samples", "samples": "samples",
         PRIVATE: "private: classifier of the real images"}


def write_membership_page(folder: str) -> Path | str:
    """Writes membership.html, and the figure with its numbers, into the folder of an audit; returns where. Raises
    UsageError where the audit has no such section, DamagedFile."""
    files = open_files(folder)
    found = (read_json(files, "result.json") or {}).get("membership")
    if found is None:
        raise UsageError(f"{folder}: there is no result of an audit `membership`; run `rayexpand audit` with one")
    figure = roc(found)
    write_figures(files, [figure])
    page = render("membership.html.j2", {"percent": percent, "fixed": fixed, "called": lambda line: NAMES[line]},
                  found=found, figure=figure, settings=settings_of(found["config"]), written=datetime.now(UTC),
                  name=str(files.root).rpartition("/")[2])
    return write_page(files, "membership.html", page)


def roc(found: Mapping[str, Any]) -> Figure:
    """TPR against FPR on logarithmic axes, by line; rates of 0 lie on the axis."""
    curves = {name: one["roc"] for name, one in found["lines"].items()}
    curves[NULL] = found["lines"][found["worse"]]["null"]["roc"]
    least = max(LEAST, 1 / found["lines"][found["worse"]]["non_members"])
    curves = {name: [(fpr, tpr) for fpr, tpr in points] for name, points in curves.items()}

    def draw(figure: Canvas) -> None:
        axes = axes_of(figure, "false positive rate", "true positive rate")
        axes.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1.1))
        axes.minorticks_off()
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        handles = axes.plot([least, 1], [least, 1], color=SOFT, lw=1)
        for number, (name, points) in enumerate(curves.items()):
            colour = {PRIVATE: INK, NULL: GREY}.get(name, SERIES[number])
            drawn, = axes.plot([max(fpr, least) for fpr, _ in points], [max(tpr, least) for _, tpr in points],
                               color=colour, lw=1.6, drawstyle="steps-post")
            if DASHES[number]:
                drawn.set_dashes([float(length) / 1.6 for length in DASHES[number].split()])  # of the line's width
            handles.append(drawn)
        key(figure, handles, names)

    names = [CHANCE, *(NAMES.get(name, f"{name} memberships") for name in curves)]
    picture = svg((WIDTH, 300 + 15 * key_rows(names)[1]), draw, "ROC of membership attacks, logarithmic")
    return Figure("membership-roc", picture, {
        "kind": "roc", "x": "false positive rate", "y": "true positive rate", "least": least,
        "lines": [{"name": name, "points": [list(point) for point in points]} for name, points in curves.items()]})


def percent(one: Mapping[str, float]) -> str:
    """A share with its interval, in percent."""
    return f"{100 * one['value']:.2g} [{100 * one['low']:.2g}, {100 * one['high']:.2g}]"


def fixed(one: Mapping[str, float]) -> str:
    return f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"
