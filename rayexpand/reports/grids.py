"""Means in a grid: groups of bars, a heat map with its numbers in the cells, and what was made for a share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rayexpand.reports.drawing import (
    CARD,
    COLOURS,
    HATCHES,
    INK,
    KEY_ROW,
    SERIES,
    SOFT,
    WIDTH,
    axes_of,
    colour_of,
    dress,
    key,
    key_rows,
    short,
    svg,
)
from rayexpand.reports.figure import Figure
from rayexpand.studies.pivot import Cell, Pivot, Place, Value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

BAR, GROUP = 19, 24  # height of a bar and of the name of its group
DEEPEST = 0.42  # opacity of the largest cell: text on it stays readable in both modes

Named = Callable[[Value], str]


def grouped_bars(name: str, found: Pivot, named: Named, series: Sequence[int | None], label: str,
                 groups_are: str = "") -> Figure:
    """A group of bars for each column, one bar for each row, from 0; mean ± standard error beside each. `series`: the
    colour of each row. More rows than colours have their names above their bars, and no key. `groups_are`: what numbers
    above groups count."""
    measure, rows = found.measures[0], [named(row) for row in found.rows]
    groups = [(column, [(i, cell) for i, row in enumerate(found.rows)
                        if (cell := found.cells.get((found.panels[0], row, column, measure.name)))])
              for column in found.columns]
    above = len(rows) > COLOURS
    step, keyed = BAR + KEY_ROW * above, [] if above else rows
    height = sum(GROUP + step * len(cells) for _, cells in groups) + 40 + KEY_ROW * key_rows(keyed)[1]

    def draw(figure: Canvas) -> None:
        axes = axes_of(figure, measure.label, "")
        axes.set_ylabel(groups_are)
        y, low, reach = 0.0, 0.0, 0.0
        for column, cells in groups:
            axes.text(0, y + 0.85 * GROUP, short(named(column), 48), va="bottom", color=INK, weight="bold")
            y += GROUP
            for number, cell in cells:
                middle = y + step - BAR / 2
                if above:
                    axes.text(0, y + KEY_ROW, short(rows[number]), va="bottom", color=INK)
                axes.barh(middle, cell.mean, 0.8 * BAR, **_look(series[number]))
                if cell.se is not None:
                    axes.errorbar(cell.mean, middle, xerr=cell.se, color=INK, capsize=2.5, lw=1.2)
                end = max(cell.mean + (cell.se or 0), 0.0)
                low, reach = min(low, cell.mean - (cell.se or 0)), max(reach, end)
                axes.annotate(_text(cell, measure.digits), (end, middle), (5, 0),
                              textcoords="offset points", va="center", color=INK)
                y += step
        axes.set(ylim=(y + 2, 0), xlim=(1.1 * low, reach + 0.35 * (reach - low)), yticks=[])
        axes.grid(visible=False, axis="y")
        if measure.difference == "points" and reach <= 100:
            axes.set_xticks([tick for tick in axes.get_xticks() if low <= tick <= 100])
        key(figure, [_patch(one) for one in series] if keyed else [], keyed)
    return Figure(name, svg((WIDTH, height), draw, label), {
        "kind": "bars", "value": measure.label, "groups": [
            {"group": named(column), "bars": [{"name": rows[i], **cell.numbers()} for i, cell in cells]}
            for column, cells in groups]})


def heat(name: str, found: Pivot, named: Named, axes_names: tuple[str, str], label: str) -> Figure:
    """Rows by columns with the mean in each cell, or, where cells are compared, the gain in points; the largest has a
    frame. `axes_names`: of rows and of columns."""
    measure, panel = found.measures[0], found.panels[0]
    cells: Mapping[Place, Cell] = found.differences or found.cells
    sign, words = ("+", f"gain, {measure.difference or measure.label}") if found.differences else ("", measure.label)
    shown = {(row, column): cell for row in found.rows for column in found.columns
             if (cell := cells.get((panel, row, column, measure.name)))}
    means = [cell.mean for cell in shown.values()]
    largest = max(means)
    strength = _strength(means, bool(sign))
    texts = {place: f"{cell.mean:{sign}z.{measure.digits}f}" + (
        "" if cell.se is None else f"\n± {cell.se:.{measure.digits}f}") for place, cell in shown.items()}
    letters = max(len(line) for text in texts.values() for line in text.split("\n"))
    is_narrow = letters * len(found.columns) > WIDTH / 8  # then numbers stand upright in their cells

    def draw(figure: Canvas) -> None:
        from matplotlib.patches import Rectangle

        axes = axes_of(figure, axes_names[1], axes_names[0])
        axes.grid(visible=False)
        for (row, column), cell in shown.items():
            x, y = found.columns.index(column), found.rows.index(row)
            colour, alpha = strength(cell.mean)
            axes.add_patch(Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, facecolor=colour, alpha=alpha, lw=0))
            if cell.mean == largest:
                axes.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor=INK, lw=1.6))
            axes.text(x, y, texts[row, column], ha="center", va="center", color=INK, rotation=90 if is_narrow else 0)
        axes.set(xlim=(-0.5, len(found.columns) - 0.5), ylim=(len(found.rows) - 0.5, -0.5))
        _ticks(axes, [named(one) for one in found.columns])
        axes.set_yticks(range(len(found.rows)), [short(named(one), 16) for one in found.rows])
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        axes.set_title(f"{words} ± s.e.", loc="left", color=SOFT, fontsize="medium")
    return Figure(name, svg((WIDTH, 78 + 40 * len(found.rows)), draw, label), {
        "kind": "heat", "value": words, "rows": axes_names[0], "columns": axes_names[1], "cells": [
            {"row": row, "column": column, **cell.numbers()} for (row, column), cell in shown.items()]})


def made(name: str, found: Pivot, named: Named, x: str, label: str) -> Figure:
    """Images that were kept and discarded, as bars, above the hours that took, against a share of images (DiffCoRe-Mix,
    figures 7 and 8). Of one row."""
    panel, row = found.panels[0], found.rows[0]
    columns = [one for one in found.columns if (panel, row, one, "images") in found.cells]

    def values(measure: str) -> list[float]:
        return [cell.mean if (cell := found.cells.get((panel, row, one, measure))) else 0.0 for one in columns]

    images, discarded, hours = values("images"), values("discarded"), values("hours")
    names = ["images that it trained on", "discarded beside them"]

    def draw(figure: Canvas) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        dress(upper, "", "images")
        dress(lower, x, "process-hours")
        places = range(len(columns))
        handles = [upper.bar(places, images, 0.62, **_look(0)),
                   upper.bar(places, discarded, 0.62, bottom=images, **_look(1))]
        for place, kept, gone in zip(places, images, discarded, strict=True):
            text = f"{kept:,.0f}" + (f"\n+ {gone:,.0f}" if gone else "")
            upper.annotate(text, (place, kept + gone), (0, 3), textcoords="offset points", ha="center", va="bottom",
                           color=INK, fontsize=10)
        upper.set_ylim(0, 1.3 * max(a + b for a, b in zip(images, discarded, strict=True)))
        lower.plot(places, hours, "o-", color=SERIES[2], lw=1.5, markersize=5)
        lower.set_ylim(0, 1.15 * max(hours) or 1)
        _ticks(lower, [named(one) for one in columns])
        key(figure, handles, names)
    return Figure(name, svg((WIDTH, 330 + KEY_ROW), draw, label), {"kind": "made", "x": x, "row": named(row), "made": [
        {"x": one, "images": kept, "discarded": gone, "process_hours": hour}
        for one, kept, gone, hour in zip(columns, images, discarded, hours, strict=True)]})


# Drawing -------------------------------------------------------------------------------------------------------------


def _look(series: int | None) -> dict[str, Any]:
    """Colour and hatch of a series: where the colours begin again, other hatches do. Grey has none."""
    hatch = "" if series is None else HATCHES[(series + series // COLOURS) % len(HATCHES)]
    return {"facecolor": colour_of(series), "hatch": hatch, "edgecolor": CARD, "lw": 0}


def _patch(series: int | None) -> Any:
    from matplotlib.patches import Patch

    return Patch(**_look(series))


def _strength(means: Sequence[float], signed: bool) -> Callable[[float], tuple[str, float]]:
    """Mean -> colour and opacity: gains and losses from 0, other numbers from the smallest."""
    low, high = min(means), max(means)

    def of(mean: float) -> tuple[str, float]:
        if signed:
            return SERIES[0 if mean >= 0 else 3], DEEPEST * abs(mean) / (max(abs(low), abs(high)) or 1)
        return SERIES[0], DEEPEST * (0.1 + 0.9 * (mean - low) / ((high - low) or 1))
    return of


def _ticks(axes: Axes, names: Sequence[str]) -> None:
    crowded = sum(len(short(one, 16)) + 2 for one in names) > WIDTH / 7.5
    axes.set_xticks(range(len(names)), [short(one, 16) for one in names], rotation=35 if crowded else 0,
                    ha="right" if crowded else "center")


def _text(cell: Cell, digits: int) -> str:
    return f"{cell.mean:.{digits}f}" + ("" if cell.se is None else f" ± {cell.se:.{digits}f}")
