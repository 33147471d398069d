"""What the classifiers of a study look at: Grad-CAM of the same test images under each arm, drawn from
figures/<name>.parquet, which studies/saliency.py writes.

A map is brought to the size of its image (bilinear), divided by its own maximum and laid over the image in grey by a
colour scale whose brightness rises with it; a line encloses where it is above half, so that nothing is said by colour
alone.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from rayexpand.reports.run import Picture, encoded_picture, picture_of
from rayexpand.reports.templates import render
from rayexpand.runs.status import write_page
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import read_table
from rayexpand.studies.saliency import write_saliency

SIDE = 160  # pixels of a drawn map, at least
MAP_SHARE = 0.6  # of the colour in the overlay, the rest is the image in grey


@dataclass(frozen=True, slots=True)
class ArmMaps:
    """One line of the table: an arm with a map for each image, or why it has none."""

    arm: str
    layer: str
    right: int
    pictures: tuple[Picture, ...]
    why: str


def write_saliency_page(folder: str, *, images: int = 10, name: str = "saliency") -> Path | str:
    """Computes and keeps the maps of a study with kept weights, and writes figures/<name>.html; returns where."""
    write_saliency(folder, images=images, name=name)
    files = open_files(folder)
    table = read_table(files, f"figures/{name}.parquet")
    arms = arms_of(table)
    page = render("saliency.html.j2", {}, images=images_of(table), arms=arms, folder=folder, file=f"{name}.parquet",
                  written=datetime.now(UTC))
    return write_page(files, f"figures/{name}.html", page)


def images_of(table: pa.Table) -> list[Picture]:
    """The test images, as the first arm that has maps is shown them."""
    rows = [row for row in table.to_pylist() if row["image"]]
    return [encoded_picture(row["image"], f"{row['image_id']}, {row['class']}", row["class"]) for row in rows
            if row["trial"] == rows[0]["trial"]]


def arms_of(table: pa.Table) -> list[ArmMaps]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        found.setdefault(row["arm"], []).append(row)
    return [ArmMaps(arm, rows[0]["layer"] or "", sum(row["answered"] == row["class"] for row in rows if row["image"]),
                    tuple(_picture(row) for row in rows if row["image"]), rows[0]["why"] or "")
            for arm, rows in found.items()]


def _picture(row: Mapping[str, Any]) -> Picture:
    with Image.open(io.BytesIO(row["image"]), formats=("PNG",)) as image:
        pixels = np.asarray(image.convert("L"))
    drawn = overlay(pixels, np.array(row["map"], np.float32).reshape(row["height"], row["width"]))
    is_right = row["answered"] == row["class"]
    said = f"{'✓' if is_right else '✗ ' + row['answered']} {100 * row['probability']:.0f} %"
    return picture_of(Image.fromarray(drawn), f"{row['image_id']}: {row['class']} with probability "
                      f"{row['probability']:.3f}, answered {row['answered']}; map of {row['layer']}, largest value "
                      f"{max(row['map']):.3g}", said)


def overlay(grey_HW: np.ndarray, map_hw: np.ndarray) -> np.ndarray:
    """uint8 (S, S, 3): the map of an image over it, with a line where it crosses half of its maximum. A map of zeros
    leaves the image grey."""
    from matplotlib import colormaps
    from scipy.ndimage import binary_dilation

    side = max(SIDE, *grey_HW.shape)
    size = (side, side)
    image_SS = np.asarray(Image.fromarray(grey_HW).resize(size, Image.Resampling.NEAREST), np.float32) / 255
    scaled_hw = map_hw / (map_hw.max() or 1.0)
    map_SS = np.asarray(Image.fromarray(scaled_hw.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    colour_SS3 = colormaps["viridis"](map_SS)[..., :3]
    blended_SS3 = (1 - MAP_SHARE) * image_SS[..., None] + MAP_SHARE * colour_SS3
    inside_SS = map_SS > 0.5
    line_SS = binary_dilation(inside_SS, iterations=2) & ~inside_SS
    blended_SS3[binary_dilation(line_SS)] = 0.0
    blended_SS3[line_SS] = 1.0
    return (blended_SS3 * 255).round().astype(np.uint8)
