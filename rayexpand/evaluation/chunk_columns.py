"""Numbers of the rows of many chunks as columns, filled as chunks come: 13 million rows are a few hundred MB, and no
tables are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from itertools import pairwise

import numpy as np
import pyarrow as pa

from rayexpand.evaluation.feature_file import FeatureFile


class ChunkColumns:
    """The columns `names` of all chunks, in the order of the chunks; None: all that the first table has. Numbers are
    arrays; lists of one length are rows of a FeatureFile.

    `sizes`: the key of each chunk and its rows.
    """

    def __init__(self, sizes: Mapping[str, int], names: Sequence[str] | None = None) -> None:
        ends = np.cumsum([0, *sizes.values()]).tolist()
        self._rows, self._names = dict(zip(sizes, pairwise(ends), strict=True)), names
        self._total, self._there = ends[-1], set[str]()
        self.columns: dict[str, np.ndarray | FeatureFile] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._there

    @property
    def missing(self) -> Set[str]:
        """Keys of the chunks that have not come."""
        return self._rows.keys() - self._there

    def add(self, key: str, table: pa.Table) -> None:
        start, stop = self._rows[key]
        assert table.num_rows == stop - start
        for name in self._names or table.column_names:
            values = table[name].combine_chunks()
            if pa.types.is_fixed_size_list(values.type):
                if name not in self.columns:
                    self.columns[name] = FeatureFile(self._total)
                file = self.columns[name]
                assert isinstance(file, FeatureFile)
                file.write(start, values.flatten().to_numpy().reshape(len(values), -1))
                continue
            numbers = values.to_numpy(zero_copy_only=False)
            if name not in self.columns:
                self.columns[name] = np.empty(self._total, numbers.dtype)
            column = self.columns[name]
            assert isinstance(column, np.ndarray)
            column[start:stop] = numbers
        self._there.add(key)
