"""Pictures in rows and columns with their names, for the eye of whoever trains a generator."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 96  # pixels a picture has at least; small ones are enlarged by whole factors
GAP = 4
LETTERS, LINE = 13, 17  # of the names, pixels: size, and from one line to the next
NAME = 150  # pixels for the name of a row
INK, PAPER, MISSING = (27, 35, 48), (255, 255, 255), (0, 0, 0)


def picture_grid(rows: Sequence[Sequence[np.ndarray | None]], names: Sequence[str], heads: Sequence[str],
                 title: str) -> Image.Image:
    """uint8 (H, W, 3) pictures, None for black: below a title and a head for each column, each row behind its name."""
    height, width = next(one.shape[:2] for row in rows for one in [*row, np.zeros((1, 1, 3))] if one is not None)
    scale = max(1, -(-CELL // max(height, width)))
    wide, high = width * scale, height * scale
    font = ImageFont.load_default(LETTERS)
    letters = max(4, round(wide / (0.56 * LETTERS)))
    tops = [textwrap.wrap(head, letters)[:3] for head in heads]
    top = LINE + GAP + LINE * max(map(len, tops), default=0)
    page = Image.new("RGB", (NAME + len(heads) * (wide + GAP), top + len(rows) * (high + GAP)), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((GAP, 0), title, fill=INK, font=font)
    for x, lines in enumerate(tops):
        draw.multiline_text((NAME + x * (wide + GAP), LINE), "\n".join(lines), fill=INK, font=font)
    for y, (row, name) in enumerate(zip(rows, names, strict=True)):
        down = top + y * (high + GAP)
        lines = textwrap.wrap(name, round(NAME / (0.56 * LETTERS)))[:max(1, high // LINE)]
        draw.multiline_text((GAP, down), "\n".join(lines), fill=INK, font=font)
        for x, one in enumerate(row):
            picture = Image.new("RGB", (width, height), MISSING) if one is None else Image.fromarray(one)
            page.paste(picture.resize((wide, high), Image.Resampling.NEAREST), (NAME + x * (wide + GAP), down))
    return page
