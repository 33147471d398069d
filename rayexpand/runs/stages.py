"""Stages of a plan: what one verb does after the other, the hours and bytes of each, and what they come to.

A stage whose hours are known by an interval has two ends, the least and the most; what was measured or given has one.
Where nothing is known of a stage, it says what would tell, its hours are unknown, and totals name it and leave it out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rayexpand.contract.errors import three_digits
from rayexpand.runs.amounts import human_bytes
from rayexpand.runs.fleet_hours import GPU, PROCESS, SHARD_S, Hours, hours_of, spread

if TYPE_CHECKING:
    from rayexpand.runs.config import EstimateConfig

MOST_TASKS = 20_000  # that are simulated one by one; of more several stand together


class Sizes(NamedTuple):
    """Images and classes of a dataset."""

    images: int
    classes: int


@dataclass(frozen=True, slots=True)
class PlanStage:
    """Work that is one verb's, or a part of it.

    `hours` are those of `unit` that end in results, least and most; None where they are unknown. It is cut into
    `tasks` that run at once as far as there is room, each on `width` of the unit, and is done `times` in a row. A task
    that is lost goes on from the last of its `saves`. `parts`: how long tasks are beside each other, where not alike.
    """

    name: str
    what: str  # what is done, in numbers
    unit: str
    hours: tuple[float, float] | None
    source: str  # how hours are known, or what would tell
    tasks: int = 1
    width: int = 1
    times: int = 1
    saves: int = 1
    parts: tuple[float, ...] = ()
    bytes: int | None = 0
    petaflop: float | None = None

    @property
    def known(self) -> tuple[float, ...]:
        """Hours of one time: one where both ends are the same."""
        return () if self.hours is None else tuple(dict.fromkeys(one / self.times for one in self.hours))


def unknown(name: str, what: str, source: str, unit: str = GPU) -> PlanStage:
    return PlanStage(name, what, unit, None, source)


@dataclass(frozen=True, slots=True)
class TimedStage:
    """A stage with what the simulated fleet makes of it: an entry for each end of its hours, none where they are
    unknown."""

    stage: PlanStage
    ends: tuple[Hours, ...]

    def to_json(self) -> dict[str, Any]:
        one = self.stage
        return {"name": one.name, "what": one.what, "unit": one.unit, "source": one.source, "tasks": one.tasks,
                "width": one.width, "times": one.times, "bytes": one.bytes, "petaflop": one.petaflop,
                **{field: _interval([getattr(end, field) for end in self.ends]) for field in _TIMED}}


_TIMED = ("gpu_hours", "expected_lost_hours", "waiting_hours", "wall_hours", "wall_hours_95", "cost_usd")


@dataclass(frozen=True, slots=True)
class Stages:
    """Stages in order, and their totals."""

    stages: tuple[TimedStage, ...]
    storage_usd_month: float | None  # of all output, where the price and every size are known

    @property
    def unknown(self) -> list[str]:
        """Stages whose hours are unknown; totals leave them out."""
        return [one.stage.name for one in self.stages if not one.ends]

    def total(self, field: str, unit: str | None = None) -> tuple[float, float] | None:
        """Least and most of a field of Hours over the stages that are known (of one unit); None where it is nowhere."""
        known = [one for one in self.stages if one.ends and unit in (None, one.stage.unit)
                 and getattr(one.ends[0], field) is not None]
        if not known:
            return None
        found = [[getattr(end, field) for end in one.ends] for one in known]
        return sum(map(min, found)), sum(map(max, found))

    @property
    def bytes(self) -> int | None:
        sizes = [one.stage.bytes for one in self.stages]
        return None if None in sizes else sum(one for one in sizes if one is not None)

    def to_json(self) -> dict[str, Any]:
        units = {one.stage.unit for one in self.stages}
        return {"stages": [one.to_json() for one in self.stages], "totals": {
            "hours": {unit: _interval(self.total("gpu_hours", unit)) for unit in sorted(units)},
            **{field: _interval(self.total(field)) for field in _TIMED[1:]}, "bytes": self.bytes,
            "storage_usd_month": self.storage_usd_month, "unknown": self.unknown}}

    def table(self) -> list[tuple[str, ...]]:
        """Rows of stage, amount, hours, wall time, cost, bytes, and how hours are known."""
        rows: list[tuple[str, ...]] = [(
            one.stage.name, one.stage.what, *_cells(one.stage.unit, one.ends), human_bytes(one.stage.bytes),
            one.stage.source) for one in self.stages]
        hours = " + ".join(f"{shown(self.total('gpu_hours', unit))} {unit} h" for unit in (GPU, PROCESS)
                           if self.total("gpu_hours", unit) is not None) or "unknown"
        wall = self.total("wall_hours")
        left = f"without {', '.join(self.unknown)}: hours unknown" if self.unknown else ""
        rows.append(("in all", "", hours, "unknown" if wall is None else f"{shown(wall)} h",
                     shown(self.total("cost_usd")), human_bytes(self.bytes), left))
        return rows

    def words(self) -> str:
        """Hours, wall time and cost in one line."""
        found = [f"{shown(hours)} {unit} hours" for unit in (GPU, PROCESS) if (hours := self.total("gpu_hours", unit))]
        if not found:
            return f"hours unknown: {next((one.stage.source for one in self.stages if not one.ends), 'nothing to do')}"
        found.append(f"{shown(self.total('wall_hours'))} h of wall time")
        if (cost := self.total("cost_usd")) is not None:
            found.append(f"{shown(cost)} USD")
        return ", ".join(found) + (f", without {', '.join(self.unknown)} (unknown)" if self.unknown else "")


def timed(stages: Iterable[PlanStage], asked: EstimateConfig) -> Stages:
    """Stages one after the other on the fleet that `asked` describes."""
    found = tuple(TimedStage(one, tuple(_on_fleet(one, hours, asked) for hours in one.known)) for one in stages)
    made = Stages(found, None)
    price, size = asked.storage_gb_month_usd, made.bytes
    return made if price is None or size is None else Stages(found, price * size / 1e9)


def shares_of(work_tflop: float, asked: EstimateConfig, peak: tuple[float, str],
              field: str) -> tuple[tuple[float, float], str]:
    """Least and most GPU hours of so much arithmetic at the shares of a field of `estimate`, and how that is known."""
    shares: tuple[float, float] = getattr(asked, field)
    hours = [work_tflop / (peak[0] * share) / 3600 for share in sorted(shares, reverse=True)]
    percent = " to ".join(f"{100 * one:g}" for one in sorted({*shares}))
    return (hours[0], hours[1]), (f"{three_digits(work_tflop / 1000)} PFLOP counted, at {percent} % (estimate.{field}, "
                                  f"an assumption) of {peak[0]:g} TFLOP/s ({peak[1]})")


def shown(ends: Sequence[float] | None) -> str:
    """`3.1 to 7.9`, `4.2`, `unknown`."""
    if ends is None:
        return "unknown"
    return " to ".join(dict.fromkeys("never ends" if math.isinf(one) else three_digits(one) for one in ends))


def _on_fleet(stage: PlanStage, hours: float, asked: EstimateConfig) -> Hours:
    each = 3600 * hours / stage.width
    if stage.parts:
        seconds_N = each * np.array(stage.parts) / sum(stage.parts)
    else:
        seconds_N = spread(each, min(stage.tasks, MOST_TASKS))
    longest = float(seconds_N.max())
    found = hours_of(asked, stage.unit, seconds_N, width=stage.width,
                     saved_s=math.inf if stage.saves == 1 else max(longest / stage.saves, 1e-3),
                     task_s=SHARD_S * max(1.0, stage.tasks / len(seconds_N)))
    return found if stage.times == 1 else Hours(*(
        None if (value := getattr(found, one.name)) is None else stage.times * value for one in fields(Hours)))


def _cells(unit: str, ends: Sequence[Hours]) -> tuple[str, str, str]:
    """Hours, wall time, cost."""
    def cell(field: str, tail: str = "") -> str:
        values = [value for end in ends if (value := getattr(end, field)) is not None]
        return f"{shown(values)}{tail}" if values else "unknown"

    return cell("gpu_hours", f" {unit} h"), cell("wall_hours", " h"), cell("cost_usd")


def _interval(ends: Sequence[float | None] | None) -> list[float | None] | None:
    """As JSON: [least, most]; hours that never end are null."""
    if not ends or None in ends:
        return None
    values = sorted(one for one in ends if one is not None)
    return [None if math.isinf(one) else one for one in (values[0], values[-1])]
