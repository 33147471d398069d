"""Figures of features: samples of several runs, the real images and the prototypes of a guide in one plane, all classes
together and each alone. Drawn from what evaluation/maps.py keeps in figures/<name>.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rayexpand.evaluation.maps import REAL, feature_map
from rayexpand.reports import drawing
from rayexpand.reports.figure import Figure, write_figures
from rayexpand.reports.templates import render
from rayexpand.runs.status import write_page
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import read_json, replace_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

PLANES = {"pca": "principal axes", "tsne": "t-SNE"}
COLUMNS, PANEL = 4, 88  # of the classes alone; side of a panel
_MARKS = {"class": ("*", 130.0), "group": ("*", 60.0)}

Point = Mapping[str, Any]


def write_map_page(folders: Sequence[str], out: str, *, name: str = "map", guide: str | None = None,
                   checkpoint: str | None = None, images: int = 20, classes: int = 10) -> Path | str:
    """Computes and keeps the map of some runs below `out`, draws its figures and the page; returns where that is."""
    files = open_files(out)
    found = feature_map(folders, guide=guide, checkpoint=checkpoint, images=images, classes=classes)
    for where in ("figures", ".tmp"):
        files.make_folder(where)
    replace_json(files, f"figures/{name}.json", found)
    stored = read_json(files, f"figures/{name}.json")
    assert stored is not None
    figures = {plane: (whole_figure(stored, plane, name), class_figure(stored, plane, name)) for plane in PLANES}
    write_figures(files, [one for pair in figures.values() for one in pair])
    page = render("map.html.j2", {"percent": lambda share: f"{100 * share:.1f} %"}, found=stored, planes=PLANES,
                  figures=figures, counts=_counts(stored), has_groups=any(
                      one["kind"] == "group" for one in stored["points"]), has_marks=any(
                      one["kind"] in _MARKS for one in stored["points"]), file=f"{name}.json",
                  written=datetime.now(UTC))
    return write_page(files, f"figures/{name}.html", page)


def whole_figure(found: Mapping[str, Any], plane: str, name: str) -> Figure:
    """All classes in one plane, runs by colour and mark; a class name stands at the middle of its images."""
    names = [one["name"] for one in found["runs"]]
    _, lines = drawing.key_rows(["real images", *names, "prototypes"])

    def draw(canvas: Canvas) -> None:
        axes = canvas.add_subplot()
        _bare(axes)
        handles = _scatter(axes, found["points"], plane, len(names), 14.0)
        drawing.key(canvas, list(handles.values()), [_word(number, names) for number in handles])
        _name_classes(canvas, axes, found, plane)

    label = f"Real images, samples of {len(names)} runs and prototypes by {PLANES[plane]}"
    svg = drawing.svg((drawing.WIDTH, 330 + drawing.KEY_ROW * lines), draw, label)
    return Figure(f"{name}-{plane}", svg, _numbers(found, plane))


def class_figure(found: Mapping[str, Any], plane: str, name: str) -> Figure:
    """A panel for each class, enlarged to its own points."""
    names, labels = [one["name"] for one in found["runs"]], list(found["classes"])
    _, lines = drawing.key_rows(["real images", *names, "prototypes"])
    rows = -(-len(labels) // COLUMNS)

    def draw(canvas: Canvas) -> None:
        handles: dict[Any, Any] = {}
        panels = np.atleast_1d(canvas.subplots(rows, COLUMNS)).ravel()
        for axes, label in zip(panels, labels, strict=False):
            _bare(axes)
            axes.set_title(drawing.short(found["classes"][label], 18), fontsize=drawing.LETTERS, pad=3)
            axes.margins(0.08)
            mine = [one for one in found["points"] if str(one["label"]) == label]
            handles |= _scatter(axes, mine, plane, len(names), 9.0)
        for axes in panels[len(labels):]:
            axes.set_axis_off()
        ordered = sorted(handles, key=lambda one: (one == "prototype", one != REAL, one if isinstance(one, int) else 0))
        drawing.key(canvas, [handles[one] for one in ordered], [_word(one, names) for one in ordered])

    label = f"Each of {len(labels)} classes alone, by {PLANES[plane]}"
    svg = drawing.svg((drawing.WIDTH, (PANEL + 12) * rows + drawing.KEY_ROW * lines), draw, label)
    return Figure(f"{name}-{plane}-classes", svg, _numbers(found, plane))


def _scatter(axes: Axes, points: Sequence[Point], plane: str, runs: int, size: float) -> dict[Any, Any]:
    """Draws points; a handle for each run, REAL and "prototype" that has one."""
    handles: dict[Any, Any] = {}
    for number in (REAL, *range(runs)):
        x, y = _places([one for one in points if one["run"] == number and one["kind"] not in _MARKS], plane)
        if len(x):
            colour = drawing.colour_of(None if number == REAL else number)
            handles[number] = axes.scatter(
                x, y, s=size * (1.7 if number == REAL else 1.0), linewidths=0.9, edgecolors=colour,
                marker="o" if number == REAL else drawing.MARKERS[(number + 1) % len(drawing.MARKERS)],
                facecolors="none" if number == REAL else colour)
    for kind, (marker, area) in _MARKS.items():
        x, y = _places([one for one in points if one["kind"] == kind], plane)
        if len(x):
            drawn = axes.scatter(x, y, s=area * size / 14, marker=marker, edgecolors=drawing.INK,
                                 facecolors=drawing.CARD if kind == "class" else "none", linewidths=1.0, zorder=4)
            handles.setdefault("prototype", drawn)
    return handles


def _places(points: Sequence[Point], plane: str) -> np.ndarray:
    """(2, n)."""
    return np.array([one[plane] for one in points], np.float64).reshape(-1, 2).T


def _word(number: Any, names: Sequence[str]) -> str:
    return "prototypes" if number == "prototype" else "real images" if number == REAL else names[number]


def _bare(axes: Axes) -> None:
    """A frame without numbers: units of these planes mean nothing."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(drawing.LINE)


def _name_classes(canvas: Canvas, axes: Axes, found: Mapping[str, Any], plane: str) -> None:
    """Names beside the middle of their class, where they do not cover each other."""
    canvas.draw_without_rendering()
    canvas.set_layout_engine("none")
    taken: list[Any] = []
    for label, name in found["classes"].items():
        mine = [one[plane] for one in found["points"] if str(one["label"]) == label]
        if not mine:
            continue
        text = axes.annotate(drawing.short(name, 16), np.median(mine, axis=0), (0, 0), textcoords="offset points",
                             color=drawing.INK, ha="center", va="center", zorder=5, fontweight="bold",
                             bbox={"facecolor": drawing.CARD, "edgecolor": "none", "alpha": 0.75, "pad": 0.6})
        for place in ((0, 15), (0, -15), (0, 27), (0, -27), (34, 0), (-34, 0), (0, 0)):
            text.set_position(place)
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def _numbers(found: Mapping[str, Any], plane: str) -> dict[str, Any]:
    names = [one["name"] for one in found["runs"]]
    return {"plane": plane, **found[plane], "points": [
        {"kind": one["kind"], "run": "" if one["run"] == REAL else names[one["run"]], "name": one["name"],
         "class": found["classes"][str(one["label"])], "x": one[plane][0], "y": one[plane][1]}
        for one in found["points"]]}


def _counts(found: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(what, points) of the real images and of each run."""
    shown = [one["run"] for one in found["points"] if one["kind"] in ("real", "sample")]
    return [("real images", shown.count(REAL)), *((one["name"], shown.count(number))
                                                  for number, one in enumerate(found["runs"]))]
