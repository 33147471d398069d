"""The figures of a sweep: the score against each swept field, and by each two fields that were chosen from a few
values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from rayexpand.classifier.accuracy import summarise
from rayexpand.reports import figures
from rayexpand.reports.drawing import FigurePoint
from rayexpand.reports.figure import Figure
from rayexpand.reports.grids import heat
from rayexpand.studies.measures import Measure
from rayexpand.studies.pivot import ALL, Cell, Pivot, Place, Value, cell_of
from rayexpand.studies.sweep.space import LOG, Dimension, n_points

FEW = 12  # values of a field that is a side of a heat map

Trial = Mapping[str, Any]


def sweep_figures(space: Sequence[Dimension], names: Mapping[str, str], results: Mapping[str, Trial],
                  best: Trial | None) -> list[dict[str, Any]]:
    """`field` in words and `figure`, for the page. `names`: short names of fields."""
    if not results:
        return []
    drawn = [{"field": one.field, "figure": _against(f"score-{number}", one, names[one.field], results, best)}
             for number, one in enumerate(space, 1)]
    found = []
    for a, b in combinations(space, 2):
        both = {key: one for key, one in results.items() if {a.field, b.field} <= one["values"].keys()}
        if all(n_points([one]) and 1 < len(_values(one, both)) <= FEW for one in (a, b)):
            found.append((a, b, _grid(a, b, both)))
    drawn += [{"field": f"{a.field} by {b.field}", "figure": heat(
        f"scores-{number}", grid, lambda value: f"{value:g}" if isinstance(value, int | float) else value,
        (names[a.field], names[b.field]), f"Score by {a.field} and {b.field}")}
        for number, (a, b, grid) in enumerate(found, 1) if grid.cells]
    return drawn


def proxy_figures(found: Mapping[str, Any], results: Sequence[Trial], metric: str, best: str | None) -> list[Figure]:
    """The score of every finished trial against each proxy, as it is measured. `best`: key of the best trial."""
    own = [one for one in results if one["state"] == "finished" and "proxies" in one]
    return [_proxy_figure(f"proxy-{number}", one, own, metric, best)
            for number, one in enumerate(found["proxies"], 1)] if len(own) > 1 else []


def _proxy_figure(name: str, one: Mapping[str, Any], trials: Sequence[Trial], metric: str, best: str | None) -> Figure:
    proxy, interval, rho = one["proxy"], one["spearman_interval"], one["spearman"]
    points = {trial["key"]: _point(trial, trial["proxies"][proxy]) for trial in trials}
    groups = [("finished", [point for key, point in points.items() if key != best]),
              *([("best", [points[best]])] if best in points else [])]
    drawn = figures.scores(name, groups, [], proxy, f"{metric} against {proxy}")
    if one["lower"]:  # the figure is not turned round
        interval, rho = interval and (-interval[1], -interval[0]), None if rho is None else -rho
    return Figure(drawn.name, drawn.svg, {**drawn.numbers, "rank_correlation": rho, "interval_95": interval})


def _against(name: str, dimension: Dimension, axis: str, results: Mapping[str, Trial],
             best: Trial | None) -> Figure:
    field = dimension.field
    own = [one for one in results.values() if field in one["values"] and one["score"] is not None]
    numbers = [*(one["values"][field] for one in own), *dimension.values]
    is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers)
    ticks = [] if is_number else [str(value) for value in dimension.values]
    groups: dict[str, list[FigurePoint]] = {"diverged": [], "stopped": [], "finished": [], "best": []}
    for one in own:
        value = one["values"][field]
        state = "best" if best is not None and one["key"] == best["key"] else one["state"]
        groups[state].append(_point(one, value if is_number else ticks.index(str(value))))
    return figures.scores(name, [(state, points) for state, points in groups.items() if points], ticks, axis,
                          f"Score against {field}", log=dimension.kind in LOG)


def _values(dimension: Dimension, results: Mapping[str, Trial]) -> list[Value]:
    """Of the finished trials: numbers rising, others in the order of the file."""
    there = list(dict.fromkeys(_value(one, dimension) for one in results.values() if one["state"] == "finished"))
    if all(isinstance(one, int | float) for one in there):
        return sorted(there)
    order = [_plain(one) for one in dimension.values]
    return sorted(there, key=lambda one: order.index(one) if one in order else len(order))


def _grid(a: Dimension, b: Dimension, results: Mapping[str, Trial]) -> Pivot:
    """The scores of all finished trials with the same two values; of several trials they are pooled."""
    scores: dict[Place, list[float]] = {}
    trials: dict[Place, int] = {}
    for one in results.values():
        if one["state"] == "finished":
            place = (ALL, _value(one, a), _value(one, b), "score")
            scores.setdefault(place, []).extend(100 * score for score in one.get("scores") or [one["score"]])
            trials[place] = trials.get(place, 0) + 1
    cells: dict[Place, Cell] = {place: cell_of(own, 1, trials[place] > 1) for place, own in scores.items()}
    return Pivot((ALL,), tuple(_values(a, results)), tuple(_values(b, results)),
                 (Measure("score", "score (%)", lambda _: None),), cells, {}, {})


def _value(trial: Trial, dimension: Dimension) -> Value:
    return _plain(trial["values"][dimension.field])


def _plain(value: Any) -> Value:
    """A list of one is its value, and what is no number is text."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _point(trial: Trial, x: float) -> FigurePoint:
    """The score of a trial in percent over its repetitions."""
    values = [100 * score for score in trial.get("scores") or [trial["score"]]]
    return FigurePoint(trial["key"], 100 * trial["score"], summarise(values).se, x, values=tuple(values))
