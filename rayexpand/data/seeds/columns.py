"""Column checks shared by the layouts that are tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

import pyarrow as pa

from rayexpand.contract.errors import SeedDataError, few
from rayexpand.data.seeds.labels import is_text


def require(columns: Mapping[str, str | None], names: Sequence[str], file: str) -> None:
    """Raises SeedDataError for the first of `columns` (configuration field -> column) that `file` has not, or twice."""
    for field, column in columns.items():
        if column is not None and column not in names:
            near = get_close_matches(column, names, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "name the right one"
            raise SeedDataError(f"data.{field}: no column '{column}' in '{file}', which has {few(names)}; {hint}")
        if (count := list(names).count(str(column))) > 1:
            raise SeedDataError(f"data.{field}: '{column}' names {count} columns of '{file}'; rename all but one")


def require_label(column: str, kind: pa.DataType) -> None:
    """Raises SeedDataError for a column that cannot hold labels."""
    if not (pa.types.is_integer(kind) or is_text(kind)):
        raise SeedDataError(f"data.label_column: '{column}' is {kind}; a label is an integer or a string")
