"""How commands show what they return."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rayexpand.contract.secrets import masked


def show_json(value: Any) -> None:
    """One object on stdout, and nothing else."""
    print(json.dumps(value))


def show_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in head:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(masked(str(cell)) for cell in row))  # before a line is folded
    Console(soft_wrap=False, markup=False, highlight=False).print(table)


def show(result: Any, as_json: bool) -> None:
    """A result of the API, as JSON or as its table."""
    if as_json:
        show_json(result.to_dict())
    else:
        show_table(*result.table())


def warn(lines: Iterable[str], prefix: str = "rayexpand: ") -> None:
    """Lines on stderr."""
    for line in lines:
        print(f"{prefix}{line}", file=sys.stderr)


def quiet_stdout() -> contextlib.AbstractContextManager[Any]:
    """What libraries print goes to stderr: Ray prints to stdout what its actors do."""
    return contextlib.redirect_stdout(sys.stderr)
