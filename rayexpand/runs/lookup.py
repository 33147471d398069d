"""Rows of a run by the seeds they were made from, read without the rest: of a run of millions of samples, the row
groups of the seeds that are asked for.

Seeds are chosen by a key, never by what their samples look like, so pages of several runs show the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayexpand.contract.rng import PlanRng
from rayexpand.contract.schema import Receipt, data_place
from rayexpand.runs.status import RunView, read_plan_table
from rayexpand.storage.tables import reading

Place = tuple[str, int]  # seed id, copy


@dataclass(frozen=True)
class SeedRows:
    """What became of the rows of some seeds: kept rows with every column, and why the others are not there."""

    kept: Mapping[Place, dict[str, Any]]
    refused: Mapping[Place, str]  # status and reason
    planned: Mapping[str, int] = field(default_factory=dict)  # seed id -> copies, of seeds of the run
    first: Mapping[str, int] = field(default_factory=dict)  # seed id -> number of the first copy, where it is not 0

    def places(self, seed_ids: Sequence[str], copies: int) -> list[Place]:
        """The first `copies` of each seed in this run."""
        return [(one, self.first.get(one, 0) + i) for one in seed_ids for i in range(copies)]

    def absence(self, place: Place) -> str:
        """Why a row is not kept, in words."""
        if place in self.refused:
            return self.refused[place]
        seed_id, copy = place
        if seed_id not in self.planned:
            return "not a seed of this run"
        return "not planned" if copy - self.first.get(seed_id, 0) >= self.planned[seed_id] else "pending"


def seed_table(view: RunView) -> pa.Table:
    """seed_id, label, copies, shard and first of every seed of the plan, shard being the list of those it has copies
    in, first the number of its first copy."""
    table = read_plan_table(view, "seeds.parquet")
    if "first" not in table.column_names:
        table = table.append_column("first", pa.array(np.zeros(len(table), np.uint16)))
    table = table.select(["seed_id", "label", "copies", "shard", "first"])
    seed, shard = np.arange(len(table)), table["shard"].to_numpy()
    if "grown" in view.run:
        portions = read_plan_table(view, "parts.parquet").sort_by("seed")
        seed, shard = portions["seed"].to_numpy(), portions["shard"].to_numpy()
    start = np.searchsorted(seed, np.arange(len(table) + 1)).astype(np.int32)
    return table.set_column(3, "shard", pa.ListArray.from_arrays(pa.array(start), pa.array(shard)))


def keyed_seeds(tables: Sequence[pa.Table], per_class: int, classes: int | None = None,
                seed: int = 0) -> dict[int, list[str]]:
    """Label -> up to `per_class` seed ids with copies that the most of some runs share, by a key of the seed id alone;
    of `classes` classes, evenly over the labels (None: all). A smaller choice lies inside a larger one."""
    planned = [table.filter(pc.greater(table["copies"], 0)).select(["seed_id", "label"]) for table in tables]
    counted = pa.concat_tables(planned).group_by(["seed_id", "label"]).aggregate([([], "count_all")])
    if not counted.num_rows:
        return {}
    shared = counted.filter(pc.equal(counted["count_all"], pc.max(counted["count_all"])))
    ids, labels = shared["seed_id"].to_pylist(), shared["label"].to_numpy()
    order = np.lexsort((PlanRng(seed, "pictures").per_seed("seeds", ids), labels))
    there = np.unique(labels)
    chosen = there if classes is None else there[np.unique(np.linspace(0, len(there) - 1, classes).round().astype(int))]
    first = np.searchsorted(labels[order], chosen)
    stop = np.searchsorted(labels[order], chosen, side="right")
    return {int(label): [ids[i] for i in order[a:min(b, a + per_class)]]
            for label, a, b in zip(chosen, first, stop, strict=True)}


def rows_of(view: RunView, table: pa.Table, seed_ids: Sequence[str], copies: int | None = None) -> SeedRows:
    """The rows of seeds, the first `copies` of each. `table`: that of `seed_table`. Raises DamagedFile."""
    mine = table.filter(pc.is_in(table["seed_id"], pa.array(seed_ids, pa.string())))
    wanted = mine.select(["seed_id", "first"])
    shards = {shard for one in mine["shard"].to_pylist() for shard in one}
    kept, refused = dict[Place, dict[str, Any]](), dict[Place, str]()
    for receipt in (one for one in view.receipts if one.shard_id in shards):  # a retry comes after what it retries
        for row in _kept(view, receipt, wanted, copies):
            kept[row["seed_id"], row["copy"]] = row
            refused.pop((row["seed_id"], row["copy"]), None)
        for row in _refused(view, receipt, wanted["seed_id"]):
            refused[row["seed_id"], row["copy"]] = f"{row['status']}: {row['reason']}"
    ids, planned, first = (mine[name].to_pylist() for name in ("seed_id", "copies", "first"))
    return SeedRows(kept, refused, dict(zip(ids, planned, strict=True)),
                    {one: number for one, number in zip(ids, first, strict=True) if number})


def _kept(view: RunView, receipt: Receipt, wanted: pa.Table, copies: int | None) -> Iterator[dict[str, Any]]:
    """One row group at a time, and of those without a wanted row two columns only."""
    if not receipt.kept:
        return
    with view.store.open(receipt) as parquet, reading(view.files.at(data_place(receipt.data_file))):
        for group in range(parquet.num_row_groups):
            names = parquet.read_row_group(group, ["seed_id", "copy"], use_threads=False)
            at = pc.index_in(names["seed_id"], wanted["seed_id"])
            chosen = pc.is_valid(at)
            if copies is not None:
                below = pc.add(pc.take(wanted["first"].cast(pa.int64()), at), copies)
                chosen = pc.and_kleene(chosen, pc.fill_null(pc.less(names["copy"], below), False))
            if pc.any(chosen).as_py():
                yield from parquet.read_row_group(group, use_threads=False).filter(chosen).to_pylist()


def _refused(view: RunView, receipt: Receipt, wanted: pa.ChunkedArray) -> list[dict[str, Any]]:
    table = view.store.refused(receipt).select(["seed_id", "copy", "status", "reason"])
    return table.filter(pc.is_in(table["seed_id"], wanted.combine_chunks())).to_pylist()
