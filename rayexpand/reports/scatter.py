"""One number of each arm against another, and whether they rise together.

    paper             here              meaning, unit
    r_s               correlation       Spearman's rank correlation over points
    zeta              reach             half width on Fisher's scale of 95 %, 1.96 sqrt((1 + r_s^2 / 2) / (n - 3));
                                        Bonett and Wright 2000, Psychometrika 65
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rayexpand.reports.drawing import KEY_ROW, WIDTH, FigurePoint, axes_of, colour_of, key, key_rows, marker_of, svg
from rayexpand.reports.figure import Figure
from rayexpand.reports.labels import label_points

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

FEWEST = 5  # points of an interval
NAMED = 8  # points that have their names beside them
NORMAL = 1.959963984540054  # 97.5 % quantile


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float | None, tuple[float, float] | None]:
    """Spearman's correlation and its 95 % interval. None where a side has one value only; no interval below FEWEST
    points or where all ranks agree."""
    from scipy.stats import spearmanr

    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None, None
    found = float(spearmanr(x, y).statistic)
    if len(x) < FEWEST or abs(found) > 1 - 1e-9:
        return found, None
    reach = NORMAL * math.sqrt((1 + found**2 / 2) / (len(x) - 3))
    return found, (math.tanh(math.atanh(found) - reach), math.tanh(math.atanh(found) + reach))


def scatter(name: str, points: Sequence[tuple[FigurePoint, FigurePoint]], axes_names: tuple[str, str],
            label: str) -> Figure:
    """Points of (x, y), each with its standard errors. A few have their names beside them; more have numbers there, and
    their names in the key below the figure."""
    numbered = len(points) > NAMED
    places = [FigurePoint(str(i) if numbered else y.name, y.mean, y.se, x.mean, y.series, y.values, emphasised=True)
              for i, (x, y) in enumerate(points, 1)]
    found, interval = rank_correlation([x.mean for x, _ in points], [y.mean for _, y in points])
    names = [f"{i} {y.name}" for i, (_, y) in enumerate(points, 1)] if numbered else []

    def draw(figure: Canvas) -> None:
        axes, handles = axes_of(figure, *axes_names), []
        for x, y in points:
            colour = colour_of(y.series)
            handles.append(axes.errorbar(x.mean, y.mean, xerr=x.se, yerr=y.se, color=colour, lw=1, capsize=2,
                                         markersize=5, fmt=marker_of(y.series)))
        axes.margins(0.14, 0.16)
        key(figure, [one.lines[0] for one in handles], names)
        label_points(figure, axes, places, places, [x.se for x, _ in points])
    return Figure(name, svg((WIDTH, 320 + KEY_ROW * key_rows(names)[1]), draw, label), {
        "kind": "scatter", "x": axes_names[0], "y": axes_names[1], "n": len(points), "rank_correlation": found,
        "interval_95": interval, "points": [{"name": y.name, "x": x.numbers(), "y": y.numbers()} for x, y in points]})


def said_of(figure: Figure) -> str:
    """The rank correlation of a scatter in words."""
    found, interval = figure.numbers["rank_correlation"], figure.numbers["interval_95"]
    n = figure.numbers["n"]
    if found is None:
        return f"No rank correlation: {n} points, or all of one value."
    if interval is None:
        why = f"no interval below {FEWEST} points" if n < FEWEST else "all ranks agree, so there is no interval"
        return f"Rank correlation (Spearman) {found:.2f} over {n} points; {why}."
    return (f"Rank correlation (Spearman) {found:.2f}, 95 % interval {interval[0]:.2f} to {interval[1]:.2f}, over {n} "
            "points. Arms that share images or a generator are no independent cases, so it is rather too narrow.")
