"""The kept samples of a run in the order of its plan, with the scores that a rule of `select` looks at."""

# N samples

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayexpand.contract.errors import UsageError
from rayexpand.contract.schema import Receipt
from rayexpand.evaluation.chunk_columns import ChunkColumns
from rayexpand.evaluation.feature_file import FeatureFile
from rayexpand.evaluation.select_rules import ANCHOR, ANCHOR_ENTROPY, ENTROPY, FEATURES, TOP, ScoredSamples
from rayexpand.runs.plan import Plan
from rayexpand.runs.run import Run
from rayexpand.storage.files import each
from rayexpand.storage.tables import texts

LINES = 1 << 18  # of a decision, held as strings at once, and in a row group of its file
_COLUMNS = ["row", "label", "strength"]


@dataclass(frozen=True, eq=False)
class KeptSamples:
    table: ScoredSamples
    ids: PlanIds
    row: np.ndarray  # int64 (N,), rising
    strength: np.ndarray


def kept_samples(run: Run, receipts: Sequence[Receipt], columns: frozenset[str]) -> KeptSamples:
    """The kept samples in the order of the plan with the scores of the run that a rule looks at. Raises UsageError."""
    names: set[str] = set()

    def one(receipt: Receipt) -> pa.Table:
        table = run.store.data(receipt, [*_COLUMNS, "scores"] if columns else [*_COLUMNS])
        at = table.schema.get_field_index("row")
        table = table.set_column(at, "row", pc.add(table["row"], run.store.first_row(receipt.data_file)))
        if not columns:
            return table
        scores = table["scores"].combine_chunks()
        flat = scores.flatten()
        key, value, parent = flat.field("name"), flat.field("value").to_numpy(False), pc.list_parent_indices(scores)
        names.update(pc.unique(key).to_pylist())
        table = table.drop(["scores"])
        for column in sorted(columns):
            chosen = pc.equal(key, column).to_numpy(False)
            values_N = np.full(table.num_rows, np.nan)
            values_N[parent.to_numpy()[chosen]] = value[chosen]
            table = table.append_column(f"score {column}", pa.array(values_N))
        return table

    kept = {receipt.data_file: receipt for receipt in receipts if receipt.kept}
    if not kept:
        raise UsageError(f"{run.folder} has no kept sample to choose from")
    found = ChunkColumns({name: receipt.kept for name, receipt in kept.items()})
    for name, table in zip(kept, each(run.files, one, kept.values()), strict=True):
        found.add(name, table)
    if missing := sorted(columns - names):
        raise UsageError(f"rule.score: no sample of {run.folder} has a score {missing[0]!r}; it has "
                         f"{', '.join(sorted(names)) or 'none'}, and a guide gives clip_confidence, clip_contrast and "
                         "clip_entropy")
    values = _by_row(found)
    row_N, index = values["row"], run.plan.index
    counts = np.bincount(index.labels[index.labels >= 0], minlength=len(index.classes))
    ids = PlanIds(run.plan, row_N)
    rows = ScoredSamples(ids, values["label"], run.plan.position(row_N), counts,
                         {column: values[f"score {column}"] for column in columns})
    return KeptSamples(rows, ids, row_N, values["strength"])


def _by_row(found: ChunkColumns) -> dict[str, Any]:
    """The columns in the order of the plan, which files have but for retried rows."""
    order = _order(found.columns["row"])
    return found.columns if order is None else {name: values[order] for name, values in found.columns.items()}


def _order(row_N: Any) -> np.ndarray | None:
    """What puts rows in the order of the plan; None where they are: a copy of 13 million of each column is much."""
    return None if (row_N[1:] > row_N[:-1]).all() else np.argsort(row_N, kind="stable")


class PlanIds(Sequence[str]):
    """Sample ids of rows of a plan, made when they are asked for: as strings, those of 13 million are a gigabyte."""

    def __init__(self, plan: Plan, row_N: np.ndarray) -> None:
        self._plan, self._row_N = plan, row_N

    def __len__(self) -> int:
        return len(self._row_N)

    def __getitem__(self, at: Any) -> Any:
        return self._plan.ids_of(self._row_N[at:at + 1])[0].as_py()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), LINES):
            yield from texts(self.part(start))

    def part(self, start: int) -> pa.Array:
        """Those of LINES rows."""
        return self._plan.ids_of(self._row_N[start:start + LINES])


def in_plan_order(found: dict[str, np.ndarray | FeatureFile], rows: KeptSamples,
                   wanted: frozenset[str]) -> dict[str, np.ndarray | FeatureFile]:
    """Wanted scores of the samples, which come first, and those of their seeds, which follow."""
    count, numbers = len(rows.row), {name: one for name, one in found.items() if isinstance(one, np.ndarray)}
    order, features = _order(numbers["row"][:count]), found.get(FEATURES)
    scores: dict[str, np.ndarray | FeatureFile] = {
        name: one[:count] if order is None else one[:count][order] for name, one in numbers.items() if name in wanted}
    if isinstance(features, FeatureFile):
        scores[FEATURES] = features if order is None else features.ordered(order)
    if ANCHOR in wanted:
        scores |= {ANCHOR: numbers[TOP][count:][rows.table.seed],
                   ANCHOR_ENTROPY: numbers[ENTROPY][count:][rows.table.seed]}
    return scores
