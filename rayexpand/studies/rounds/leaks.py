"""What folds were trained on, by the lists that are there: no seed that a fold scores, and no sample of one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayexpand.loader.config import TrainingConfig
from rayexpand.loader.training_set import SetPart, TrainingSet
from rayexpand.runs.run import Run
from rayexpand.storage.files import Files
from rayexpand.storage.tables import open_parquet, reading
from rayexpand.studies.kept import read_trial
from rayexpand.studies.trial import open_work


def fold_leaks(files: Files, prefix: str, scores: pa.Table, runs: Mapping[int, Run]) -> list[str]:
    """One line for each list of a fold `<prefix>-fold<k>` that has a seed or a sample which that fold scores. `runs`:
    by their rounds. Lists and trials that were cleared away say nothing. Raises DamagedFile."""
    problems, fold_n = [], scores["fold"].to_numpy()
    there = {name.removesuffix(".json") for name in files.list("trials", f"{prefix}-fold")}
    for name in sorted(there):
        trial = read_trial(files, name)
        held = scores["seed_id"].filter(pa.array(fold_n == int(name.rpartition("-fold")[2]))).combine_chunks()
        if files.read(trial.rows) is None:
            continue
        rows = open_work(files, trial, TrainingConfig()).feed.rows
        trained = pa.concat_arrays([_seeds_of(rows, part, runs) for part in rows.parts]).unique()
        if leaked := int(pc.sum(pc.is_in(trained, held)).as_py() or 0):
            problems.append(f"{trial.rows}: {leaked:,} seeds that {name} scores are in what it was trained on, or "
                            "samples of theirs are, so that its scores say nothing")
    return problems


def _seeds_of(rows: TrainingSet, part: SetPart, runs: Mapping[int, Run]) -> pa.Array:
    """string: the seed of each row of a part."""
    chunk, row = (rows.column(name)[part.first:part.stop] for name in ("chunk", "row"))
    if part.is_real:
        return rows.indexes[0]["seed_id"].take(pa.array(row)).combine_chunks()
    run = runs[int(part.run.rpartition("/")[2])]  # a loop may have moved since
    numbers = [_rows_in(run, name, group) for name, group in part.chunks]
    first = np.concatenate([[0], np.cumsum([len(one) for one in numbers])])
    position = run.plan.position(np.concatenate(numbers)[first[chunk - part.chunk] + row])
    return run.plan.index.table["seed_id"].take(pa.array(position)).combine_chunks()


def _rows_in(run: Run, name: str, group: int) -> np.ndarray:
    where = run.files.at(f"data/{name}")
    with run.files.open(f"data/{name}") as reader, reading(where):
        return open_parquet(reader, where).read_row_group(group, ["row"], use_threads=False)["row"].to_numpy()
