"""Features of many images in a temporary file of this machine: those of a million are more than a driver may hold.

    h_ND    float32; row i is that of image i, whenever it came
"""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from pathlib import Path

import numpy as np

from rayexpand.storage.files import process_token, token_alive

PREFIX = "rayexpand-features-"


class FeatureFile:
    """Rows by their numbers, written and read in pieces; gone when it is closed, or, where its process was killed, when
    another one makes such a file. A copy in another process of this machine reads the same file."""

    def __init__(self, rows: int) -> None:
        _remove_those_of_dead_processes()
        self._file = tempfile.NamedTemporaryFile(prefix=f"{PREFIX}{process_token()}-")  # noqa: SIM115  # `close` ends it
        self.path, self.width = Path(self._file.name), 0
        self._count = rows
        self._order: np.ndarray | None = None

    def __enter__(self) -> FeatureFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self._count if self._order is None else len(self._order)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}

    def close(self) -> None:
        self._file.close()

    def ordered(self, order: np.ndarray) -> FeatureFile:
        """The same rows, of which row i is now row order[i]. Nothing is copied."""
        found = copy.copy(self)
        found._order = order if self._order is None else self._order[order]
        return found

    def write(self, start: int, h_ND: np.ndarray) -> None:
        """Rows `start` and on, by the numbers that they have in the file."""
        h_ND = np.ascontiguousarray(h_ND, np.float32)
        assert self.width in (0, h_ND.shape[1])
        self.width = h_ND.shape[1]
        self._file.seek(start * self._row_bytes)
        self._file.write(h_ND.data)
        self._file.flush()

    def read(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, D) of the file; rows that nobody wrote are zeros."""
        h_ND = np.zeros((stop - start, self.width), np.float32)
        with self.path.open("rb") as file:
            file.seek(start * self._row_bytes)
            file.readinto(h_ND.reshape(-1).view(np.uint8).data)
        return h_ND

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """(len(rows), D) of rows in any order; neighbours are read at once."""
        rows = rows if self._order is None else self._order[rows]
        h_ND = np.empty((len(rows), self.width), np.float32)
        content, at = memoryview(h_ND.reshape(-1).view(np.uint8).data), 0
        with self.path.open("rb", buffering=0) as file:
            for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
                size = len(run) * self._row_bytes
                read = os.preadv(file.fileno(), [content[at:at + size]], int(run[0]) * self._row_bytes) if size else 0
                assert read == size
                at += size
        return h_ND

    @property
    def _row_bytes(self) -> int:
        return 4 * self.width


def _remove_those_of_dead_processes() -> None:
    for stale in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        token = stale.name.removeprefix(PREFIX).rpartition("-")[0]
        with contextlib.suppress(OSError):
            if stale.stat().st_uid == os.getuid() and not token_alive(token):
                stale.unlink()
