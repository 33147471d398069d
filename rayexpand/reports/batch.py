"""Training batches of a study as its recipe makes them: the images that the network is shown, their labels, and how
they were mixed. Drawn from figures/<name>.parquet, which studies/batches.py writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from rayexpand.reports.run import Picture, encoded_picture
from rayexpand.reports.templates import render
from rayexpand.runs.status import write_page
from rayexpand.storage.places import open_files
from rayexpand.studies.batches import write_batches

SHARES = 3  # classes of a label that are named


@dataclass(frozen=True, slots=True)
class ArmBatch:
    arm: str
    why: str  # it has no images
    size: int  # images of the whole batch
    real: int  # of those that are shown
    pictures: tuple[Picture, ...]


def write_batch_page(folder: str, *, images: int = 16, name: str = "batch") -> Path | str:
    """Writes figures/<name>.parquet and .html of a study; returns where the page is."""
    table = write_batches(folder, images=images, name=name)
    page = render("batch.html.j2", {}, arms=arms_of(table), file=f"{name}.parquet", folder=folder,
                  written=datetime.now(UTC))
    return write_page(open_files(folder), f"figures/{name}.html", page)


def arms_of(table: pa.Table) -> list[ArmBatch]:
    """The arms of a table of batches, in its order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        found.setdefault(row["arm"], []).append(row)
    return [ArmBatch(arm, rows[0]["why"] or "", rows[0]["batch"] or 0, sum(bool(row["is_real"]) for row in rows),
                     tuple(_picture(row) for row in rows if row["image"])) for arm, rows in found.items()]


def _picture(row: Mapping[str, Any]) -> Picture:
    label = label_words(row["label"])
    kind = "real" if row["is_real"] else "sample"
    title = f"{row['place'] + 1}, {kind}, item {row['item']}, label {label}"
    return encoded_picture(row["image"], f"{title}; {row['mixing']}" if row["mixing"] else title,
                           f"{row['place'] + 1} · {label}" + (
                               f" · {100 * row['own_share']:.0f} % own" if row["mixing"] and len(row["label"]) == 1
                               else ""))


def label_words(label: Sequence[Mapping[str, Any]]) -> str:
    """'four 0.62, nine 0.38'; a class alone without its share."""
    if len(label) == 1:
        return str(label[0]["name"])
    named = ", ".join(f"{one['name']} {one['share']:.2f}" for one in label[:SHARES])
    return named + (f", {len(label) - SHARES} more" if len(label) > SHARES else "")
