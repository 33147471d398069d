"""Corrupted images on the page of a study: a table of types beside arms, and two figures with their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayexpand.reports.drawing import (
    CARD,
    COLOURS,
    DASHES,
    KEY_ROW,
    MARKERS,
    SOFT,
    WIDTH,
    FigurePoint,
    axes_of,
    colour_of,
    error_bar,
    key,
    key_rows,
    svg,
)
from rayexpand.reports.figure import Figure
from rayexpand.reports.study_figures import line_name
from rayexpand.studies.robustness_table import corrupted_table, grouped, mean_head, short_type, tests_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

ROW = 17  # height of a type


@dataclass(frozen=True, slots=True)
class CorruptedArm:
    """An arm: top-1 in percent by type and by severity."""

    name: str
    series: int | None  # colour
    types: Mapping[str, FigurePoint]
    severities: Sequence[FigurePoint]


def corrupted_sections(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the page shows of each set: `test`, `facts`, `mean`, `table` (heads, lines) and `figures`."""
    names = list(dict.fromkeys(line_name(arm) for arm in found["arms"] if line_name(arm)))
    series = {name: i for i, name in enumerate(names)}
    return [{"test": test, "facts": facts, "mean": mean_head(facts), "table": corrupted_table(found, test),
             "figures": _figures(found, test, series)} for test, facts in tests_of(found).items()]


def _figures(found: Mapping[str, Any], test: str, series: Mapping[str, int]) -> list[Figure]:
    """Both figures, for every few arms."""
    arms = [CorruptedArm(arm["arm"], series.get(line_name(arm)),
                         {kind: _point(kind, value) for kind, value in one["type"].items()},
                         [_point(name, value, float(name)) for name, value in one["severity"].items()])
            for arm in found["arms"] if (one := arm.get("robustness", {}).get(test))]
    drawn = []
    for number, start in enumerate(range(0, len(arms), COLOURS)):
        some, suffix = arms[start:start + COLOURS], f"-{number + 1}" if len(arms) > COLOURS else ""
        drawn.append(types(f"corrupted-{test}-types{suffix}", some, f"Top-1 by type of corruption, {test}"))
        if len(some[0].severities) > 1:
            drawn.append(severities(f"corrupted-{test}-severities{suffix}", some, f"Top-1 by severity, {test}"))
    return drawn


def _point(name: str, value: Mapping[str, Any], x: float = 0.0) -> FigurePoint:
    return FigurePoint(name, 100 * value["mean"], None if value["se"] is None else 100 * value["se"], x,
                       values=tuple(100 * one for one in value["values"]))


def types(name: str, arms: Sequence[CorruptedArm], label: str) -> Figure:
    """A row for each type, in groups, a mark for each arm."""
    rows: list[tuple[str, str]] = []  # (type, "") or ("", group)
    for group, kinds in grouped(list(arms[0].types)):
        rows += [("", group), *((kind, "") for kind in kinds)]
    place = {kind: y for y, (kind, _) in enumerate(rows) if kind}
    names, value = [arm.name for arm in arms], "top-1, mean over severities (%)"

    def draw(figure: Canvas) -> None:
        axes, handles = axes_of(figure, value, ""), []
        for number, arm in enumerate(arms):
            known = [kind for kind in place if kind in arm.types]
            handles += axes.plot([arm.types[kind].mean for kind in known], [place[kind] for kind in known],
                                 **_look(number, arm), linestyle="")
        axes.set_yticks(range(len(rows)), [short_type(kind) if kind else group for kind, group in rows])
        for (kind, _), text in zip(rows, axes.get_yticklabels(), strict=True):
            text.set(color=SOFT, weight="normal" if kind else "bold")
        axes.set(ylim=(len(rows) - 0.4, -0.6))
        key(figure, handles, names)
    height = 60 + ROW * len(rows) + KEY_ROW * key_rows(names)[1]
    return Figure(name, svg((WIDTH, height), draw, label), {"kind": "corruptions", "value": value, "arms": [
        {"arm": arm.name, "types": [point.numbers() for point in arm.types.values()]} for arm in arms]})


def severities(name: str, arms: Sequence[CorruptedArm], label: str) -> Figure:
    """A line for each arm over the severities."""
    names, value = [arm.name for arm in arms], "top-1, mean over types (%)"

    def draw(figure: Canvas) -> None:
        axes, handles = axes_of(figure, "severity", value), []
        for number, arm in enumerate(arms):
            (line,) = axes.plot([point.x for point in arm.severities], [point.mean for point in arm.severities],
                                **_look(number, arm), lw=1.5)
            if dashes := DASHES[number % len(DASHES)]:
                line.set_dashes([float(length) / 1.5 for length in dashes.split()])
            for point in arm.severities:
                error_bar(axes, point.x, point, colour_of(arm.series))
            handles.append(line)
        axes.set_xticks([point.x for point in arms[0].severities])
        key(figure, handles, names)
    return Figure(name, svg((WIDTH, 250 + KEY_ROW * key_rows(names)[1]), draw, label), {
        "kind": "severities", "x": "severity", "value": value, "arms": [
            {"arm": arm.name, "severities": [{**point.numbers(), "x": point.x} for point in arm.severities]}
            for arm in arms]})


def _look(number: int, arm: CorruptedArm) -> dict[str, Any]:
    """Colour by line, marker by place; marks of arms of real images only are hollow."""
    colour = colour_of(arm.series)
    return {"marker": MARKERS[number % len(MARKERS)], "color": colour, "markersize": 6, "markeredgecolor": colour,
            "markerfacecolor": CARD if arm.series is None else colour}
