"""Means with error bars against a number or a setting: several lines in a panel, several panels one above the other.

A line that begins below the baseline and reaches it has a crossover: the x, interpolated in log x where x is a positive
number, at which the means meet. It is a reading of means and has no interval; the section `value` of a study has one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rayexpand.reports.drawing import (
    CARD,
    GREY,
    INK,
    KEY_ROW,
    WIDTH,
    FigurePoint,
    colour_of,
    dress,
    error_bar,
    key,
    key_rows,
    marker_of,
    short,
    svg,
)
from rayexpand.reports.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

PANEL, ALONE = 190, 245  # height of one of several panels, of a single one
LOG_FROM = 4.0  # the largest x is so many times the smallest: a logarithmic axis


@dataclass(frozen=True, slots=True)
class Line:
    """Points by rising x, as those of the arms that differ in their ratio only."""

    name: str
    points: tuple[FigurePoint, ...]
    series: int | None = None
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """`value`: what is drawn, with its unit; `baseline`: a level with its error, as a band."""

    title: str
    value: str
    lines: tuple[Line, ...]
    baseline: FigurePoint | None = None


def lines(name: str, panels: Sequence[Panel], x: str, label: str, ticks: Sequence[str] = ()) -> Figure:
    """Panels with one x axis. `ticks` names the values of an x that is not a number; their x then count from 0."""
    names = list(dict.fromkeys([line.name for panel in panels for line in panel.lines]
                               + [f"{panel.baseline.name} ± s.e." for panel in panels if panel.baseline]))
    height = (ALONE if len(panels) == 1 else PANEL * len(panels)) + 40 + KEY_ROW * key_rows(names)[1]

    def draw(figure: Canvas) -> None:
        handles: dict[str, Any] = {}
        places = sorted({point.x for panel in panels for line in panel.lines for point in line.points})
        scaled = not ticks and places[0] > 0 and places[-1] / places[0] >= LOG_FROM
        for axes, panel in zip(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels, strict=True):
            dress(axes, "", panel.value)
            if len(panels) > 1 and panel.title:
                axes.set_title(short(panel.title, 48), loc="left", color=INK, fontsize="medium")
            if scaled:
                axes.set_xscale("log", base=2)
            handles |= _panel(axes, panel, places, scaled, bool(ticks))
        axes.set_xlabel(x)
        axes.minorticks_off()
        if len(places) <= 12:
            axes.set_xticks(places, [short(ticks[int(place)]) if ticks else f"{place:g}" for place in places])
        key(figure, [handles[one] for one in names], names)
    return Figure(name, svg((WIDTH, height), draw, label), {
        "kind": "lines", "x": x, "panels": [_numbers(panel, ticks) for panel in panels]})


def crossover(points: Sequence[FigurePoint], level: float) -> float | None:
    """The smallest x at which a line that begins below a level reaches it, between two points interpolated in log x
    (in x where that is not positive); None where it begins above or never reaches it."""
    if not points or points[0].mean >= level:
        return None
    for a, b in pairwise(points):
        if b.mean >= level:
            share = (level - a.mean) / (b.mean - a.mean)
            return math.exp(math.log(a.x) + share * math.log(b.x / a.x)) if a.x > 0 else a.x + share * (b.x - a.x)
    return None


def _panel(axes: Axes, panel: Panel, places: Sequence[float], scaled: bool, named: bool) -> dict[str, Any]:
    """Draws one panel; returns what its key shows by name."""
    from matplotlib.patches import Patch

    handles: dict[str, Any] = {}
    if base := panel.baseline:
        axes.axhline(base.mean, color=GREY, lw=1.2)
        axes.axhspan(base.mean - (base.se or 0), base.mean + (base.se or 0), color=GREY, alpha=0.18, lw=0)
        handles[f"{base.name} ± s.e."] = Patch(facecolor=GREY, alpha=0.35)
    gap = 0.0 if scaled or len(places) < 2 else (places[-1] - places[0]) / (4 * len(places))
    for number, line in enumerate(panel.lines):
        shift = 0.05 * (number - (len(panel.lines) - 1) / 2)  # error bars at one x stand side by side
        x = [point.x * 2 ** shift if scaled else point.x + 2 * shift * gap for point in line.points]
        colour = colour_of(line.series)
        (handles[line.name],) = axes.plot(
            x, [point.mean for point in line.points], "--" if line.dashed else "-", color=colour, lw=1.5,
            marker=marker_of(line.series), markersize=5,
            markerfacecolor=CARD if line.dashed else colour)
        for point, place in zip(line.points, x, strict=True):
            error_bar(axes, place, point, colour)
        if base and not named and not line.dashed and (at := crossover(line.points, base.mean)) is not None:
            axes.plot([at], [base.mean], "o", color=INK, markersize=8, markerfacecolor="none")
            axes.annotate(f"{at:.3g}", (at, base.mean), (0, -9), textcoords="offset points", ha="center", va="top",
                          color=INK)
    return handles


def _numbers(panel: Panel, ticks: Sequence[str]) -> dict[str, Any]:
    base = panel.baseline
    return {"panel": panel.title, "value": panel.value, "baseline": base and base.numbers(), "lines": [
        {"name": line.name, "dashed": line.dashed,
         **({"crossover": crossover(line.points, base.mean)} if base and not ticks and not line.dashed else {}),
         "points": [{**point.numbers(), "x": ticks[int(point.x)] if ticks else point.x} for point in line.points]}
        for line in panel.lines]}
