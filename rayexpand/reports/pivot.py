"""The page of `rayexpand report --pivot`: tables and figures over several studies and sweeps.

    <out>/<name>/report.html
                 figures/<figure>.svg, .json     what is drawn and its numbers; of a table .csv and .json
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import yaml

from rayexpand.contract.errors import UsageError
from rayexpand.reports.drawing import FigurePoint
from rayexpand.reports.figure import Figure, NumberTable, write_figures, write_tables
from rayexpand.reports.grids import grouped_bars, heat, made
from rayexpand.reports.lines import Line, Panel, lines
from rayexpand.reports.scatter import said_of, scatter
from rayexpand.reports.tables import cost_table, pivot_tables
from rayexpand.reports.templates import render
from rayexpand.storage.places import open_files
from rayexpand.studies.measures import Measure, measure
from rayexpand.studies.pivot import ALL, Cell, Pivot, Value, kept_of, pivot
from rayexpand.studies.pivot_config import PivotConfig, PivotFigure, PriceConfig
from rayexpand.studies.records import Records, line_of, read_records
from rayexpand.studies.summary import write

log = logging.getLogger(__name__)

OF_MADE = ("images", "discarded", "hours")
OF_COST = ("images", "seconds_per_image", "hours", "price")
FIELDS = {"ratio": "synthetic images per real image", "subset.n": "real images per class", "line": "method",
          "batch": "images in a batch"}


@dataclass(frozen=True)
class Shown:
    """One figure of the file as the page has it: tables, or a picture; and what must be said of it. `missing`: why it
    is not there."""

    title: str
    tables: tuple[NumberTable, ...] = ()
    figure: Figure | None = None
    words: tuple[str, ...] = ()
    missing: str = ""


@dataclass(frozen=True)
class Wanted:
    """A figure of the file with the numbers that it shows. `lines`: the colour of each line of arms on this page."""

    name: str
    asked: PivotFigure
    found: Pivot
    prices: PriceConfig
    lines: Mapping[str, int | None]
    scores: tuple[str, ...]  # measures of samples that trials have

    @property
    def title(self) -> str:
        return self.asked.title or self.name

    def named(self, value: Value) -> str:
        """A value as the figure calls it."""
        text = f"{value:g}" if isinstance(value, int | float) else value
        return self.asked.names.get(text, text)

    def field(self, name: str) -> str:
        """A field as an axis calls it."""
        return self.asked.names.get(name) or FIELDS.get(name) or name.rpartition(".")[2].replace("_", " ")

    @property
    def series(self) -> list[int | None]:
        """The colour of each row: that of its line on the whole page, where rows are arms of different lines or named
        beside their points."""
        known = [line_of(str(row)) for row in self.found.rows]
        if self.asked.rows in ("arm", "line") and (len(set(known)) == len(known) or self.asked.kind == "scatter"):
            return [self.lines.get(one) for one in known]
        return list(range(len(known)))

    @property
    def against(self) -> str:
        fields = self.asked.compared_with or {}
        return ", ".join(self.named(value) for name, value in fields.items() if name != "source" or len(fields) == 1)

    @property
    def n(self) -> str:
        counts = sorted({len(cell.values) for cell in self.found.cells.values()})
        span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        return f"n = {span} trial{'s' if counts != [1] else ''}"

    def over(self, error: str) -> str:
        """What a mean is of, and what stands after ±."""
        if all(len(cell.values) == 1 for cell in self.found.cells.values()):
            return "One number in each place, so there is no error."
        return f"Mean ± {error} over {self.n}."

    def shown(self, *words: str, tables: tuple[NumberTable, ...] = (), figure: Figure | None = None) -> Shown:
        pooled = ("Some of these means pool several arms or settings of one seed, so that ± is not of repetitions "
                  "alone; add a field to rows, columns or panels, or keep one value of it, to tell them apart.",)
        there = {place[3] for place in self.found.cells}
        lacking = [f"{one.name}: no trial has it." for one in self.found.measures if one.name not in there]
        return Shown(self.title, tables, figure, (*filter(None, words), *lacking,
                                                  *(pooled if self.found.pooled else ())))


def write_pivot_report(config: PivotConfig) -> Path | str:
    """Writes the page, its figures and tables; returns where the page is. A figure without data is a line of the page
    and of the log. Raises UsageError where no figure has any."""
    records = read_records(config.folders, config.scores)
    shown = pivot_figures(config, records)
    missing = [one.missing for one in shown if one.missing]
    if len(missing) == len(shown):
        raise UsageError("no figure of the file has data:\n  " + "\n  ".join(missing))
    for line in missing:
        log.warning("%s. The other figures are written", line)
    files = open_files(config.folder)
    write_figures(files, [one.figure for one in shown if one.figure])
    write_tables(files, [table for one in shown for table in one.tables])
    page = render("pivot.html.j2", {}, name=config.name, shown=[one for one in shown if not one.missing],
                  missing=missing, problems=records.problems,
                  sources=[(name, folders, sum(one.source == name for one in records.trials))
                           for name, folders in config.folders.items()],
                  config=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
                  written=datetime.now(UTC))
    return write(files, "report.html", page)


def pivot_figures(config: PivotConfig, records: Records) -> list[Shown]:
    """Every table and figure of a file, drawn from these records, or why it is missing, with its name."""
    synthetic = dict.fromkeys(one.line for one in records.trials if one.result.get("synthetic_rows"))
    real = dict.fromkeys(one.line for one in records.trials if one.line not in synthetic)
    colours = {**{name: i for i, name in enumerate(synthetic)},
               **{name: i + len(synthetic) - 1 if i else None for i, name in enumerate(real)}}
    scores = (*dict.fromkeys(f"samples.{name}" for one in records.trials for name in one.samples), *dict.fromkeys(
        f"score.{name}" for one in records.trials if one.run for file in one.run.scores.values() for name in file))
    shown = []
    for name, one in config.figures.items():
        try:
            found, prices = _numbers(one, records, config.prices), _with_those_of_studies(config.prices, records, one)
            shown.append(_KINDS[one.kind](Wanted(name, one, found, prices, colours, scores)))
        except UsageError as error:
            shown.append(Shown(one.title or name, missing=f"figures.{name}: {error}"))
    return shown


def _numbers(one: PivotFigure, records: Records, prices: PriceConfig) -> Pivot:
    costs = [name for name in OF_COST if name != "price" or _is_priced(records, one, prices)]
    names = {"made": OF_MADE, "cost": (*costs, *one.values)}.get(one.kind, one.values)
    found = pivot(records.bench if one.of == "bench" else records.trials,
                  [measure(value, prices.hourly) for value in names], rows=one.rows, columns=one.columns,
                  panels=one.panels, keep=one.keep, against=one.compared_with, ddof=one.ddof)
    if not found.cells:
        raise UsageError(f"nothing has {', '.join(names)} by {', '.join(filter(None, (one.rows, one.columns)))}; "
                         f"{len(records.trials)} trials and {len(records.bench)} lines of benches were read")
    return found


def _is_priced(records: Records, one: PivotFigure, prices: PriceConfig) -> bool:
    """Whether the file has prices, or the studies of all trials of the figure have some."""
    shown = kept_of(records.trials, one.keep)
    return prices.gpu_hour is not None or prices.cpu_hour is not None or (
        bool(shown) and all({"gpu_hour", "cpu_hour"} & one.prices.keys() for one in shown))


def _with_those_of_studies(prices: PriceConfig, records: Records, one: PivotFigure) -> PriceConfig:
    """Prices with that of a real image, where the file gives none and all studies of the figure say the same."""
    said = {record.prices.get("real_image") for record in kept_of(records.trials, one.keep)}
    if prices.human_image is not None or len(said) != 1:
        return prices
    return prices.model_copy(update={"human_image": said.pop()})


# Kinds ---------------------------------------------------------------------------------------------------------------


def _table(wanted: Wanted) -> Shown:
    one, found = wanted.asked, wanted.found
    return wanted.shown(
        wanted.over(f"standard deviation (ddof {one.ddof})")
        + f" Below it the difference to {wanted.against}." * bool(found.differences)
        + " Average: of the means over the columns, where none is missing." * one.average,
        tables=pivot_tables(wanted.name, one, found, wanted.named))


def _bars(wanted: Wanted) -> Shown:
    counts = any(isinstance(column, int | float) for column in wanted.found.columns)
    return wanted.shown(wanted.over("standard error"), figure=grouped_bars(
        wanted.name, wanted.found, wanted.named, wanted.series, wanted.title,
        f"groups: {wanted.field(wanted.asked.columns)}" if counts else ""))


def _lines(wanted: Wanted) -> Shown:
    """Panels by field, or one for each measure; a column that is no number has a tick with its name."""
    found = wanted.found
    ticks = () if all(isinstance(column, int | float) for column in found.columns) else found.columns
    panels = [_panel(wanted, panel, value, bool(ticks)) for panel in found.panels for value in found.measures]
    figure = lines(wanted.name, [panel for panel in panels if panel.lines], wanted.field(wanted.asked.columns),
                   wanted.title, [wanted.named(tick) for tick in ticks])
    rings = any(line.get("crossover") is not None for panel in figure.numbers["panels"] for line in panel["lines"])
    return wanted.shown(
        wanted.over("standard error") + " Points at one x stand side by side."
        + f" A ring with a number: where the means of a line that begins below {wanted.against} reach it." * rings,
        figure=figure)


def _panel(wanted: Wanted, panel: Value, value: Measure, named: bool) -> Panel:
    found = wanted.found

    def line(name: str, cells: Mapping[Value, Cell], series: int | None, dashed: bool = False) -> Line:
        points = [_point(name, cell, float(i if named else column), series)
                  for i, column in enumerate(found.columns) if (cell := cells.get(column))]
        return Line(name, tuple(points), series, dashed)

    def cells_of(row: Value) -> dict[Value, Cell]:
        return {column: cell for column in found.columns if (cell := found.cells.get((panel, row, column, value.name)))}

    level = {place[2]: cell for place, cell in found.baselines.items() if (place[0], place[3]) == (panel, value.name)}
    drawn = [line(wanted.named(row), own, series) for row, series in zip(found.rows, wanted.series, strict=True)
             if (own := cells_of(row)) and any(cell != level.get(column) for column, cell in own.items())]
    title, base = wanted.named(panel) if panel != ALL else "", next(iter(level.values()), None)
    if base is None:
        return Panel(title, value.label, tuple(drawn))
    if all(cell == base for cell in level.values()):
        return Panel(title, value.label, tuple(drawn), _point(wanted.against, base, 0.0, None))
    return Panel(title, value.label, (line(wanted.against, level, None, dashed=True), *drawn))  # a level at each x


def _heat(wanted: Wanted) -> Shown:
    names = wanted.field(wanted.asked.rows), wanted.field(wanted.asked.columns)
    return wanted.shown(f"Gain over {wanted.against}. " * bool(wanted.found.differences)
                        + wanted.over("standard error") + " A frame marks the largest.",
                        figure=heat(wanted.name, wanted.found, wanted.named, names, wanted.title))


def _scatter(wanted: Wanted) -> Shown:
    """A point for each row, and column where there is one, that has both measures."""
    (x, y), found, points = wanted.found.measures, wanted.found, []
    for row, series in zip(found.rows, wanted.series, strict=True):
        for column in found.columns:
            cells = [found.cells.get((ALL, row, column, value.name)) for value in (x, y)]
            if cells[0] and cells[1]:
                words = ", ".join(filter(None, (wanted.named(row), wanted.named(column) if column != ALL else "")))
                points.append((_point(words, cells[0], 0.0, series), _point(words, cells[1], 0.0, series)))
    if not points:
        raise UsageError(f"no {wanted.asked.rows} has both {x.name} and {y.name}; the samples of these trials have "
                         f"{', '.join(wanted.scores) or 'no scores'}")
    figure = scatter(wanted.name, points, (x.label, y.label), wanted.title)
    return wanted.shown(said_of(figure), wanted.over("standard error"), figure=figure)


def _made(wanted: Wanted) -> Shown:
    one, found = wanted.asked, wanted.found
    if len(found.rows) != 1:
        raise UsageError(f"made shows one of {one.rows}, and there are {', '.join(map(wanted.named, found.rows))}; "
                         f"name one in keep: {{{one.rows}: [...]}}")
    return wanted.shown(
        f"Means over {wanted.n}. Discarded: drawn beside the images that were trained on and refused, at the rate of "
        "the run. Hours: of every process of the expansion, for these images, and of what was fitted for them.",
        figure=made(wanted.name, found, wanted.named, wanted.field(one.columns), wanted.title))


def _cost(wanted: Wanted) -> Shown:
    return wanted.shown(
        f"Means over {wanted.n}, ± standard deviation (ddof {wanted.asked.ddof}). Process-seconds of an image: of "
        "every process of the expansion over the images that were trained on; hours: with what was fitted for them."
        + " The line of people has the price of a real image that the file of this page, or its study, gives."
        * bool(wanted.prices.human_image),
        tables=(cost_table(wanted.name, wanted.asked, wanted.found, wanted.named, wanted.prices),))


_KINDS: Mapping[str, Callable[[Wanted], Shown]] = {
    "table": _table, "bars": _bars, "lines": _lines, "heat": _heat, "scatter": _scatter, "made": _made, "cost": _cost}


def _point(name: str, cell: Cell, x: float, series: int | None) -> FigurePoint:
    return FigurePoint(name, cell.mean, cell.se, x, series, cell.values)
