"""Parquet tables and JSON files in a folder of any kind."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayexpand.storage.files import Files

_ROW_GROUP = 500  # images; viewers and readers load one row group at a time


def read_table(files: Files, name: str, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file, or some of its columns. Raises FileNotFoundError."""
    if columns is not None:
        with files.open(name) as reader:
            return open_parquet(reader).read(columns, use_threads=False)
    content = files.read(name)
    if content is None:
        raise FileNotFoundError(f"{files.at(name)}: no such file")
    native = pa.BufferOutputStream()
    native.write(content)
    return pq.read_table(pa.BufferReader(native.getvalue()))


def find_rows(files: Files, name: str, column: str, value: str) -> pa.Table:
    """Rows of a Parquet file where `column` is `value`; of row groups without one only that column is read."""
    with files.open(name) as reader:
        parquet = open_parquet(reader)
        found = [parquet.schema_arrow.empty_table()]
        for group in range(parquet.num_row_groups):
            wanted = pc.equal(parquet.read_row_group(group, [column], use_threads=False)[column], value)
            if pc.any(wanted).as_py():
                found.append(parquet.read_row_group(group, use_threads=False).filter(wanted))
        return pa.concat_tables(found)


def open_parquet(reader: Any) -> pq.ParquetFile:
    # Read ahead or decoded by Arrow's own threads, a Python file is let go of by one of them at any later time; if the
    # interpreter ends just then, the process aborts (measured: 91 of 150 short processes).
    return pq.ParquetFile(reader, pre_buffer=False)


def parquet_bytes(table: pa.Table, metadata: dict[bytes, bytes], row_group: int = _ROW_GROUP) -> bytes:
    sink = io.BytesIO()
    table = table.replace_schema_metadata(metadata)
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        if table.num_rows:  # `datasets` cannot read a row group of no rows
            writer.write_table(table, row_group)
    return sink.getvalue()


# What pandas, and so `datasets`, reads as a missing value.
_NOTHING = frozenset({"#N/A", "#N/A N/A", "#NA", "<NA>", "N/A", "n/a", "NA", "NULL", "null", "NaN", "nan", "None"})
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")  # is written as it was read


def csv_cell(value: Any) -> Any:
    """A text that spreadsheets and readers of tables take for this text: with an apostrophe before it where it begins
    like a formula, or with an apostrophe, or where it would be read as nothing, true, false or another number (`NA`,
    `007`). Taking one apostrophe away gives every text back."""
    is_risky = isinstance(value, str) and (value.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "'")) or
                                           value in _NOTHING or _reads_as_another(value))
    return f"'{value}" if is_risky else value


def _reads_as_another(text: str) -> bool:
    try:
        return float(text) is not None and not _NUMBER.fullmatch(text)
    except ValueError:
        return text.lower() in ("true", "false")


def create_once(files: Files, name: str, content: dict[str, Any], step: str) -> dict[str, Any]:
    """Publishes JSON under `name`, or returns what is there already."""
    files.publish(name, json.dumps(content, indent=1, sort_keys=True).encode(), step)
    found = files.read(name)
    assert found is not None
    return json.loads(found)
