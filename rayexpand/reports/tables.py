"""Tables over several studies: cells with differences, averages and ticks for modules; and what samples cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rayexpand.reports.figure import NumberTable
from rayexpand.studies.measures import Measure
from rayexpand.studies.pivot import ALL, Cell, Pivot, Value
from rayexpand.studies.pivot_config import PivotFigure, PriceConfig
from rayexpand.studies.spreads import plain, plus_minus, signed

Named = Callable[[Value], str]
NONE = "–"
HIGHER = ("top1", "top5", "per_class", "best", "many", "medium", "few", "also")  # the largest of a column is bold


def pivot_tables(name: str, one: PivotFigure, found: Pivot, named: Named) -> tuple[NumberTable, ...]:
    """One table for each panel."""
    return tuple(_table(name if panel == ALL else f"{name}-{number}", one, found, panel, named)
                 for number, panel in enumerate(found.panels, 1))


def _table(name: str, one: PivotFigure, found: Pivot, panel: Value, named: Named) -> NumberTable:
    places = [(column, measure) for column in found.columns for measure in found.measures]
    heads = ["", *one.ticks, *(_head(column, measure, found, named) for column, measure in places)]
    averaged = found.measures if one.average else ()
    heads += [f"average{f', {measure.label}' * (len(found.measures) > 1)}" for measure in averaged]
    same_n = len({len(cell.values) for cell in found.cells.values()}) == 1
    lines = []
    for row in found.rows:
        cells = [_text(found, panel, row, column, measure, same_n) for column, measure in places]
        means = [_average(found, panel, row, measure) for measure in averaged]
        ticked = [("✓" if named(row) in rows or row in rows else "", "", False) for rows in one.ticks.values()]
        lines.append([(named(row), "", False), *ticked, *cells, *means])
    title = named(panel) if panel != ALL else ""
    return NumberTable(name, title, tuple(heads), tuple(map(tuple, lines)), tuple(_numbers(found, panel, named, one)))


def cost_table(name: str, one: PivotFigure, found: Pivot, named: Named, prices: PriceConfig) -> NumberTable:
    """Images, seconds of each, hours, price, price of 1,000 images, accuracy and gain; a line for people, where their
    price is given."""
    of = {measure.name: measure for measure in found.measures}
    costs, values = [of[name] for name in of if name not in one.values], [of[name] for name in one.values]
    priced = "price" in of
    money = f", {prices.currency}" if prices.currency else ""
    heads = ["", *(measure.label + (money if measure.name == "price" else "") for measure in costs),
             *([f"price of 1,000 images{money}"] if priced else []),
             *(head for value in values for head in (value.label, *(["gain, points"] if found.differences else [])))]
    lines, numbers = [], []
    for row in found.rows:
        cells = [found.cells.get((ALL, row, ALL, measure.name)) for measure in costs]
        made = {measure.name: cell for measure, cell in zip(costs, cells, strict=True)}
        line = [named(row), *(_plain(cell.mean if cell and cell.mean else None) for cell in cells)]
        images, price = made.get("images"), made.get("price")
        thousand = 1000 * price.mean / images.mean if price and images and images.mean else None
        line += [_plain(thousand)] if priced else []
        for value in values:
            cell, gain = (side.get((ALL, row, ALL, value.name)) for side in (found.cells, found.differences))
            line += [NONE if cell is None else _spread(cell, value.digits)]
            line += [NONE if gain is None or not gain.mean else signed(gain.mean, value.digits)] \
                if found.differences else []
        lines.append(line)
        numbers.append({"row": named(row), "price_per_1000": thousand, **{
            measure.name: cell.numbers() for measure in found.measures
            if (cell := found.cells.get((ALL, row, ALL, measure.name)))}, **{
            f"gain_{value.name}": cell.numbers() for value in values
            if (cell := found.differences.get((ALL, row, ALL, value.name)))}})
    if prices.human_image is not None:
        by_people = {"seconds_per_image": prices.human_seconds}
        lines.append(["people", *(_plain(by_people.get(measure.name)) for measure in costs),
                      *([_plain(1000 * prices.human_image)] if priced else []), *[NONE] * (
                          len(heads) - 1 - len(costs) - priced)])
        numbers.append({"row": "people", "price_per_1000": 1000 * prices.human_image, **by_people})
    return NumberTable(name, "", tuple(heads), tuple(tuple((text, "", False) for text in line) for line in lines),
                       tuple(numbers))


def further_table(found: Mapping[str, Any]) -> NumberTable | None:
    """Top-1 and top-5 of every arm of a summary on all of its test sets side by side, mean ± standard error over seeds;
    None without two further ones."""
    tests = list(dict.fromkeys(name for arm in found["arms"] for name in arm["also"]))
    if len(tests) < 2:
        return None
    places = [(name, *score) for name in (None, *tests) for score in (("top1", "top-1"), ("top5", "top-5"))]
    lines, numbers = [], []
    for arm in found["arms"]:
        line = [(arm["arm"], "", False)]
        for name, score, _ in places:
            one = (arm["last"] if name is None else arm["also"].get(name) or {}).get(score)
            line.append((NONE if one is None else plus_minus(one), "", False))
            if one is not None:
                numbers.append({"row": arm["arm"], "test": name or "test images", "measure": score, **{
                    key: one[key] for key in ("mean", "se", "n", "values")}})
        lines.append(tuple(line))
    heads = [f"{name or 'test images'}, {words} %" for name, _, words in places]
    return NumberTable("further-tests", "", ("arm", *heads), tuple(lines), tuple(numbers))


# Cells ---------------------------------------------------------------------------------------------------------------


def _head(column: Value, measure: Measure, found: Pivot, named: Named) -> str:
    if column == ALL:
        return measure.label
    return named(column) if len(found.measures) == 1 else f"{named(column)}, {measure.label}"


def _text(found: Pivot, panel: Value, row: Value, column: Value, measure: Measure,
          same_n: bool) -> tuple[str, str, bool]:
    """A cell, its difference, and whether it is the largest of its column."""
    cell = found.cells.get((panel, row, column, measure.name))
    if cell is None:
        return NONE, "", False
    others = [one.mean for other in found.rows if (one := found.cells.get((panel, other, column, measure.name)))]
    best = measure.name.partition(".")[0] in HIGHER and len(others) > 1 and cell.mean == max(others)
    gain = found.differences.get((panel, row, column, measure.name))
    return (_spread(cell, measure.digits) + ("" if same_n else f" (n = {len(cell.values)})"),
            "" if gain is None or _is_own(found, panel, row, column, measure) else signed(gain.mean, measure.digits),
            best)


def _is_own(found: Pivot, panel: Value, row: Value, column: Value, measure: Measure) -> bool:
    """Whether a cell is what it is compared with."""
    place = (panel, row, column, measure.name)
    return found.baselines[place].values == found.cells[place].values


def _average(found: Pivot, panel: Value, row: Value, measure: Measure) -> tuple[str, str, bool]:
    mean = found.average(panel, row, measure.name)
    gain = found.average(panel, row, measure.name, differences=True) if found.differences else None
    return (NONE if mean is None else f"{mean:.{measure.digits}f}",
            "" if not gain else signed(gain, measure.digits), False)


def _numbers(found: Pivot, panel: Value, named: Named, one: PivotFigure) -> Iterator[dict[str, Any]]:
    for row in found.rows:
        for column in found.columns:
            for measure in found.measures:
                place = (panel, row, column, measure.name)
                if place in found.cells:
                    yield {"row": named(row), "column": named(column) if column != ALL else measure.name,
                           "measure": measure.name, **found.cells[place].numbers(), "ddof": one.ddof, **(
                        {"difference": found.differences[place].numbers()} if place in found.differences else {})}


def _spread(cell: Cell, digits: int) -> str:
    return f"{cell.mean:,.{digits}f}" + ("" if cell.sd is None else f" ± {cell.sd:,.{digits}f}")


def _plain(value: float | None) -> str:
    return NONE if value is None else plain(value)
