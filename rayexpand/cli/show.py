"""How commands show what they return."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import IO, Any, cast

from rayexpand.contract.secrets import masked

WIDE = 10_000  # columns


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
    width = None if sys.stdout.isatty() else WIDE  # a file has no edge to fold lines at
    console = Console(width=width, soft_wrap=False, markup=False, highlight=False)
    with console.capture() as drawn:
        console.print(table)
    print("\n".join(line.rstrip() for line in drawn.get().splitlines()))


def show(result: Any, as_json: bool) -> None:
    """A result of the API, as JSON or as its table, and below it what is a sentence."""
    if as_json:
        show_json(result.to_dict())
        return
    show_table(*result.table())
    if below := result.below():
        print("\n".join(["", *(masked(line) for line in below)]))


def warn(lines: Iterable[str], prefix: str = "rayexpand: ") -> None:
    """Lines on stderr."""
    for line in lines:
        print(f"{prefix}{line}", file=sys.stderr)


def quiet_stdout() -> contextlib.AbstractContextManager[Any]:
    """What libraries print goes to stderr: Ray prints to stdout what its actors do."""
    return contextlib.redirect_stdout(cast("IO[str]", _Quiet()))


class _Quiet:
    """stderr without what Ray prints of tasks that are ended because a command is: that they failed, and are tried
    again without end."""

    def __init__(self) -> None:
        self._left_out = threading.local()

    def write(self, text: str) -> int:
        ended = "killed by `ray.kill`" in text
        if not ended and not (text == "\n" and getattr(self._left_out, "line", False)):  # print writes its end apart
            sys.stderr.write(text)
        self._left_out.line = ended
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)
