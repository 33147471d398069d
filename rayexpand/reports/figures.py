"""Figures of one study: every arm, accuracy against cost, training curves; and the trials of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rayexpand.reports.drawing import (
    CARD,
    GREY,
    INK,
    MAX_NAME,
    SERIES,
    WIDTH,
    FigurePoint,
    axes_of,
    colour_of,
    dress,
    error_bar,
    key,
    key_rows,
    plus_minus,
    short,
    svg,
)
from rayexpand.reports.figure import Figure
from rayexpand.reports.labels import label_points

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

LABELLED, NAMED = 14, 9  # up to so many points of the cost figure all have names, else the emphasised have, so many
TOP1 = "top-1, last epoch (%)"


@dataclass(frozen=True, slots=True)
class FigureCurve:
    """One arm in training, mean over seeds: optimiser steps with the loss and the test accuracy (%) there."""

    name: str
    series: int | None
    dashes: str
    loss: tuple[tuple[float, float], ...]
    top1: tuple[tuple[float, float], ...]


def bars(points: Sequence[FigurePoint], label: str) -> Figure:
    """A bar for each arm from 0 below its name, its standard error as an error bar, its trainings as dots."""
    def draw(figure: Canvas) -> None:
        axes = axes_of(figure, "top-1 accuracy on the test images, last epoch (%)", "")
        for y, point in enumerate(points):
            axes.text(0, y - 0.24, short(point.name), va="bottom", color=INK)
            axes.barh(y, point.mean, 0.42, color=colour_of(point.series))
            for colour, width in ((CARD, 3.2), (INK, 1.2)):
                if point.se is not None:
                    axes.errorbar(point.mean, y - 0.1, xerr=point.se, color=colour, capsize=2.5, lw=width)
            axes.plot(point.values, [y + 0.1] * len(point.values), ".", color=CARD, markeredgecolor=INK,
                      markersize=5.5, markeredgewidth=0.8)
            reach = max([point.mean + (point.se or 0), *point.values])
            axes.annotate(plus_minus(point), (reach, y), (6, 0), textcoords="offset points", va="center", color=INK)
        axes.set_yticks([])
        axes.set(ylim=(len(points) - 0.6, -0.85), xlim=(0, 1.35 * max(max([p.mean + (p.se or 0), *p.values])
                                                                     for p in points)))
        axes.set_xticks([tick for tick in axes.get_xticks() if tick <= 100])
        axes.grid(visible=False, axis="y")
    return Figure("arms", svg((WIDTH, 46 + 34 * len(points)), draw, label),
                  {"kind": "bars", "value": TOP1, "arms": [point.numbers() for point in points]})


def costs(points: Sequence[FigurePoint], unit: str, label: str) -> tuple[Figure, list[str]]:
    """Accuracy against cost, and the names of the points that found no room for a label."""
    from matplotlib.ticker import LogLocator

    unlabelled: list[str] = []
    words = f"{unit}-seconds of one trial, with expansion and fits"

    def draw(figure: Canvas) -> None:
        axes = axes_of(figure, words, TOP1)
        seconds = [point.x for point in points]
        if min(seconds) > 0 and max(seconds) / min(seconds) > 10:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.minorticks_off()
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        for point in points:
            colour = colour_of(point.series)
            axes.plot(point.x, point.mean, "s" if point.series is None else "o", color=colour, markersize=4.5)
            error_bar(axes, point.x, point, colour)
        axes.margins(0.12, 0.14)
        chosen = points
        if len(points) > LABELLED:
            chosen = sorted((p for p in points if p.emphasised), key=lambda p: (p.series is not None, -p.mean))[:NAMED]
        unlabelled.extend(label_points(figure, axes, chosen, points))
    picture = svg((WIDTH, 320), draw, label)
    return Figure("cost", picture, {"kind": "cost", "x": words, "value": TOP1,
                                    "arms": [{**point.numbers(), "x": point.x} for point in points]}), unlabelled


def curves(name: str, lines: Sequence[FigureCurve], label: str) -> Figure:
    """Loss and test accuracy against optimiser steps, one above the other."""
    names = [line.name for line in lines]

    def draw(figure: Canvas) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True)
        for axes, words in ((upper, "training loss"), (lower, "test top-1 (%)")):
            dress(axes, "", words)
        lower.set_xlabel("optimiser steps")
        handles = []
        for line in lines:
            for axes, places in ((upper, line.loss), (lower, line.top1)):
                (drawn,) = axes.plot(*zip(*places, strict=True) if places else ([], []),
                                     color=colour_of(line.series), lw=1.6, marker="." if len(places) < 12 else "")
                if line.dashes:
                    drawn.set_dashes([float(length) / 1.6 for length in line.dashes.split()])  # of the line's width
            handles.append(drawn)
        key(figure, handles, names)
    return Figure(name, svg((WIDTH, 290 + 15 * key_rows(names)[1]), draw, label), {
        "kind": "curves", "x": "optimiser steps", "arms": [
            {"name": line.name, "loss": line.loss, "top1_percent": line.top1} for line in lines]})


def scores(name: str, groups: Sequence[tuple[str, Sequence[FigurePoint]]], ticks: Sequence[str], axis: str,
           label: str, *, log: bool = False) -> Figure:
    """Scores of the trials of a sweep against one field (%), with their standard errors over repetitions, in groups by
    what became of them: best, finished, stopped, diverged. `ticks` names the values of a field that is not a number,
    whose x then count from 0."""
    styles = {"best": (SERIES[1], "*", 13), "finished": (SERIES[0], "o", 6), "stopped": (GREY, "o", 5),
              "diverged": (GREY, "X", 6)}

    def draw(figure: Canvas) -> None:
        axes, handles = axes_of(figure, axis, "score (%)"), []
        for state, points in groups:
            colour, marker, size = styles[state]
            for point in points:
                error_bar(axes, point.x, point, colour)
            handles += axes.plot([point.x for point in points], [point.mean for point in points], marker, color=colour,
                                 markersize=size, markerfacecolor=CARD if state == "stopped" else colour,
                                 markeredgecolor=colour)
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.minorticks_off()
        if ticks:
            crowded = sum(min(len(tick), MAX_NAME) + 2 for tick in ticks) > WIDTH / 8
            axes.set_xticks(range(len(ticks)), [short(tick) for tick in ticks], rotation=30 if crowded else 0,
                            ha="right" if crowded else "center")
        axes.margins(0.08, 0.1)
        key(figure, handles, [state for state, _ in groups])
    return Figure(name, svg((WIDTH, 290), draw, label), {"kind": "scores", "x": axis, "value": "score (%)", "trials": [
        {**point.numbers(), "x": ticks[int(point.x)] if ticks else point.x, "state": state}
        for state, points in groups for point in points]})


def thinned(places: Sequence[tuple[float, float]], most: int = 150) -> tuple[tuple[float, float], ...]:
    """At most about `most` of the places, evenly, the last among them."""
    step = math.ceil(len(places) / most) or 1
    return tuple(places[::-1][::step][::-1])
