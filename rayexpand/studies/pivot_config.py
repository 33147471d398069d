"""The file of `rayexpand report --pivot`: which studies and sweeps, and which tables and figures of them.

    name: tables
    sources: {Caltech-101: runs/distdiff-caltech101, Cars: runs/distdiff-cars}
    figures:
      table-1: {kind: table, rows: arm, columns: source, against: original, average: true}
      figure-4: {kind: lines, rows: line, columns: ratio, panels: source, against: original}
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from rayexpand.contract import settings
from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.contract.settings import Section
from rayexpand.storage.places import open_files
from rayexpand.studies.measures import Prices, measure
from rayexpand.studies.records import Record

Kind = Literal["table", "bars", "lines", "heat", "scatter", "made", "cost"]
NEEDS = {"bars": ("columns",), "lines": ("columns",), "heat": ("columns",), "made": ("columns",)}
FILE_NAME = r"^[a-z0-9][a-z0-9-]*$"


class PriceConfig(Section):
    gpu_hour: float | None = Field(None, ge=0, description="of one process with a GPU; null: as the section price of a "
                                   "study says")
    cpu_hour: float | None = Field(None, ge=0, description="of one process without; null: as its study says")
    human_image: float | None = Field(None, ge=0, description="of one real image with its label, collected by "
                                      "people; null: price.real_image of the study")
    human_seconds: float | None = Field(None, ge=0, description="seconds that takes a person")
    currency: str = Field("", description="what prices are in, as tables write it")

    @property
    def hourly(self) -> Prices:
        return Prices(self.gpu_hour, self.cpu_hour)


class PivotFigure(Section):
    """One table or figure. Fields are those of records.py, measures those of measures.py."""

    kind: Kind = Field(description="table; bars: groups (columns) of bars (rows); lines: rows against columns; heat: "
                       "rows by columns; scatter: two measures of each row; made: images, discarded images and hours "
                       "against columns; cost: seconds, hours, price and gain of each row")
    title: str = ""
    of: Literal["trials", "bench"] = Field("trials", description="bench: what `rayexpand bench` stored in the studies")
    rows: str = Field("arm", min_length=1, description="field of the rows, bars, lines or points")
    columns: str = Field("", description="field of the columns, groups or x axis; a table without has its measures")
    panels: str = Field("", description="field that each value of is a panel or table of its own")
    value: str | list[str] = Field("top1", description="measure; several: columns of a table, panels of lines, x and y "
                                   "of a scatter")
    keep: dict[str, list[str | int | float]] = Field({}, description="field -> values that stay, in their order")
    names: dict[str, str] = Field({}, description="value -> what it is called in the figure")
    against: str | dict[str, str | int | float] | None = Field(
        None, description="what cells are compared with: a row, or {field: value} of trials")
    average: bool = Field(False, description="table: a last column with the mean over columns")
    ddof: Literal[0, 1] = Field(1, description="of the standard deviation after ±")
    ticks: dict[str, list[str]] = Field({}, description="table: a column with a tick in these rows, for modules")

    @field_validator("value")
    @classmethod
    def _is_known(cls, value: str | list[str]) -> Any:
        for name in [value] if isinstance(value, str) else value:
            try:
                measure(name)
            except UsageError as error:
                raise ValueError(str(error)) from error
        return value

    @field_validator("rows", "columns", "panels")
    @classmethod
    def _is_a_field(cls, value: str) -> str:
        if value:
            _check_field(value)
        return value

    @field_validator("keep", "against")
    @classmethod
    def _are_fields(cls, value: Any) -> Any:
        for name in value if isinstance(value, Mapping) else ():
            _check_field(name)
        return value

    @model_validator(mode="after")
    def _goes_together(self) -> PivotFigure:
        if lacking := [name for name in NEEDS.get(self.kind, ()) if not getattr(self, name)]:
            raise ValueError(f"{self.kind} needs {', '.join(lacking)}, a field such as source or ratio")
        if self.kind == "scatter" and len(self.values) != 2:
            raise ValueError("scatter needs two measures, value: [x, y], such as [score.fid, top1]")
        if self.kind in ("bars", "heat") and len(self.values) != 1:
            raise ValueError(f"{self.kind} shows one measure; make a figure of each")
        if self.kind in ("lines", "table") and self.panels and len(self.values) > 1:
            raise ValueError("panels: several measures are the panels already; leave one of them out")
        if self.kind in ("bars", "heat", "scatter", "made", "cost") and self.panels:
            raise ValueError(f"panels: no effect on {self.kind}; take it out")
        idle = [name for name in ("average", "ticks") if getattr(self, name) and self.kind != "table"]
        if idle:
            raise ValueError(f"{', '.join(idle)}: no effect on {self.kind}; take it out")
        return self

    @property
    def values(self) -> list[str]:
        return [self.value] if isinstance(self.value, str) else list(self.value)

    @property
    def compared_with(self) -> dict[str, Any] | None:
        """Field -> value of the trials that cells are compared with."""
        return {self.rows: self.against} if isinstance(self.against, str) else self.against


class PivotConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the page is <out>/<name>/report.html")
    out: str = Field("runs", min_length=1)
    sources: dict[str, str | list[str]] = Field(min_length=1, description="what figures call it -> folder of a study "
                                                "or sweep, or several")
    scores: list[str] = Field([], description="score files of `evaluate` that lie elsewhere, joined by run digest")
    prices: PriceConfig = PriceConfig()
    figures: dict[str, PivotFigure] = Field(min_length=1, description="name of its files -> what it shows")

    @field_validator("figures")
    @classmethod
    def _are_file_names(cls, value: dict[str, PivotFigure]) -> dict[str, PivotFigure]:
        if wrong := [name for name in value if not re.match(FILE_NAME, name)]:
            raise ValueError(f"{', '.join(wrong)}: a name is small letters, digits and hyphens, for it names files")
        return value

    @property
    def folder(self) -> str:
        return f"{self.out.rstrip('/')}/{self.name}"

    @property
    def folders(self) -> dict[str, list[str]]:
        return {name: [one] if isinstance(one, str) else one for name, one in self.sources.items()}


def load_pivot(path: str | Path, overrides: Sequence[str] = ()) -> PivotConfig:
    """Raises ConfigError with all mistakes."""
    return parse_pivot(settings.read(path, overrides), str(path))


def parse_pivot(raw: Mapping[str, Any], where: str = "pivot") -> PivotConfig:
    """Raises ConfigError with all mistakes; no folder is looked at."""
    try:
        return PivotConfig(**{str(key): value for key, value in raw.items()})
    except ValidationError as error:
        raise ConfigError(where, settings.mistakes(error, PivotConfig, "")) from error


def pivot_preflight(config: PivotConfig) -> list[str]:
    """Folders that hold neither a study nor a sweep."""
    return [f"sources.{name}: {folder} holds neither a study nor a sweep; run `rayexpand train` or `rayexpand sweep` "
            "first, or give the folder <out>/<name> of one" for name, folders in config.folders.items()
            for folder in folders if not any(open_files(folder).read(one) for one in ("study.json", "sweep.json"))]


def _check_field(name: str) -> None:
    try:
        Record("", "", 0, {}).field(name)
    except UsageError as error:
        raise ValueError(str(error)) from error
