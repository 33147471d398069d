"""A closer look at a guided run, with its models: samples beside what their noise gives without guidance.

The page of a run (run.py) needs no model; `rayexpand report RUN --strips N` loads them once and adds this to it. Where
samples lie for the guide, and those it is least sure of, are pages of their own (maps.py, failures.py).
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from PIL import Image

from rayexpand import methods
from rayexpand.contract.errors import UsageError
from rayexpand.contract.protocols import Batch, Method, Tools
from rayexpand.contract.schema import Receipt
from rayexpand.reports.run import Picture, picture_of, score_texts, spread
from rayexpand.runs import run as runs
from rayexpand.runs.expander import Expander

SHARDS = 4  # looked at, evenly over the run
# What scores beside a strip begin with.
HEADLINES = ("energy", "score", "retained", "clamp", "flip", "entropy_before", "entropy_after", "loss_before")


@dataclass(frozen=True, slots=True)
class Strip:
    name: str  # class
    seed: Picture
    plain: Picture
    guided: Picture
    scores: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Look:
    twin: str  # how the plain images were made
    strips: tuple[Strip, ...]


@dataclass(frozen=True, slots=True)
class _Row:
    """A kept sample with the batch it came from."""

    sample: dict[str, Any]  # a row of its data file
    batch: Batch
    slot: int
    pixels: np.ndarray  # uint8 (H, W, 3)


def look(folder: str, strips: int) -> Look:
    """Loads the models of a guided run and looks at some of its samples. Raises UsageError for a run whose method has
    no guide or that has no sample yet, DigestMismatch where its models have changed."""
    run = runs.open_run(folder, check_models=True, kept=False)  # plain samples are shown beside those of the run
    method = run.config.method
    if "guide" not in method.needs():
        raise UsageError(f"--strips compares guided samples with plain ones, and {method.name} as it was run here has "
                         "no guide; leave --strips out")
    expander = runs.expander_of(run, attempt=0)
    try:
        rows = list(_rows(run, expander))
        if not rows:
            raise UsageError(f"{folder} has no kept sample to show yet; run `rayexpand expand` first")
        tools = expander.loaded()
        twin = plain_twin(method)
        return Look(_described(twin), _strips(rows, twin, tools, strips))
    finally:
        expander.close()


def plain_twin(method: Method) -> Method:
    """The method without guidance, from the same noise where it gets the same batch: the method itself where it has
    such a setting, else image-to-image with its strength, steps and scale."""
    if hasattr(method, "unguided"):
        return method.unguided()
    field = type(method).model_fields.get("guidance")  # type: ignore[attr-defined]
    if field is not None and "none" in get_args(field.annotation):
        return method.model_copy(update={"guidance": "none"})  # type: ignore[attr-defined]
    shared = ("prompt", "negative", "strength", "steps", "guidance_scale")
    return methods.load_method("img2img", {name: getattr(method, name) for name in shared if hasattr(method, name)})


def _described(twin: Method) -> str:
    return f"{twin.name} without guidance" if hasattr(twin, "guidance") or hasattr(twin, "unguided") else twin.name


def _rows(run: runs.Run, expander: Expander) -> Iterator[_Row]:
    """Kept samples of some shards."""
    kept: Sequence[Receipt] = [receipt for receipt in run.store.receipts() if receipt.kept]
    for receipt in spread(kept, SHARDS):
        table = {row["sample_id"]: row for row in run.store.data(receipt).to_pylist()}
        for batch in expander.batches(receipt.shard_id):
            for slot, draw in enumerate(batch.draws):
                if not batch.filler[slot] and (row := table.get(draw.sample_id)) and row["attempt"] == draw.attempt:
                    yield _Row(row, batch, slot, _pixels(row["image"]["bytes"]))


def _pixels(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG")) as image:
        return np.asarray(image.convert("RGB"))


def _strips(rows: Sequence[_Row], twin: Method, tools: Tools, count: int) -> tuple[Strip, ...]:
    """One sample of each of `count` seeds, the classes in turn; the plain ones are made in one call."""
    first: dict[str, _Row] = {}
    for row in rows:
        first.setdefault(row.sample["seed_id"], row)
    by_class: dict[int, list[_Row]] = {}
    for row in sorted(first.values(), key=lambda row: row.sample["label"]):
        by_class.setdefault(row.sample["label"], []).append(row)
    turns = [of_class[i] for i in range(count) for of_class in by_class.values() if i < len(of_class)]
    chosen = sorted(turns[:count], key=lambda row: row.sample["label"])
    images = twin.expand(_batch(chosen), tools).images
    return tuple(Strip(tools.classes.display[row.sample["label"]], _shown(_seed(row), f"seed {row.sample['seed_id']}"),
                       _shown(plain, "plain, the same noise"), _shown(row.pixels, row.sample["sample_id"]),
                       tuple(line for line in score_texts(row.sample) if line[0].startswith(HEADLINES)))
                 for row, plain in zip(chosen, images, strict=True))


def _batch(rows: Sequence[_Row]) -> Batch:
    return Batch(tuple(row.batch.draws[row.slot] for row in rows), tuple(_seed(row) for row in rows),
                 tuple(row.batch.rngs[row.slot] for row in rows), (False,) * len(rows))


def _seed(row: _Row) -> np.ndarray:
    return row.batch.images[row.slot]


def _shown(pixels: np.ndarray | None, title: str) -> Picture:
    if pixels is None:
        return Picture(title=f"{title}: no finite image")
    return picture_of(Image.fromarray(pixels), title)
