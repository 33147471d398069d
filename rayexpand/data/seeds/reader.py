"""Index rows -> encoded images, and who is to blame when one cannot be read."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from rayexpand.contract.errors import EnvironmentFault, RowFault, UsageError, looked_at
from rayexpand.contract.schema import Reason, Seed, SeedIndex
from rayexpand.data.seeds.layouts import LAYOUTS
from rayexpand.data.seeds.places import NotRegular, reason_of
from rayexpand.data.seeds.source import DataConfig

_WHY = {Reason.BAD_LABEL: "its label is null or not a label of the dataset",
        Reason.DUPLICATE_ID: "its id was already taken by an earlier row (in a tar, the files of a sample must lie "
                             "together, and a key ends at the first dot of the file name: write 1_8t for 1.8t)",
        Reason.MISSING: "it has no image: a link to nothing, or a row without one",
        Reason.UNSAFE_PATH: "it leaves the dataset folder, or is a link to a folder that holds the link itself; keep "
                            "images, and the manifest, below one folder",
        Reason.UNREADABLE: "it is not a regular file, or its name is not valid UTF-8",
        Reason.TOO_LARGE: "its file has 2 GiB or more"}

UNREAD = "it could not be read when it was expanded"


class SeedReader:
    """Encoded images of index rows. A parquet row group, or a whole .npz split, is read once and kept."""

    def __init__(self, index: SeedIndex, data: DataConfig) -> None:
        metadata = index.table.schema.metadata or {}
        if (source := metadata.get(b"layout", b"").decode()) != data.source:
            raise UsageError(f"the seed index was made from source '{source}', not '{data.source}'; plan again")
        self._table, self._data = index.table, data
        layout = LAYOUTS[data.source]
        self._place = layout.root(data)
        self._read = layout.reader(self._place, json.loads(metadata[b"files"]), data)

    def read(self, rows: Sequence[int]) -> list[Seed | RowFault]:
        """Seeds of `rows`, in their order; a RowFault stands for an image that is missing, unreadable or refused by
        the index. Raises EnvironmentFault when the storage fails rather than the image."""
        picked = self._table.take(pa.array(rows, pa.int64())).to_pylist()
        found: list[Any] = [None] * len(picked)
        for i in sorted(range(len(picked)), key=lambda i: (picked[i]["file"], picked[i]["group"])):
            found[i] = self._one(picked[i])
        return found

    def _one(self, row: dict[str, Any]) -> Seed | RowFault:
        if row["fault"]:
            return RowFault(row["fault"], f"{row['seed_id']}: {_WHY.get(Reason(row['fault']), UNREAD)}")
        try:
            return Seed(row["seed_id"], row["label"], self._read(row))
        except RowFault as fault:
            return fault
        except EnvironmentFault:
            raise
        except Exception as error:
            return self._refused(error, row["seed_id"])

    def _refused(self, error: Exception, seed_id: str) -> RowFault:
        remote = self._place.fs is not None
        if isinstance(error, MemoryError) or not (remote or isinstance(error, OSError | pa.ArrowException)):
            raise error
        reason = reason_of(error, remote)
        if reason is None or (not remote and _is_empty(self._place.root)):
            raise EnvironmentFault(f"data.path: reading seed '{seed_id}' from '{self._data.path}'"
                                   f"{looked_at(self._data.path or '')} failed: {error!r}; "
                                   "check that the storage is mounted and reachable, then run the same command again"
                                   ) from error
        what = ("the file is gone" if reason is Reason.MISSING else
                "it is a pipe, socket or device; put the image itself there" if isinstance(error, NotRegular) else
                f"cannot be read ({type(error).__name__})")
        return RowFault(reason, f"{seed_id}: {what}")


def _is_empty(folder: str) -> bool:
    """Whether there is nothing in a local folder, or no folder: what a lost mount looks like."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return not os.path.isfile(folder)
