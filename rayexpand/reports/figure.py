"""A figure as a file: the picture, and beside it every number that is drawn in it.

    <folder>/figures/<name>.svg     the picture, complete in itself
                     <name>.json    what is drawn, and the hash of the picture

A function that draws returns a Figure; the page shows `inline`, and `write_figures` keeps both files. They are written
again with the page; a figure that is no longer drawn stays until it is deleted.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rayexpand.contract.errors import DamagedFile, EnvironmentFault
from rayexpand.reports.drawing import standalone
from rayexpand.storage.files import Files
from rayexpand.storage.tables import csv_cell, read_json, replace_json

FOLDER = "figures"


@dataclass(frozen=True, slots=True)
class Figure:
    """`name`: of its files, words joined by hyphens; `svg`: an element as drawing.svg gives it; `numbers`: all that is
    drawn, as JSON takes it, with units in words."""

    name: str
    svg: str
    numbers: Mapping[str, Any]

    @property
    def inline(self) -> Markup:
        """For a page."""
        return Markup(self.svg)  # noqa: S704  (escaped where it is drawn)


@dataclass(frozen=True, slots=True)
class NumberTable:
    """A table with the numbers behind it. A cell: its text, a second line below it, and whether it stands out."""

    name: str
    title: str
    heads: tuple[str, ...]
    lines: tuple[tuple[tuple[str, str, bool], ...], ...]
    numbers: tuple[Mapping[str, Any], ...]


def write_figures(files: Files, figures: Iterable[Figure]) -> None:
    """Writes both files of each. Raises EnvironmentFault if the folder takes no more files."""
    with _writing(files, made := list(figures)):
        for one in made:
            picture = standalone(one.svg).encode()
            files.replace(f"{FOLDER}/{one.name}.svg", picture)
            replace_json(files, f"{FOLDER}/{one.name}.json", {**one.numbers, "svg_sha256": _hash(picture)})


def write_tables(files: Files, tables: Iterable[NumberTable]) -> None:
    """Writes <name>.json, and <name>.csv without single values. Raises EnvironmentFault as `write_figures` does."""
    with _writing(files, made := list(tables)):
        for one in made:
            lines, text = list(_flat(one.numbers)), io.StringIO()
            table = csv.DictWriter(text, list(dict.fromkeys(name for line in lines for name in line)),
                                   lineterminator="\n")
            table.writeheader()
            table.writerows({name: csv_cell(value) for name, value in line.items()} for line in lines)
            files.replace(f"{FOLDER}/{one.name}.csv", text.getvalue().encode())
            replace_json(files, f"{FOLDER}/{one.name}.json", {"kind": "table", "title": one.title,
                                                              "numbers": list(one.numbers)})


def read_figure(files: Files, name: str) -> dict[str, Any]:
    """The numbers of a figure. Raises DamagedFile where they were altered, or are not those of the picture."""
    numbers = read_json(files, f"{FOLDER}/{name}.json")
    if numbers is None or numbers.pop("svg_sha256", None) != _hash(files.read(f"{FOLDER}/{name}.svg") or b""):
        raise DamagedFile(f"{files.at(FOLDER)}/{name}.svg is not the picture of {name}.json; `rayexpand report` writes "
                          "both again")
    return numbers


@contextmanager
def _writing(files: Files, made: Sequence[Any]) -> Iterator[None]:
    """Makes the folder where there is something for it."""
    try:
        for folder in (".tmp", FOLDER) if made else ():
            files.make_folder(folder)
        yield
    except OSError as error:
        raise EnvironmentFault(f"{files.at(FOLDER)}: {error.strerror}. Free space or allow writing there, then run the "
                               "same command again; no result is touched.") from error


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _flat(numbers: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Lines without the single values; of a mapping below, its mean, sd and n."""
    for line in numbers:
        flat: dict[str, Any] = {}
        for name, value in line.items():
            if isinstance(value, Mapping):
                flat |= {name: value["mean"], f"{name}.sd": value["sd"], f"{name}.n": value["n"]}
            elif name != "values":
                flat[name] = value
        yield flat
