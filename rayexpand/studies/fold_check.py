"""What a fold was really trained on: its training set opened, and every row led back to its seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import numpy as np
import pyarrow as pa

from rayexpand.contract.errors import DamagedFile
from rayexpand.data.seeds import DataConfig
from rayexpand.data.subsets import images_of
from rayexpand.loader.config import TrainingConfig
from rayexpand.loader.training_set import SetPart, TrainingSet
from rayexpand.runs.joined import open_samples
from rayexpand.runs.run import Run
from rayexpand.storage.files import Files
from rayexpand.studies.kept import read_trial
from rayexpand.studies.trial import open_work


def leaked_seeds(files: Files, name: str, opened: Callable[[str], Run] = open_samples) -> list[str]:
    """Images that trial `name` was trained on, by themselves or by a sample, though it was asked for them: none but in
    sample. `opened`: opens the folder of a run that its training set names, which may have moved since.

    Raises DamagedFile, UsageError where the trial or a run is gone.
    """
    content = files.read(f"lists/{name}.txt")
    if content is None:
        raise DamagedFile(f"{files.at(f'lists/{name}.txt')}: is gone, so nothing tells what {name} was asked for; the "
                          "command that trained it writes it again")
    rows = open_work(files, trial := read_trial(files, name), TrainingConfig()).feed.rows
    asked = set(images_of(content.decode().splitlines(), DataConfig(**trial.test)))
    return sorted(asked.intersection(chain.from_iterable(_images(rows, opened))))


def _images(rows: TrainingSet, opened: Callable[[str], Run]) -> Iterator[list[str]]:
    """The images behind the rows of each part."""
    indexes = iter(rows.indexes)
    for part in rows.parts:
        if part.is_real:
            ids, data = next(indexes)["seed_id"], DataConfig(**part.data)
            taken = np.unique(rows.column("row")[part.first:part.stop])
        else:
            run = opened(part.run)
            ids, data, taken = run.plan.index.table["seed_id"], run.config.data, _positions(rows, part, run)
        yield images_of(ids.take(pa.array(taken)).to_pylist(), data)


def _positions(rows: TrainingSet, part: SetPart, run: Run) -> np.ndarray:
    """int64: which seeds of a run the samples of a part were made from."""
    chunk, row = (rows.column(name)[part.first:part.stop] for name in ("chunk", "row"))
    first = np.searchsorted(chunk, part.chunk + np.arange(len(part.chunks) + 1))
    receipts, found = {one.data_file: one for one in run.store.receipts()}, [np.zeros(0, np.int64)]
    for number, (name, group) in enumerate(part.chunks):
        with run.store.open(receipts[name]) as file:
            of_group = file.read_row_group(group, ["row"], use_threads=False)["row"].to_numpy()
        of_group = of_group + run.store.first_row(name)
        found.append(np.unique(run.plan.position(of_group[row[first[number]:first[number + 1]]])))
    return np.unique(np.concatenate(found))
