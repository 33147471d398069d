"""Draws docs/samples.png: digits beside their samples by several methods.

    for method in img2img distdiff gif-sd; do rayexpand expand jobs/digits/expand-$method.yaml; done
    python docs/samples.py runs/digits-img2img runs/digits-distdiff runs/digits-gif-sd

`rayexpand fit jobs/digits/expand-distdiff.yaml` comes before the second one.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
from PIL import Image, ImageDraw

from rayexpand.data.seeds import DataConfig, SeedReader, build_index

SIDE, GAP, LEFT, COPIES = 64, 4, 96, 2


def seed_images() -> dict[str, np.ndarray]:
    """The first seed of each class by its id."""
    config = DataConfig(source="digits", per_class=2)
    index = build_index(config)
    chosen = np.unique(index.labels, return_index=True)[1]
    found = SeedReader(index, config).read(chosen.tolist())
    return {index.seed_ids[i]: _picture(one.image) for i, one in zip(chosen, found, strict=True)}


def samples(run: str) -> dict[str, np.ndarray]:
    table = ds.dataset(Path(run) / "data", format="parquet").to_table(["sample_id", "image"]).to_pylist()
    return {row["sample_id"]: _picture(row["image"]["bytes"]) for row in table}


def _picture(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.NEAREST))


def main(runs: list[str]) -> None:
    seeds = seed_images()
    rows = [("seed", list(seeds.values()))]
    for run in runs:
        made = samples(run)
        rows += [(Path(run).name.removeprefix("digits-"), [made[f"{seed}/{copy}"] for seed in seeds])
                 for copy in range(COPIES)]
    step = SIDE + GAP
    sheet = Image.new("L", (LEFT + step * len(seeds), step * len(rows)), 255)
    draw = ImageDraw.Draw(sheet)
    for y, (name, pictures) in enumerate(rows):
        if not y or name != rows[y - 1][0]:
            draw.text((4, y * step + SIDE // 2 - 8), name, fill=0, font_size=16)
        for x, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (LEFT + x * step, y * step + GAP // 2))
    sheet.save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
