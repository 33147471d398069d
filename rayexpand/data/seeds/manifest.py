"""A CSV or parquet file with one line per image: its path, its label, perhaps an id and a split.

Paths are relative to the manifest's folder and may not leave it. Seed ids are the paths as written, or `id_column`.
"""

from __future__ import annotations

import csv
import io
import posixpath
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayexpand.contract.errors import SeedDataError, few, looked_at
from rayexpand.contract.schema import Reason
from rayexpand.data.seeds.columns import require, require_label
from rayexpand.data.seeds.labels import encode_labels, is_text, label_array, parsed_labels
from rayexpand.data.seeds.listing import SPLIT_NAMES, Listing, Read, fault_code, unique_ids
from rayexpand.data.seeds.places import Place, blaming, place, read_below, read_bytes, read_text
from rayexpand.data.seeds.source import DataConfig

_ROWS = 1 << 16  # of a parquet file that are looked through at a time
_PATH_COLUMNS = ("path", "file_name")  # where there is no column of the default name


def root(data: DataConfig) -> Place:
    assert data.path is not None
    return place("data.path", data.path).parent()


def check(data: DataConfig) -> None:
    """Looks at the columns. Raises SeedDataError."""
    _columns(data, schema(data))


def schema(data: DataConfig) -> pa.Schema:
    """All columns of the file; those of a CSV are text. Raises SeedDataError."""
    assert data.path is not None
    where = place("data.path", data.path)
    with blaming("data.path", data.path, where):
        if (kind := where.kind()) != "file":
            what = "is a folder; name the CSV or parquet file in it" if kind else (
                f"does not exist{looked_at(data.path)}; correct the path")
            raise SeedDataError(f"data.path: '{data.path}' {what}")
        if not _is_parquet(data):
            return pa.schema([(name, pa.string()) for name in _header(data)])
        with where.open() as raw:
            return pq.read_schema(raw)


def _is_parquet(data: DataConfig) -> bool:
    return str(data.path).split("::")[0].lower().endswith(".parquet")


def _header(data: DataConfig) -> list[str]:
    """Column names of a CSV."""
    assert data.path is not None
    where = place("data.path", data.path)  # kept: a zip closes with its last reference
    with where.open() as raw:
        start = raw.read(1 << 16).decode("utf-8-sig", errors="replace")
    try:
        return next(csv.reader(io.StringIO(start)), [])
    except csv.Error as error:
        raise _no_csv(data, 1, error) from error


def _no_csv(data: DataConfig, line: int, error: csv.Error) -> SeedDataError:
    return SeedDataError(f"data.path: '{data.path}' is not CSV (after line {line}: {error}); save it as CSV with a "
                         "header line")


def _columns(data: DataConfig, schema: pa.Schema, text: str | None = None) -> dict[str, str]:
    """Column of each role: image, label, and id, split, text where they are used. Raises SeedDataError."""
    name, image = posixpath.basename(str(data.path)), data.image_column
    if image not in schema.names and image == DataConfig.model_fields["image_column"].default:
        image = next((column for column in _PATH_COLUMNS if column in schema.names), image)
    split = data.split_column
    if split not in schema.names and split == DataConfig.model_fields["split_column"].default:
        split = next((column for column in schema.names if column.lower() == split), split)
    split_used = split if data.split or split in schema.names else None
    require({"image_column": image, "label_column": data.label_column, "id_column": data.id_column,
             "split_column": split_used}, schema.names, name)
    require_label(data.label_column, schema.field(data.label_column).type)
    if not is_text(schema.field(image).type):
        raise SeedDataError(f"data.image_column: '{image}' is {schema.field(image).type}; a manifest holds image paths "
                            "as strings (use source: parquet for embedded images)")
    roles = {"image": image, "label": data.label_column, "id": data.id_column, "split": split_used, "text": text}
    return {role: column for role, column in roles.items() if column is not None}


def list_seeds(data: DataConfig) -> Listing:
    """Reads the manifest only; whether an image is there shows when it is read."""
    check(data)
    table = _rows(data)
    starts = _full_starts(data)
    resolved = [_resolve(path, starts) for path in table["image"].to_pylist()]
    ids, repeated = _ids(data, table)
    label = table["label"]
    if not _is_parquet(data):
        label = parsed_labels(label.to_pylist(), data)
    encoded = encode_labels(label, data, table.schema)
    labels, keys = encoded.codes, encoded.keys
    faults = np.fromiter((fault_code(fault) for _, fault in resolved), np.int8)
    faults[(faults == 0) & (labels < 0)] = fault_code(Reason.BAD_LABEL)
    faults[repeated & (faults != fault_code(Reason.UNSAFE_PATH))] = fault_code(Reason.DUPLICATE_ID)
    nowhere = np.full(len(ids), -1, np.int32)
    return Listing(ids, labels, faults, keys, keys, [""], np.zeros(len(ids), np.int32),
                   pa.array([member for member, _ in resolved], pa.string()), nowhere, nowhere, encoded.named)


def texts(data: DataConfig, column: str) -> tuple[pa.Array, pa.Array]:
    """(seed ids, cells of another column), row by row. Raises SeedDataError."""
    table = _rows(data, column)
    return _ids(data, table)[0], table["text"].combine_chunks()


def _rows(data: DataConfig, text: str | None = None) -> pa.Table:
    """One column per role of the rows of data.split, and `text`, another column, where one is named."""
    table = _read_parquet(data, text) if _is_parquet(data) else _read_csv(data, text)
    return table.filter(_rows_of_split(data, table["split"])) if "split" in table.column_names else table


def _ids(data: DataConfig, table: pa.Table) -> tuple[pa.Array, np.ndarray]:
    """Ids, and a mask of the rows whose id was taken."""
    ids = table["image"].combine_chunks()
    if data.id_column:
        ids = pc.coalesce(table["id"].combine_chunks(), ids)
    stem = posixpath.splitext(posixpath.basename(str(data.path)))[0]
    numbers = pa.array(np.arange(len(table))).cast(pa.string())
    return unique_ids(pc.coalesce(ids, pc.binary_join_element_wise(stem, numbers, "/")))


def _read_csv(data: DataConfig, text: str | None) -> pa.Table:
    """One string column per role; empty and absent cells are null."""
    assert data.path is not None
    rows = csv.DictReader(io.StringIO(read_text("data.path", data.path)))
    try:
        columns = _columns(data, pa.schema([(name, pa.string()) for name in rows.fieldnames or []]), text)
        cells = []
        said = _SplitColumns(data, [name for name in rows.fieldnames or [] if name not in columns.values()], columns)
        for row in rows:
            said.see(row)
            if any(row.get(None, ())):
                width = len(rows.fieldnames or [])
                raise SeedDataError(f"data.path: line {rows.line_num} of '{data.path}' has {width + len(row[None])} "
                                    f"cells, the header {width}; put quotes around a cell that holds a comma")
            cells.append([row[column] or None for column in columns.values()])
    except csv.Error as error:
        raise _no_csv(data, rows.line_num, error) from error
    said.refuse()
    found = zip(*cells, strict=True) if cells else [()] * len(columns)
    return pa.table({role: pa.array(column, pa.string()) for role, column in zip(columns, found, strict=True)})


def _read_parquet(data: DataConfig, text: str | None) -> pa.Table:
    assert data.path is not None
    content = pa.BufferReader(read_bytes("data.path", data.path))
    with blaming("data.path", data.path, Place("")):
        columns = _columns(data, pq.read_schema(content), text)
        _refuse_split_columns(data, content, columns)
        table = pq.read_table(content, columns=sorted(set(columns.values())))
    words = is_text(table.schema.field(columns["label"]).type)
    cast = {role: pa.chunked_array([label_array(table[column], words if role == "label" else True)])
            for role, column in columns.items()}
    return pa.table(cast).replace_schema_metadata(table.schema.metadata)


def splits(data: DataConfig) -> list[str]:
    table = _read_parquet(data, None) if _is_parquet(data) else _read_csv(data, None)
    return _values(table["split"]) if "split" in table.column_names else []


def _values(split: pa.ChunkedArray) -> list[str]:
    return sorted(pc.unique(split).drop_null().to_pylist())


def _rows_of_split(data: DataConfig, split: pa.ChunkedArray) -> pa.ChunkedArray:
    there = _values(split)
    if data.split is None and len(there) > 1:
        raise SeedDataError(f"data.split: missing, '{data.path}' holds several splits; set it to one of {few(there)}")
    if data.split is not None and data.split not in there:
        raise SeedDataError(f"data.split: no row with {data.split_column} '{data.split}' in '{data.path}'; it has "
                            f"{few(there)}")
    return pc.fill_null(pc.equal(split, data.split), False) if data.split else pa.chunked_array([[True] * len(split)])


class _SplitColumns:
    """Columns that no setting names and that say several splits: rows of all of them would be one dataset."""

    def __init__(self, data: DataConfig, names: list[str], columns: Mapping[str, str]) -> None:
        free = data.split is None and data.ids is None and "split" not in columns
        self._data, self._seen = data, {name: set[str]() for name in names if free}

    def see(self, row: Mapping[str, Any]) -> None:
        for name in [*self._seen]:
            if value := row[name]:
                self._seen[name].add(value)
                if value.strip().lower() not in SPLIT_NAMES:
                    del self._seen[name]

    def names(self) -> list[str]:
        return [*self._seen]

    def refuse(self) -> None:
        for name, values in self._seen.items():
            if len({value.strip().lower() for value in values}) > 1:
                raise SeedDataError(f"data.split: missing, the column '{name}' of '{self._data.path}' says several "
                                    f"splits; set data.split_column to '{name}' and data.split to one of "
                                    f"{few(sorted(values))}, or list the seeds in data.ids")


def _refuse_split_columns(data: DataConfig, content: pa.BufferReader, columns: Mapping[str, str]) -> None:
    with pq.ParquetFile(content) as file:
        schema = file.schema_arrow
        said = _SplitColumns(data, [name for name, kind in zip(schema.names, schema.types, strict=True)
                                    if is_text(kind) and name not in columns.values()], columns)
        for size in (100, _ROWS):  # most columns are none of them by their first rows
            for batch in file.iter_batches(size, columns=said.names()) if said.names() else ():
                for row in batch.to_pylist():
                    said.see(row)
                if size < _ROWS or not said.names():
                    break
    said.refuse()


def _full_starts(data: DataConfig) -> tuple[str, ...]:
    """How a full path or URL of something in the manifest's folder begins."""
    folder, given = root(data).root, posixpath.dirname(str(data.path))
    starts = [folder, f"file://{folder}", *([given] if given.startswith("/") or "://" in given else [])]
    return tuple(f"{start.rstrip('/')}/" for start in starts)


def _resolve(path: str | None, starts: tuple[str, ...]) -> tuple[str, str]:
    """(path below the manifest's folder, fault). Full paths and URLs are fine as long as they lie below it."""
    if not path:
        return "", Reason.MISSING
    path = next((path.removeprefix(start) for start in starts if path.startswith(start)), path)
    member = posixpath.normpath(path)
    if re.match(r"[/\\]|[A-Za-z]:[/\\]|\w[\w+.-]*://", path) or member.split("/")[0] == ".." or "\0" in path:
        return "", Reason.UNSAFE_PATH
    return member, ""


def reader(folder: Place, files: list[str], data: DataConfig) -> Read:
    def read(row: dict[str, Any]) -> bytes:
        return read_below(folder, row["member"], row["seed_id"])

    return read
