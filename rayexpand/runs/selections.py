"""Decisions beside a run, read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rayexpand.contract.errors import DamagedFile, UsageError
from rayexpand.runs.run import Run
from rayexpand.storage.tables import read_table, texts


@dataclass(frozen=True)
class Selection:
    """Decisions by sample id: sorted 8-byte digests and, for each, whether to keep."""

    name: str
    ids: np.ndarray  # uint64
    keep: np.ndarray  # bool

    def keeps(self, sample_ids: Sequence[str] | pa.ChunkedArray) -> pa.Array:
        """bool, of each sample. Raises UsageError for one that it does not know."""
        wanted = id_digests(texts(sample_ids) if isinstance(sample_ids, pa.ChunkedArray) else sample_ids)
        at = np.minimum(np.searchsorted(self.ids, wanted), len(self.ids) - 1)
        if len(unknown := np.flatnonzero(self.ids[at] != wanted)):
            raise UsageError(f"selection {self.name!r} says nothing about sample {sample_ids[int(unknown[0])]}; it was "
                             "made before that sample. Select again, then export.")
        return pa.array(self.keep[at])


def read_selection(run: Run, name: str) -> Selection:
    """The decision selections/<name>.parquet. Raises UsageError where there is none, or it is empty or ambiguous."""
    file = f"selections/{name}.parquet"
    try:
        if not re.fullmatch(r"[\w.-]+", name):
            raise FileNotFoundError(name)
        table = read_table(run.files, file, ["sample_id", "keep"])
    except FileNotFoundError as error:
        known = sorted(file.removesuffix(".parquet") for file in run.files.list("selections"))
        raise UsageError(f"{run.folder} has no selection {name!r}; it has {', '.join(known) or 'none'}. Make it with "
                         f"`rayexpand select` and a file with name: {name} and run: {run.folder}") from error
    except DamagedFile as error:
        raise DamagedFile(f"{error}. Delete it and select again") from error
    if not table.num_rows:
        raise UsageError(f"selection {name!r} of {run.folder} decides nothing; select again")
    ids = id_digests(texts(table["sample_id"]))
    order = np.argsort(ids)
    if (np.diff(ids[order]) == 0).any():
        raise UsageError(f"selection {name!r} of {run.folder} decides a sample twice; select again")
    return Selection(name, ids[order], table["keep"].to_numpy()[order])


def id_digests(sample_ids: Iterable[str]) -> np.ndarray:
    """uint64: 8 bytes for each id."""
    joined = bytearray()
    for one in sample_ids:
        joined += hashlib.blake2b(one.encode(), digest_size=8).digest()
    return np.frombuffer(joined, "<u8")
