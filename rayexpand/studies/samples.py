"""The training set of an arm: seeds, and the kept samples of runs with what is taken of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayexpand.classifier.seed_mixing import SeedMix
from rayexpand.contract.errors import ConfigError, UsageError, few
from rayexpand.contract.rng import PlanRng
from rayexpand.contract.schema import DATA_SCHEMA, ClassTable, Receipt, SeedIndex, data_place
from rayexpand.data.subsets import ids_hash
from rayexpand.loader.training_set import COLUMNS, DrawRule, Mode, RowSource, SetPart, TrainingSet, seed_rows
from rayexpand.runs.joined import open_samples
from rayexpand.runs.run import Run
from rayexpand.runs.selections import Selection, read_selection
from rayexpand.storage.files import each
from rayexpand.storage.tables import read_columns

_READ = ["label", "copy", "source_label", "strength"]  # of a data file


def training_set(parts: Sequence[RowSource], mode: Mode = "union", p: float = 0.0,
                 soft_label: Mapping[str, float] | None = None, draw: DrawRule = "uniform",
                 opened: Callable[[str], Run] = open_samples, mix: SeedMix | None = None) -> TrainingSet:
    """Training set of `parts`. Mode union: an epoch uses each row `weight` times. Mode replace (Diff-Mix): an epoch is
    one pass over the real rows, each replaced with probability `p` by a synthetic row; `draw` uniform takes any of
    them, inverse_freq first a class with probability proportional to 1 / (real rows of the class + 1), own one that was
    made from the very row. `mix`: samples are mixed with real images, which are then in the set with weight 0 where
    they are not trained.

    Seeds that the index refuses are left out, and so is a run that has no sample of the seeds in `only`. Raises
    ConfigError with everything that does not fit together (classes, modes, weights), UsageError for a run that is not
    complete or an unknown selection. `opened`: opens a run folder.
    """
    parts = sorted(parts, key=lambda one: one.seeds is None)
    if problems := _problems(parts, mode, p, draw, mix):
        raise ConfigError("training set", problems)
    found = [None if one.run is None else opened(one.run) for one in parts]
    indexes = [one.seeds[0] if one.seeds else run.plan.index  # type: ignore[union-attr]
               for one, run in zip(parts, found, strict=True)]
    tables = [index.classes for index in indexes]
    if problems := _class_problems(parts, tables) + _pending_problems(found) + _only_problems(parts, indexes):
        raise ConfigError("training set", problems)
    parts = [_restricted(one) for one in parts]
    with_seeds = mix is not None or draw == "own"
    blocks = [(one, *(seed_rows(one) if run is None else _sample_rows(one, run, with_seeds)))
              for one, run in zip(parts, found, strict=True)]
    if with_seeds:
        _name_seeds(blocks, found)
    blocks = [made for made in blocks if made[0].only is None or len(made[1]["row"])]
    return TrainingSet.join(blocks, tables[0], mode=mode, p=p, soft_label=soft_label, draw=draw, mix=mix)


def _name_seeds(blocks: Sequence[tuple[RowSource, dict[str, np.ndarray], SetPart]], runs: Sequence[Run | None]) -> None:
    """The column `seed` of every block. Raises UsageError for samples that were made from none of the real rows."""
    first, ids = 0, list[pa.Array]()
    for rows, block, _ in blocks:
        if rows.seeds is not None:
            ids.append(rows.seeds[0].table["seed_id"].combine_chunks().take(pa.array(block["row"])))
            block["seed"] = np.arange(first, first := first + len(block["row"]), dtype=np.int32)
    known = pa.concat_arrays(ids)
    for (rows, block, _), run in zip(blocks, runs, strict=True):
        if run is None:
            continue
        of_run = run.plan.index.table["seed_id"]
        at = pc.index_in(of_run, known).fill_null(-1).to_numpy()  # item of each seed of the run
        position = block.pop("seed")
        block["seed"] = at[position].astype(np.int32)
        if lost := np.unique(position[block["seed"] < 0]).tolist():
            raise UsageError(f"training set: {rows.name} has samples of {len(lost):,} images that are none of the real "
                             f"rows ({few(of_run.take(lost).to_pylist())}), so there is nothing to mix them with or to "
                             "replace by them; use the seeds that the run was made from")


def _problems(parts: Sequence[RowSource], mode: str, p: float, draw: str, mix: SeedMix | None) -> list[str]:
    found = [f"{one.name}: give either seeds or a run" for one in parts if (one.seeds is None) == (one.run is None)]
    found += [f"{one.name}: weight is {one.weight:g}; a row is used more than 0 times per epoch, or left out"
              for one in parts if not (one.weight > 0 or (one.weight == 0 and one.seeds and mix))]
    if mix is not None and not any(one.seeds is not None for one in parts):
        found.append("mixing needs the real images; give the seeds, of weight 0 where they are not to be trained")
    if mode != "replace" and draw != "uniform":
        found.append(f"draw {draw} says what replaces a real row, and nothing does; set mode replace")
    found += [f"{one.name}: copies, selection and limit are about runs; take them out" for one in parts
              if one.seeds is not None and any(value is not None for value in (one.copies, one.selection, one.limit))]
    if not parts:
        found.append("no rows at all; give seeds, a run, or both")
    if not 0 <= p <= 1:
        found.append(f"p is {p:g}; a probability lies between 0 and 1")
    if mode == "replace":
        if not any(one.seeds is not None for one in parts):
            found.append("mode replace needs seeds, whose images are replaced")
        if p > 0 and not any(one.run is not None for one in parts):
            found.append("mode replace with p > 0 needs a run to take samples from")
        if any(one.weight != 1 for one in parts):
            found.append("mode replace: an epoch is one pass over the real rows, so weights have no effect; leave them "
                         "at 1")
    elif p:
        found.append(f"p = {p:g} has no effect in mode {mode}; set mode replace")
    return found


def _class_problems(parts: Sequence[RowSource], tables: Sequence[ClassTable]) -> list[str]:
    return [f"{one.name}: its {len(table)} classes ({few(table.key)}) are not the {len(tables[0])} of {parts[0].name} "
            f"({few(tables[0].key)}), so labels would mean two things; use runs and seeds of one dataset"
            for one, table in zip(parts, tables, strict=True) if table.key != tables[0].key]


def _pending_problems(opened: Sequence[Run | None]) -> list[str]:
    return [f"run {run.folder}: {pending:,} of {run.facts['planned']:,} samples are pending; finish it first with "
            "`rayexpand expand`" for run in opened if run is not None and (pending := run.totals().pending)]


def _only_problems(parts: Sequence[RowSource], indexes: Sequence[SeedIndex]) -> list[str]:
    return [f"{one.name}: only has {len(one.only):,} entries for {len(index):,} seeds; give one for each"
            for one, index in zip(parts, indexes, strict=True) if one.only is not None and len(one.only) != len(index)]


def _restricted(rows: RowSource) -> RowSource:
    """Seeds without those that `only` leaves out: the set then holds no word of them."""
    if rows.seeds is None or rows.only is None:
        return rows
    index, data = rows.seeds
    return replace(rows, seeds=(SeedIndex(index.table.filter(pa.array(rows.only)), index.classes), data), only=None)


@dataclass(frozen=True)
class _Block:
    """The rows of one data file that are taken."""

    columns: dict[str, np.ndarray]  # row, label, source, strength; seed: position in the seed index of the run
    group: np.ndarray  # row group of each
    ids: list[str]  # sample ids, where they decide
    identity: bytes


def _sample_rows(rows: RowSource, run: Run, with_seeds: bool) -> tuple[dict[str, np.ndarray], SetPart]:
    chosen = read_selection(run, rows.selection) if rows.selection else None
    receipts = [receipt for receipt in run.store.receipts() if receipt.kept]
    block = {name: np.empty(sum(receipt.kept for receipt in receipts), COLUMNS.field(name).type.to_pandas_dtype())
             for name in COLUMNS.names}
    if with_seeds:
        block["seed"] = np.empty(len(block["row"]), np.int32)
    identity, filled, ids = hashlib.sha256(), 0, list[str]()
    chunks: list[tuple[str, int]] = []
    for receipt, found in zip(receipts, _blocks(run, receipts, rows, chosen, with_seeds), strict=True):
        size = len(found.group)
        identity.update(found.identity)
        ids += found.ids
        if not size:
            continue
        used, number = np.unique(found.group, return_inverse=True)
        block["chunk"][filled:filled + size] = number + len(chunks)
        for name, values in found.columns.items():
            block[name][filled:filled + size] = values
        chunks += [(receipt.data_file, int(group)) for group in used]
        filled += size
    block = {name: values[:filled] for name, values in block.items()}
    if rows.limit is not None:
        kept = _first_of_each_class(block["label"], ids, rows.limit, run)
        identity.update(np.packbits(kept).tobytes())
        block = {name: values[kept] for name, values in block.items()}
    method = run.config.method
    part = SetPart(0, 0, 0, rows.weight, ids_hash(run.plan.index.seed_ids), identity.hexdigest(), run=str(run.folder),
                   chunks=tuple(chunks), method={**method.model_dump(mode="json"), "name": method.name})
    return block, part


def _first_of_each_class(labels: np.ndarray, ids: Sequence[str], limit: np.ndarray, run: Run) -> np.ndarray:
    """bool (n,): the first limit[c] rows of each class in an order that the sample ids alone decide, so that a smaller
    limit keeps a part of what a larger one keeps. Raises UsageError where a class has fewer."""
    have = np.bincount(labels, minlength=len(limit))
    if len(short := np.flatnonzero(have < limit)):
        names = run.plan.index.classes.display
        few = ", ".join(f"{names[c]} has {have[c]:,} of {limit[c]:,}" for c in short[:3])
        raise UsageError(f"fill: {len(short)} classes have fewer samples in {run.folder} than bring them to the size "
                         f"of the largest ({few}{', ...' if len(short) > 3 else ''}); make more copies of each seed, "
                         "or draw target classes uniformly")
    order = np.lexsort((PlanRng(0, "study").per_seed("fill", ids), labels))
    ordered = labels[order]
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.searchsorted(ordered, ordered, side="left")
    return rank < limit[labels]


def _blocks(run: Run, receipts: Sequence[Receipt], rows: RowSource, chosen: Selection | None,
            with_seeds: bool) -> Iterator[_Block]:
    named = ["sample_id"] if chosen is not None or rows.limit is not None else []
    by_seed = isinstance(rows.copies, float | np.ndarray)
    below = rows.copies if isinstance(rows.copies, np.ndarray) else run.plan.first + run.plan.first_copies(rows.copies)
    numbered = ["row"] if with_seeds or rows.only is not None or by_seed else []

    def block(receipt: Receipt) -> _Block:
        with run.store.open(receipt) as file:
            table = read_columns(file, run.files.at(data_place(receipt.data_file)), _READ + named + numbered,
                                 DATA_SCHEMA)
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        first = run.store.first_row(receipt.data_file)
        position = run.plan.position(table["row"].to_numpy() + first) if numbered else None  # of their seeds
        most = below[position] if by_seed else rows.copies
        keep = np.ones(len(table), bool) if most is None else table["copy"].to_numpy() < most
        if rows.only is not None:
            keep &= rows.only[position]
        if chosen is not None:
            keep &= chosen.keeps(table["sample_id"]).to_numpy(zero_copy_only=False)
        identity = receipt.content_sha256.encode() + (b"" if keep.all() else np.packbits(keep).tobytes())
        columns = {"row": np.concatenate([np.arange(size) for size in sizes] or [np.arange(0)])[keep],
                   "label": table["label"].to_numpy()[keep], "source": table["source_label"].to_numpy()[keep],
                   "strength": table["strength"].to_numpy()[keep],
                   **({"seed": position[keep]} if position is not None and with_seeds else {})}
        ids = table["sample_id"].filter(pa.array(keep)).to_pylist() if rows.limit is not None else []
        return _Block(columns, np.repeat(np.arange(len(sizes)), sizes)[keep], ids, identity if keep.any() else b"")

    return each(run.store.files, block, receipts)
