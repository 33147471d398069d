"""Figures of a study as inline SVG whose colours follow the page: light, dark, or whatever the reader prefers.

matplotlib draws in placeholder colours that become CSS variables (--ink, --soft, --line, --grey, --s0, --s1, ...), and
text stays text. A figure is WIDTH units wide, as much as a screen of 400 pixels has room for, so that no letter is
smaller there than it is drawn. A colour belongs to a line, the arms that differ in their ratio only, wherever it is
drawn; grey is real images only. Where arms of one line stand side by side, their dashes tell them apart.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 360  # of a figure; CSS pixels at its natural size
LETTERS = 10.5  # size of text
COLOURS = 6
MAX_NAME = 30  # letters of an arm's name in a figure
LABELLED, NAMED = 14, 9  # up to so many points of the cost figure all have names, else the emphasised have, so many
DASHES = ("", "6 2.5", "1.5 2", "8 2 1.5 2", "3 1.5", "10 4")  # of the arms of a line, as CSS writes them
_INK, _SOFT, _LINE, _CARD, _GREY = "#010203", "#010204", "#010205", "#010206", "#010207"
_SERIES = tuple(f"#0103{i:02x}" for i in range(COLOURS))
_MARKERS = "os^Dv*"
_VARIABLES = {_INK: "--ink", _SOFT: "--soft", _LINE: "--line", _CARD: "--card", _GREY: "--grey",
              **{colour: f"--s{i}" for i, colour in enumerate(_SERIES)}}


@dataclass(frozen=True, slots=True)
class FigurePoint:
    """Top-1 accuracy of an arm in percent, with the standard error of the mean over seeds, if any."""

    name: str
    mean: float
    se: float | None = None
    x: float = 0.0  # ratio, or seconds
    series: int | None = None  # colour; None: grey
    values: tuple[float, ...] = ()  # one per seed
    emphasised: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """Arms that differ in their ratio only; their points by rising ratio."""

    name: str
    points: tuple[FigurePoint, ...]
    series: int | None = None
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class FigureCurve:
    """One arm in training, mean over seeds: optimiser steps with the loss and the test accuracy (%) there."""

    name: str
    series: int | None
    dashes: str
    loss: tuple[tuple[float, float], ...]
    top1: tuple[tuple[float, float], ...]


def bars(points: Sequence[FigurePoint], label: str) -> str:
    """A bar for each arm from 0 below its name, its standard error as an error bar, its trainings as dots."""
    def draw(figure: Figure) -> None:
        axes = _axes(figure, "top-1 accuracy on the test images, last epoch (%)", "")
        for y, point in enumerate(points):
            axes.text(0, y - 0.24, _short(point.name), va="bottom", color=_INK)
            axes.barh(y, point.mean, 0.42, color=_colour(point.series))
            for colour, width in ((_CARD, 3.2), (_INK, 1.2)):
                if point.se is not None:
                    axes.errorbar(point.mean, y - 0.1, xerr=point.se, color=colour, capsize=2.5, lw=width)
            axes.plot(point.values, [y + 0.1] * len(point.values), ".", color=_CARD, markeredgecolor=_INK,
                      markersize=5.5, markeredgewidth=0.8)
            reach = max([point.mean + (point.se or 0), *point.values])
            axes.annotate(_plus_minus(point), (reach, y), (6, 0), textcoords="offset points", va="center", color=_INK)
        axes.set_yticks([])
        axes.set(ylim=(len(points) - 0.6, -0.85), xlim=(0, 1.35 * max(max([p.mean + (p.se or 0), *p.values])
                                                                     for p in points)))
        axes.set_xticks([tick for tick in axes.get_xticks() if tick <= 100])
        axes.grid(visible=False, axis="y")
    return _svg((WIDTH, 46 + 34 * len(points)), draw, label)


def ratios(lines: Sequence[Line], baseline: FigurePoint | None, label: str) -> str:
    """Accuracy against the ratio: expansions as lines, controls dashed, the baseline as a band."""
    def draw(figure: Figure) -> None:
        axes = _axes(figure, "synthetic images per real image", "top-1, last epoch (%)")
        places = sorted({point.x for line in lines for point in line.points})
        scaled = places[0] > 0 and places[-1] / places[0] >= 4
        if scaled:
            axes.set_xscale("log", base=2)
        if baseline:
            axes.axhline(baseline.mean, color=_GREY, lw=1.2)
            axes.axhspan(baseline.mean - (baseline.se or 0), baseline.mean + (baseline.se or 0), color=_GREY,
                         alpha=0.18, lw=0)
        for number, line in enumerate(lines):
            shift = 0.05 * (number - (len(lines) - 1) / 2)  # error bars at one ratio stand side by side
            x = [place.x * 2 ** shift if scaled else place.x + shift * (places[-1] - places[0] or 1) / 4
                 for place in line.points]
            _errors(axes, line.points, x, _colour(line.series), "--" if line.dashed else "-",
                    _MARKERS[(line.series or 0) % COLOURS])
        axes.minorticks_off()
        axes.set_xticks(places, [f"{place:g}" for place in places])
    return _svg((WIDTH, 300), draw, label)


def costs(points: Sequence[FigurePoint], unit: str, label: str) -> tuple[str, list[str]]:
    """Accuracy against cost, and the names of the points that found no room for a label."""
    from matplotlib.ticker import LogLocator

    unlabelled: list[str] = []

    def draw(figure: Figure) -> None:
        axes = _axes(figure, f"{unit}-seconds of one trial, with expansion and fits", "top-1, last epoch (%)")
        seconds = [point.x for point in points]
        if min(seconds) > 0 and max(seconds) / min(seconds) > 10:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.minorticks_off()
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        for point in points:
            _errors(axes, [point], [point.x], _colour(point.series), "", "s" if point.series is None else "o")
        axes.margins(0.12, 0.14)
        chosen = points
        if len(points) > LABELLED:
            chosen = sorted((p for p in points if p.emphasised), key=lambda p: (p.series is not None, -p.mean))[:NAMED]
        unlabelled.extend(_label(figure, axes, chosen, points))
    return _svg((WIDTH, 320), draw, label), unlabelled


def curves(lines: Sequence[FigureCurve], label: str) -> str:
    """Loss and test accuracy against optimiser steps, one above the other."""
    def draw(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True)
        for axes, words in ((upper, "training loss"), (lower, "test top-1 (%)")):
            _dress(axes, "", words)
        lower.set_xlabel("optimiser steps")
        for line in lines:
            for axes, places in ((upper, line.loss), (lower, line.top1)):
                if places:
                    (drawn,) = axes.plot(*zip(*places, strict=True), color=_colour(line.series), lw=1.6,
                                         marker="." if len(places) < 12 else "")
                    if line.dashes:
                        drawn.set_dashes([float(length) / 1.6 for length in line.dashes.split()])  # of the line's width
    return _svg((WIDTH, 300), draw, label)


def scores(groups: Sequence[tuple[str, Sequence[tuple[float, float]]]], ticks: Sequence[str], axis: str, label: str, *,
           log: bool = False) -> str:
    """Scores of the trials of a sweep against one field, groups of (x, %) by what became of them: best, finished,
    stopped. `ticks` names the values of a field that is not a number, whose x then count from 0."""
    styles = {"best": (_SERIES[1], "*", 13), "finished": (_SERIES[0], "o", 6), "stopped": (_GREY, "o", 5)}

    def draw(figure: Figure) -> None:
        axes = _axes(figure, axis, "score (%)")
        for state, places in groups:
            colour, marker, size = styles[state]
            axes.plot(*zip(*places, strict=True), marker, color=colour, markersize=size,
                      markerfacecolor=_CARD if state == "stopped" else colour, markeredgecolor=colour)
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.minorticks_off()
        if ticks:
            crowded = sum(min(len(tick), MAX_NAME) + 2 for tick in ticks) > WIDTH / 8
            axes.set_xticks(range(len(ticks)), [_short(tick) for tick in ticks], rotation=30 if crowded else 0,
                            ha="right" if crowded else "center")
        axes.margins(0.08, 0.1)
    return _svg((WIDTH, 260), draw, label)


# Drawing -------------------------------------------------------------------------------------------------------------


def _colour(series: int | None) -> str:
    return _GREY if series is None else _SERIES[series % COLOURS]


def _errors(axes: Axes, points: Sequence[FigurePoint], x: Sequence[float], colour: str, style: str,
            marker: str) -> None:
    axes.plot(x, [point.mean for point in points], style or "none", color=colour, lw=1.5, marker=marker, markersize=4.5,
              markerfacecolor=_CARD if style == "--" else colour)
    for point, place in zip(points, x, strict=True):
        if point.se is not None:
            axes.errorbar(place, point.mean, yerr=point.se, color=colour, capsize=2, lw=1)


def _label(figure: Figure, axes: Axes, chosen: Sequence[FigurePoint], points: Sequence[FigurePoint]) -> list[str]:
    """Writes names beside points where they cover neither a point nor another name; returns those without room."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    dots = [axes.transData.transform((point.x, point.mean)) for point in points]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in dots]
    for point, (x, _) in zip(points, dots, strict=True):
        low, high = (axes.transData.transform((point.x, point.mean + sign * (point.se or 0)))[1] for sign in (-1, 1))
        taken.append((x - 2, low, x + 2, high))
    room = axes.get_window_extent()
    without = []
    for point in sorted(chosen, key=lambda p: not p.emphasised):
        x, y = axes.transData.transform((point.x, point.mean))
        name = axes.annotate(_short(point.name), (point.x, point.mean), (0, 0), textcoords="offset pixels",
                             color=_INK, ha="left", va="center",
                             arrowprops={"arrowstyle": "-", "color": _SOFT, "lw": 0.5, "shrinkA": 0, "shrinkB": 3})
        size = name.get_window_extent()
        for right, up in _places(size.width):
            box = (x + right, y + up - size.height / 2, x + right + size.width, y + up + size.height / 2)
            inside = room.x0 < box[0] and box[2] < room.x1 and room.y0 < box[1] and box[3] < room.y1
            if inside and not any(_overlap(box, other) for other in taken):
                name.set_position((right, up))
                taken.append(box)
                break
        else:
            name.remove()
            without.append(point.name)
    return without


def _places(width: float) -> list[tuple[float, float]]:
    """Offsets of the left middle of a label from its point, near ones first."""
    rings = []
    for far in (9, 18, 30, 44, 60, 80):
        rings += [(far, 0.0), (-far - width, 0.0)]
        rings += [(-width / 2 + side * width / 2 + side * far / 2, sign * far) for sign in (1, -1)
                  for side in (0, 1, -1)]
    return rings


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _axes(figure: Figure, x: str, y: str) -> Axes:
    axes = figure.add_subplot()
    _dress(axes, x, y)
    return axes


def _dress(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.grid(color=_LINE, lw=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom" or (side == "left" and y != ""))


def _svg(size: tuple[int, int], draw: Callable[[Figure], None], label: str) -> str:
    """An <svg> element of `size` units, without anything that depends on the time or refers to another place."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": label, "text.parse_math": False, "font.family": ["DejaVu Sans"],
        "font.size": LETTERS, "axes.labelsize": LETTERS, "xtick.labelsize": LETTERS, "ytick.labelsize": LETTERS,
        "axes.labelcolor": _SOFT, "axes.edgecolor": _SOFT, "xtick.color": _SOFT, "ytick.color": _SOFT,
        "text.color": _INK, "axes.linewidth": 0.8, "axes.formatter.useoffset": False, "xtick.major.size": 3,
        "ytick.major.size": 0}
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        warnings.simplefilter("ignore")  # letters its own font lacks are still letters for the browser
        figure = Figure((size[0] / 72, size[1] / 72), dpi=72, layout="constrained")
        FigureCanvasAgg(figure)  # measures text in the units of the picture
        draw(figure)
        sink = io.StringIO()
        figure.savefig(sink, format="svg", transparent=True)
    return _inlined(sink.getvalue(), size, label)


def _inlined(svg: str, size: tuple[int, int], label: str) -> str:
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg"):], flags=re.S)
    body = re.sub(r"<svg[^>]*>", f'<svg class="plot" viewBox="0 0 {size[0]} {size[1]}" role="img" '
                                 f'aria-label="{html.escape(label)}">', body, count=1)
    body = re.sub(r"<g id=\"[^\"]*\"", "<g", body.replace("xlink:href", "href"))
    body = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", body)
    return re.sub(r"(fill|stroke): (#0[0-9a-f]{5})", lambda m: f"{m[1]}: var({_VARIABLES[m[2]]})", body)


def _plus_minus(point: FigurePoint) -> str:
    return f"{point.mean:.1f}" + (f" ± {point.se:.1f}" if point.se is not None else "")


def _short(name: str) -> str:
    """A long name without its middle: ratios stand at the end."""
    return name if len(name) <= MAX_NAME else f"{name[:MAX_NAME - 12]}…{name[-11:]}"


def thinned(places: Sequence[tuple[float, float]], most: int = 150) -> tuple[tuple[float, float], ...]:
    """At most about `most` of the places, evenly, the last among them."""
    step = math.ceil(len(places) / most) or 1
    return tuple(places[::-1][::step][::-1])
