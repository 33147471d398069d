"""A column of texts beside the images of a table: one for each row of a seed index."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayexpand.contract.errors import SeedDataError, few
from rayexpand.contract.schema import SeedIndex
from rayexpand.data.seeds import manifest, parquet
from rayexpand.data.seeds.labels import is_text
from rayexpand.data.seeds.places import blaming
from rayexpand.data.seeds.source import DataConfig, image_id


def text_problem(data: DataConfig, column: str) -> str:
    """Why `texts` cannot have this column; "" where it can. Raises EnvironmentFault."""
    if data.source not in ("parquet", "manifest"):
        return (f"data.source '{data.source}' has no columns; use source parquet or manifest, or give texts in a file "
                "by seed id")
    try:
        schema = parquet.check(data)[1] if data.source == "parquet" else manifest.schema(data)
    except SeedDataError:
        return ""  # said by the check of `data` itself
    if column not in schema.names:
        return f"no column '{column}' in '{data.path}', which has {few(schema.names)}"
    if not is_text(kind := schema.field(column).type):
        return f"'{column}' is {kind}, and has to be text"
    return ""


def texts(data: DataConfig, index: SeedIndex, column: str) -> list[str | None]:
    """The text of each row of `index`, None where the cell is empty. Raises SeedDataError, EnvironmentFault."""
    if problem := text_problem(data, column):
        raise SeedDataError(f"column: {problem}")
    if data.source == "manifest":
        ids, found = manifest.texts(data, column)
        images = pa.array([image_id(data, seed_id) for seed_id in index.seed_ids], pa.string())
        return found.take(pc.index_in(images, value_set=ids)).to_pylist()
    return _of_parquet(data, index, column)


def _of_parquet(data: DataConfig, index: SeedIndex, column: str) -> list[str | None]:
    place, files = parquet.root(data), json.loads((index.table.schema.metadata or {})[b"files"])
    file_n, group_n, offset_n = (index.table[name].to_numpy() for name in ("file", "group", "offset"))
    found: list[str | None] = [None] * len(index)
    for number in np.unique(file_n):
        rows, name = np.flatnonzero(file_n == number), files[number]
        with blaming("data.path", name, place), place.at(name).open() as raw, \
                pq.ParquetFile(raw, pre_buffer=False) as file:
            if column not in file.schema_arrow.names:
                raise SeedDataError(f"data.path: '{name}' has no column '{column}', unlike the first file")
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            cells = file.read(columns=[column], use_threads=False).column(0).cast(pa.string()).combine_chunks()
        first = np.concatenate([[0], np.cumsum(sizes)])
        some = cells.take(pa.array(first[group_n[rows]] + offset_n[rows])).to_pylist()
        for row, text in zip(rows.tolist(), some, strict=True):
            found[row] = text
    return found
