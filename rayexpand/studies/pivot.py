"""Trials grouped by two or three of their fields, a number in each cell: what every table and figure over several
studies shows.

    rows, columns, panels   fields; each has the values that the trials have, numbers rising, others as they come
    cell                    the trials with these values: mean, standard deviation (ddof stated), standard error, n
    against                 trials that a cell is compared with: those of its own panel and column where there are any,
                            else all of them; paired by source and seed where both sides have the same
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from rayexpand.contract.errors import UsageError
from rayexpand.studies.measures import Measure
from rayexpand.studies.records import Record

Value = str | float
ALL = ""  # the value of a field that is not asked for


@dataclass(frozen=True, slots=True)
class Cell:
    """`pooled`: it holds more than one trial of a source and seed, so that its errors are not of repetitions alone."""

    values: tuple[float, ...]
    sd: float | None
    se: float | None
    pooled: bool = False

    @property
    def mean(self) -> float:
        return fmean(self.values)

    def numbers(self) -> dict[str, Any]:
        return {"mean": self.mean, "sd": self.sd, "se": self.se, "n": len(self.values), "values": list(self.values),
                **({"pooled": True} if self.pooled else {})}


Place = tuple[Value, Value, Value, str]  # panel, row, column, measure


@dataclass(frozen=True)
class Pivot:
    panels: tuple[Value, ...]
    rows: tuple[Value, ...]
    columns: tuple[Value, ...]
    measures: tuple[Measure, ...]
    cells: Mapping[Place, Cell]
    differences: Mapping[Place, Cell]  # a cell less what it is compared with
    baselines: Mapping[Place, Cell]  # what it is compared with

    @property
    def pooled(self) -> bool:
        return any(cell.pooled for cell in self.cells.values())

    def average(self, panel: Value, row: Value, name: str, *, differences: bool = False) -> float | None:
        """Mean over columns of the means of a row; None where a column is empty, for it would be of other columns than
        the averages beside it."""
        cells = self.differences if differences else self.cells
        found = [cells.get((panel, row, column, name)) for column in self.columns]
        return None if not found or None in found else fmean(cell.mean for cell in found if cell is not None)


def pivot(records: Sequence[Record], measures: Sequence[Measure], *, rows: str = "", columns: str = "",
          panels: str = "", keep: Mapping[str, Sequence[Any]] | None = None,
          against: Mapping[str, Any] | None = None, ddof: int = 1) -> Pivot:
    """`keep`: field -> the values that stay, in their order; of what cells are compared with too, where it has the
    field. Raises UsageError for fields that no trial has, and for
    values to keep or to compare with that none has."""
    axes, keep = (panels, rows, columns), keep or {}
    kept = kept_of(records, keep)
    for name, wanted in keep.items():
        if lacking := [one for one in wanted if not any(_same(value_of(r, name), one) for r in records)]:
            raise UsageError(f"keep.{name}: no trial has {', '.join(map(repr, lacking))}; there are "
                             f"{', '.join(map(str, _ordered(records, name, ()))) or 'none'}")
    groups: dict[tuple[Value, Value, Value], list[Record]] = {}
    for record in kept:
        place = tuple(value_of(record, name) if name else ALL for name in axes)
        if None not in place:
            groups.setdefault(place, []).append(record)  # type: ignore[arg-type]
    for name in filter(None, axes):
        if kept and all(value_of(record, name) is None for record in kept):
            raise UsageError(f"{name}: none of the {len(kept)} trials has it")
    level = _Level(records, against, keep, panels, columns)
    cells, differences, baselines = {}, {}, {}
    for place, own in groups.items():
        beside = level.beside(*place) if against else []
        for one in measures:
            if (cell := _cell(_known(own, one), ddof)) is None:
                continue
            cells[*place, one.name] = cell
            if beside and (base := _cell(_known(beside, one), ddof)) is not None:
                baselines[*place, one.name] = base
                differences[*place, one.name] = _difference(_known(own, one), _known(beside, one), ddof)
    shown = [tuple(v for v in _ordered(kept, name, keep.get(name, ())) if any(place[i] == v for place in groups))
             if name else (ALL,) for i, name in enumerate(axes)]
    return Pivot(shown[0], shown[1], shown[2], tuple(measures), cells, differences, baselines)


def kept_of(records: Sequence[Record], keep: Mapping[str, Sequence[Any]]) -> list[Record]:
    """Those that have one of the values of each field."""
    return [one for one in records if all(_is_kept(one, name, values) for name, values in keep.items())]


def value_of(record: Record, name: str) -> Value | None:
    """The value of a field as tables have it: numbers as numbers, others as text."""
    value = record.field(name)
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


class _Level:
    """What cells are compared with."""

    def __init__(self, records: Sequence[Record], against: Mapping[str, Any] | None, keep: Mapping[str, Sequence[Any]],
                 panels: str, columns: str):
        self.fields = (panels, columns)
        self.found = [one for one in records if against and all(_same(value_of(one, name), value)
                                                                for name, value in against.items())]
        self.fixed = set(against or ())
        for name in keep.keys() - self.fixed:
            kept = [one for one in self.found if _is_kept(one, name, keep[name])]
            self.found = kept if kept or name == "source" else self.found
        if against and not self.found:
            wanted = " and ".join(f"{name} {value!r}" for name, value in against.items())
            raise UsageError(f"against: no trial has {wanted}, so there is nothing to compare with")

    def beside(self, panel: Value, _row: Value, column: Value) -> list[Record]:
        """Those of the same panel and column. Where a field does not vary in them, they are for all of its values; but
        what is of another source is never taken for this one's, unless `against` names the source."""
        found = self.found
        for name, value in zip(self.fields, (panel, column), strict=True):
            if name and name not in self.fixed:
                same = [one for one in found if value_of(one, name) == value]
                found = same if same or name == "source" else found
        return found


def _is_kept(record: Record, name: str, values: Sequence[Any]) -> bool:
    return any(_same(value_of(record, name), value) for value in values)


def _same(found: Value | None, wanted: Any) -> bool:
    return found == wanted or (found is not None and str(found) == str(wanted))


def _ordered(records: Sequence[Record], name: str, wanted: Sequence[Any]) -> list[Value]:
    there = list(dict.fromkeys(value for one in records if (value := value_of(one, name)) is not None))
    if wanted:
        return [value for one in wanted for value in there if _same(value, one)]
    return sorted(there) if all(isinstance(one, int | float) for one in there) else there


def _known(records: Sequence[Record], measure: Measure) -> dict[tuple[str, int, str, int], float]:
    """(source, seed, and what tells trials of one seed apart) -> number."""
    found: dict[tuple[str, int, str, int], float] = {}
    for number, record in enumerate(records):
        if (value := measure.of(record)) is not None and math.isfinite(value):
            first = (record.source, record.seed, "", 0)
            found[(record.source, record.seed, record.arm, number) if first in found else first] = value
    return found


def _cell(known: Mapping[tuple[str, int, str, int], float], ddof: int) -> Cell | None:
    return cell_of(list(known.values()), ddof, any(key[2] for key in known)) if known else None


def cell_of(values: Sequence[float], ddof: int, pooled: bool = False) -> Cell:
    n = len(values)
    sd = float(np.std(values, ddof=ddof)) if n > ddof and n > 1 else None
    return Cell(tuple(values), sd, float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None, pooled)


def _difference(mine: Mapping[Any, float], theirs: Mapping[Any, float], ddof: int) -> Cell:
    """Paired where both have the same sources and seeds, or the same seeds of one source each; else of the means."""
    sides = (mine, theirs)
    if mine.keys() == theirs.keys():
        return cell_of([mine[key] - theirs[key] for key in mine], ddof, any(key[2] for key in mine))
    if all(len({key[0] for key in side}) == 1 and not any(key[2] for key in side) for side in sides):
        by_seed = [{key[1]: value for key, value in side.items()} for side in sides]
        if by_seed[0].keys() == by_seed[1].keys():
            return cell_of([by_seed[0][seed] - by_seed[1][seed] for seed in by_seed[0]], ddof, False)
    return Cell((fmean(mine.values()) - fmean(theirs.values()),), None, None)
