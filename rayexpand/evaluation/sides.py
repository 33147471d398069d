"""The images of one side of a comparison: which they are, and how a worker anywhere reads them.

A side is cut into chunks (a data file of the run, or consecutive seeds). Beside what its reader needs, each row of a
chunk says whether its features come to the driver (`keep`) and which half of the reference it is of (`half`: 1, 2, or 0
for none), both by a keyed choice over the whole side.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from rayexpand.contract.errors import RowFault
from rayexpand.contract.rng import PlanRng
from rayexpand.contract.schema import ClassTable, Receipt, SeedIndex, data_place
from rayexpand.data.pixels import PILLOW_PIXELS
from rayexpand.data.seeds import DataConfig, SeedReader, build_index
from rayexpand.evaluation import features as extractors
from rayexpand.evaluation.features import ImageBatch
from rayexpand.evaluation.intake import IntakeConfig
from rayexpand.runs.run import Run
from rayexpand.runs.selections import read_selection
from rayexpand.storage.files import each
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import read_table

CHUNK = 2048  # seeds read, and held encoded, at once
SPAN_IMAGES, SPANS = 16_384, 64  # images of a span at most, and into how many spans a smaller side is cut


class ChunkImages(NamedTuple):
    images: list[bytes | RowFault]  # encoded
    labels: np.ndarray  # int64, of each


@dataclass(frozen=True)
class Side:
    """The images of one side in their order. `read` turns one of `chunks` into encoded images, anywhere; labels are
    places in `keys`."""

    name: str
    chunks: list[pa.Table]
    read: Callable[[pa.Table], ChunkImages]
    min_side: int = 1
    max_pixels: int = PILLOW_PIXELS
    keys: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(chunk.num_rows for chunk in self.chunks)

    def calls(self, chunk: pa.Table, size: int, batch: int, intake: IntakeConfig | None = None
              ) -> Iterator[ImageBatch]:
        found = self.read(chunk)
        for call in extractors.calls(found.images, size, batch, min_side=self.min_side, max_pixels=self.max_pixels,
                                     intake=intake):
            yield call._replace(labels=found.labels[list(call.at)])

    @property
    def spans(self) -> list[range]:
        """Consecutive chunks that are summed together: a function of the side alone, so that sums do not depend on how
        many workers there are."""
        least, found, start, images = min(SPAN_IMAGES, -(-len(self) // SPANS)), [], 0, 0
        for number, chunk in enumerate(self.chunks):
            images += chunk.num_rows
            if images >= least or number == len(self.chunks) - 1:
                found.append(range(start, number + 1))
                start, images = number + 1, 0
        return found

    def alone(self) -> Side:
        """Without its chunks, as it travels."""
        return replace(self, chunks=[], keys=())


@dataclass(frozen=True)
class Choice:
    """Which images of a side are taken, and of how many at most the features come to the driver; all by a key."""

    images: int | None = None
    rows: int = 50_000
    seed: int = 0


EVERY_ROW = Choice(rows=sys.maxsize)


def samples_of(run: Run, choice: Choice, selection: str | None = None, copies: float | None = None) -> Side:
    """The kept samples of a run that are chosen; one chunk is one data file."""
    chosen = read_selection(run, selection) if selection else None
    rng = PlanRng(choice.seed, "evaluate")
    whole = chosen is None and copies is None and choice.images is None
    below = run.plan.first + run.plan.first_copies(copies)

    def rows_of(receipt: Receipt) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a data file, and the number that ranks each for `images`."""
        if whole:
            return np.arange(receipt.kept), np.zeros(receipt.kept)
        table = run.store.data(receipt, ["sample_id", "copy", "row"])
        ids = table["sample_id"].to_pylist()
        keep = np.ones(len(ids), bool) if chosen is None else np.asarray(chosen.keeps(ids))
        if copies is not None:
            row_N = table["row"].to_numpy() + run.store.first_row(receipt.data_file)
            keep &= table["copy"].to_numpy() < below[run.plan.position(row_N)]
        return np.flatnonzero(keep), rng.per_seed("images", ids)[keep]

    receipts = [receipt for receipt in run.store.receipts() if receipt.kept]
    parts = list(each(run.files, rows_of, receipts))
    limit = _limit([rank for _, rank in parts], choice.images)
    chunks = []
    for receipt, (rows, rank) in zip(receipts, parts, strict=True):
        if len(rows := rows[rank <= limit]):
            chunks.append(pa.table({"row": rows}).replace_schema_metadata({b"file": receipt.data_file.encode()}))
    return Side("samples", _marked(chunks, choice, halves=False), partial(read_samples, str(run.folder)),
                keys=run.plan.index.classes.key)


def reference_of(data: DataConfig, choice: Choice) -> Side:
    """The real images that are chosen; seeds known to be faulty only count as refused."""
    return seeds_of(build_index(data), data, choice, "reference")


def seeds_of(index: SeedIndex, data: DataConfig, choice: Choice, name: str) -> Side:
    """Images of an index that are chosen."""
    table = index.table
    if choice.images is not None:
        rank = PlanRng(choice.seed, "evaluate").per_seed("images", table["seed_id"].to_pylist())
        rank[np.asarray(table["fault"].to_pylist()) != ""] = 2.0
        table = table.take(pa.array(np.flatnonzero(rank <= _limit([rank], choice.images))))
    files = json.loads(table.schema.metadata[b"files"])
    chunks = [_with_own_files(table.slice(i, CHUNK), files) for i in range(0, table.num_rows, CHUNK)]
    return Side(name, _marked(chunks, choice, halves=True), partial(read_seeds, data), data.min_side, data.max_pixels,
                index.classes.key)


def read_samples(folder: str, chunk: pa.Table) -> ChunkImages:
    """Chosen rows of a data file."""
    table = read_table(open_files(folder), data_place(chunk.schema.metadata[b"file"].decode()), ["image", "label"])
    table = table.take(chunk["row"])
    return ChunkImages([image["bytes"] for image in table["image"].to_pylist()], table["label"].to_numpy())


def read_seeds(data: DataConfig, chunk: pa.Table) -> ChunkImages:
    """Rows of a seed index, a RowFault for one that cannot be read."""
    found = SeedReader(SeedIndex(chunk, ClassTable.of([])), data).read(range(chunk.num_rows))
    return ChunkImages([one if isinstance(one, RowFault) else one.image for one in found], chunk["label"].to_numpy())


def _marked(chunks: Sequence[pa.Table], choice: Choice, *, halves: bool) -> list[pa.Table]:
    """The chunks with `keep` and `half`. Rows that are kept are as many of both halves."""
    total = sum(chunk.num_rows for chunk in chunks)
    order = PlanRng(choice.seed, "evaluate").dataset("rows").permutation(total)
    half_N, keep_N, middle = np.zeros(total, np.int8), np.zeros(total, bool), total // 2
    if halves:
        half_N[order[:middle]], half_N[order[middle:2 * middle]] = 1, 2
        kept = choice.rows // 2 if total > choice.rows else total
        keep_N[order[:kept]] = keep_N[order[middle:middle + kept]] = True
    else:
        keep_N[order[:choice.rows]] = True
    found, start = [], 0
    for chunk in chunks:
        rows = slice(start, start + chunk.num_rows)
        found.append(chunk.append_column("keep", pa.array(keep_N[rows])).append_column("half", pa.array(half_N[rows])))
        start += chunk.num_rows
    return found


def _limit(ranks: Sequence[np.ndarray], images: int | None) -> float:
    """The rank of the last image taken; ranks of 2 and more are never taken."""
    ranks_N = np.concatenate([np.empty(0), *ranks])
    if images is None or len(ranks_N) <= images:
        return 1.0
    return min(1.0, float(np.partition(ranks_N, images - 1)[images - 1]))


def _with_own_files(table: pa.Table, files: Sequence[str]) -> pa.Table:
    """The rows with only the file names they need: a chunk travels, thousands of names would travel with each."""
    used, file = np.unique(table["file"].to_numpy(), return_inverse=True)
    column = table.schema.get_field_index("file")
    metadata = {**table.schema.metadata, b"files": json.dumps([files[i] for i in used]).encode()}
    return table.set_column(column, table.schema.field(column), pa.array(file, pa.int32())
                            ).replace_schema_metadata(metadata)
