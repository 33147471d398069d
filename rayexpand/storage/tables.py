"""Parquet tables and JSON files in a folder of any kind, which say what they hold and are checked when they are read.

    JSON      the field `seal` is a hash of the file's name and of every other field
    Parquet   every page has a checksum, and a hash of the footer lies just before it, where other readers do not look

Files of versions before this one have neither and are read as they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayexpand.contract.errors import DamagedFile
from rayexpand.contract.settings import digest
from rayexpand.storage.files import Files

log = logging.getLogger(__name__)

SEAL = "seal"
NAMED = b"name"  # schema metadata of a Parquet file that is known by its name: that name, as the folder has it
ROW_GROUP = 500  # images; viewers and readers load one row group at a time
_MARK = b"rayexpand seal 1"  # before the two hashes: of the pages, and of those 32 bytes with the footer
_TEXTS = 1 << 16  # strings made at once
_END = 8  # bytes of a Parquet file after its footer: length of the footer, PAR1

# ---------------------------------------------------------------------------------------------------------------- JSON


def sealed(name: str, content: Mapping[str, Any]) -> bytes:
    """A JSON file for `name` that says what it holds."""
    plain = json.loads(json.dumps({key: value for key, value in content.items() if key != SEAL}))
    return json.dumps({**plain, SEAL: digest([name, plain])}, indent=1).encode()


def unsealed(name: str, content: bytes, where: object) -> dict[str, Any]:
    """What `sealed` was given. Raises DamagedFile where that is not what is there."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{where}: is damaged: it is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise DamagedFile(f"{where}: is damaged: it holds no object")
    if (said := found.pop(SEAL, None)) is not None and said != digest([name, found]):
        raise DamagedFile(f"{where}: is damaged, was changed by hand, or is a copy of another file: its content does "
                          "not match its seal")
    return found


def read_json(files: Files, name: str) -> dict[str, Any] | None:
    """The object of a JSON file of ours, None where there is none. Raises DamagedFile."""
    content = files.read(name)
    return None if content is None else unsealed(name, content, files.at(name))


def healthy_json(files: Files, name: str) -> dict[str, Any] | None:
    """`read_json` of a file that is made again where it is gone: a damaged one is said to be, and counts as none."""
    try:
        return read_json(files, name)
    except DamagedFile as error:
        log.warning("%s. It counts as none; what made it makes it again", error)
        return None


def replace_json(files: Files, name: str, content: Mapping[str, Any]) -> None:
    files.replace(name, sealed(name, content))


def create_once(files: Files, name: str, content: dict[str, Any], step: str) -> dict[str, Any]:
    """Publishes JSON under `name`, or returns what is there already. Raises DamagedFile."""
    files.publish(name, sealed(name, content), step)
    found = read_json(files, name)
    assert found is not None
    return found


# ------------------------------------------------------------------------------------------------------------- Parquet


def parquet_bytes(table: pa.Table, metadata: dict[bytes, bytes], row_group: int = ROW_GROUP) -> bytes:
    return parquet_of([table], table.schema, metadata, row_group)


def parquet_of(tables: Iterable[pa.Table], schema: pa.Schema, metadata: dict[bytes, bytes],
               row_group: int = ROW_GROUP) -> bytes:
    """One file of all `tables`, each in row groups of its own; of its content nothing is held twice."""
    sink, schema = io.BytesIO(), schema.with_metadata(metadata)
    with pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True) as writer:
        for table in tables:
            if table.num_rows:  # `datasets` cannot read a row group of no rows
                writer.write_table(table.replace_schema_metadata(metadata), row_group)
    with sink.getbuffer() as content:
        start = len(content) - _END - int.from_bytes(content[-_END:-4], "little")
        pages, footer = hashlib.sha256(content[:start]).digest(), bytes(content[start:])
    sink.seek(start)
    sink.write(b"".join([_MARK, pages, _footer_hash(pages, footer), footer]))
    return sink.getvalue()


def open_parquet(reader: BinaryIO | Any, where: object = "a Parquet file") -> pq.ParquetFile:
    """A Parquet file of ours; what is read from it is checked. Raises DamagedFile for its footer; read pages inside
    `reading`."""
    # Read ahead or decoded by Arrow's own threads, a Python file is let go of by one of them at any later time; if the
    # interpreter ends just then, the process aborts (measured: 91 of 150 short processes).
    with reading(where):
        _check_footer(reader)
        found = pq.ParquetFile(reader, pre_buffer=False, page_checksum_verification=True)
        _check_name(found.schema_arrow, where)
        return found


def _check_name(schema: pa.Schema, where: object) -> None:
    named = (schema.metadata or {}).get(NAMED, b"").decode()
    if not str(where).endswith(named):
        raise ValueError(f"it is a copy of {named}")


@contextlib.contextmanager
def reading(where: object) -> Iterator[None]:
    """Names the file in what Arrow says of its content. Raises DamagedFile."""
    try:
        yield
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise _damaged(where, error) from error
    except OSError as error:
        if error.errno is not None:  # of the system: the place is to blame, not the content
            raise
        raise _damaged(where, error) from error


def _damaged(where: object, error: Exception) -> DamagedFile:
    return DamagedFile(f"{where}: is damaged ({' '.join(str(error).split())})")


def _check_footer(reader: BinaryIO | Any) -> None:
    size = reader.seek(0, io.SEEK_END)
    reader.seek(max(size - _END, 0))
    end = reader.read(_END)
    length = int.from_bytes(end[:4], "little")
    start = size - _END - length - len(_MARK) - 64
    if start >= 0:
        reader.seek(start)
        seal, footer = reader.read(len(_MARK) + 64), reader.read(length) + end
        if seal.startswith(_MARK) and _footer_hash(seal[-64:-32], footer) != seal[-32:]:
            raise ValueError("its footer does not match its seal")
    reader.seek(0)


def _footer_hash(pages: bytes, footer: Any) -> bytes:
    return hashlib.sha256(pages + footer).digest()


def pages_match(content: bytes) -> bool:
    """Whether all bytes of a Parquet file before its footer are those that were written; True for one without a
    seal."""
    start = len(content) - _END - int.from_bytes(content[-_END:-4], "little") - len(_MARK) - 64
    if start < 0 or content[start:start + len(_MARK)] != _MARK:
        return True
    return hashlib.sha256(memoryview(content)[:start]).digest() == content[start + len(_MARK):start + len(_MARK) + 32]


def read_table(files: Files, name: str, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file of ours, or some of its columns. Raises FileNotFoundError, or DamagedFile."""
    where = files.at(name)
    if columns is not None:
        with files.open(name) as reader:
            return read_columns(open_parquet(reader, where), where, columns)
    content = files.read(name)
    if content is None:
        raise FileNotFoundError(f"{where}: no such file")
    return table_of(content, where)


def table_of(content: bytes, where: object) -> pa.Table:
    """The table in a whole Parquet file of ours. Raises DamagedFile."""
    with reading(where):
        if not pages_match(content):
            raise ValueError("its content does not match its seal")
        _check_footer(io.BytesIO(content))
        native = pa.BufferOutputStream()
        native.write(content)
        found = pq.read_table(pa.BufferReader(native.getvalue()), page_checksum_verification=True)
        _check_name(found.schema, where)
        return found


def read_columns(parquet: pq.ParquetFile, where: object, columns: Sequence[str],
                 schema: pa.Schema | None = None) -> pa.Table:
    """Columns of an open file. One that came later than the file, which `schema` has, is filled with its default: the
    metadata `default` of its field as JSON, else null. Raises DamagedFile where one is not there."""
    there = parquet.schema_arrow.names
    with reading(where):
        later = [name for name in columns if name.partition(".")[0] not in there]
        if absent := [name for name in later if schema is None or name not in schema.names]:
            raise KeyError(f"it has no column {absent[0]}")
        table = parquet.read([name for name in columns if name not in later], use_threads=False)
    return _completed(table, later, schema)


def _completed(table: pa.Table, later: Sequence[str], schema: pa.Schema | None) -> pa.Table:
    for name in later:
        assert schema is not None
        field = schema.field(name)
        default = json.loads((field.metadata or {}).get(b"default", b"null"))
        table = table.append_column(field, pa.array([default] * table.num_rows, field.type))
    return table


def batches(parquet: pq.ParquetFile, where: object, rows: int, schema: pa.Schema) -> Iterator[pa.Table]:
    """All rows of an open file, at most `rows` at once, with the columns of `schema`: see `read_columns`. Raises
    DamagedFile."""
    later = [name for name in schema.names if name not in parquet.schema_arrow.names]
    found = parquet.iter_batches(rows, use_threads=False)
    while True:
        with reading(where):
            batch = next(found, None)
        if batch is None:
            return
        yield _completed(pa.Table.from_batches([batch]), later, schema)


def texts(column: pa.Array | pa.ChunkedArray) -> Iterator[str]:
    """The strings of a column, a few at a time: of millions of rows they would be gigabytes."""
    for start in range(0, len(column), _TEXTS):
        yield from column.slice(start, _TEXTS).to_pylist()


def find_rows(files: Files, name: str, column: str, value: str) -> pa.Table:
    """Rows of a Parquet file where `column` is `value`; of row groups without one only that column is read."""
    where = files.at(name)
    with files.open(name) as reader:
        parquet = open_parquet(reader, where)
        with reading(where):
            found = [parquet.schema_arrow.empty_table()]
            for group in range(parquet.num_row_groups):
                wanted = pc.equal(parquet.read_row_group(group, [column], use_threads=False)[column], value)
                if pc.any(wanted).as_py():
                    found.append(parquet.read_row_group(group, use_threads=False).filter(wanted))
            return pa.concat_tables(found)


def parquet_facts(files: Files, name: str, key: bytes) -> dict[str, Any] | None:
    """The JSON object under `key` in the footer of a Parquet file of ours, None where it has none. Raises
    FileNotFoundError, or DamagedFile."""
    where = files.at(name)
    with files.open(name) as reader:
        raw = (open_parquet(reader, where).schema_arrow.metadata or {}).get(key)
    with reading(where):
        return None if raw is None else dict(json.loads(raw))


# What pandas, and so `datasets`, reads as a missing value.
_NOTHING = frozenset({"#N/A", "#N/A N/A", "#NA", "<NA>", "N/A", "n/a", "NA", "NULL", "null", "NaN", "nan", "None",
                      "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"})
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
