"""Hugging Face parquet: encoded images in a struct or binary column, or paths beside the files.

In the index, group is the row group and offset the row inside it.
"""

from __future__ import annotations

import posixpath
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayexpand.contract.errors import RowFault, SeedDataError, few
from rayexpand.contract.schema import Reason
from rayexpand.data.seeds.columns import require, require_label
from rayexpand.data.seeds.files import DatasetFiles, dataset_files, root
from rayexpand.data.seeds.labels import class_label_names, encode_labels, is_text, label_array
from rayexpand.data.seeds.listing import Listing, Read, Skipped, blanks, fault_code, unique_ids
from rayexpand.data.seeds.places import Place, blaming, read_below
from rayexpand.data.seeds.source import DataConfig

__all__ = ["check", "list_seeds", "reader", "root", "splits"]


def check(data: DataConfig) -> tuple[DatasetFiles, pa.Schema]:
    """The files, and the schema of the first file, whose columns are checked. Raises SeedDataError."""
    found = dataset_files(data, ".parquet")
    place, files = found.folder, found.names
    with blaming("data.path", files[0], place), place.at(files[0]).open() as file:
        schema = pq.read_schema(file)
    require({name: getattr(data, name) for name in ("image_column", "label_column", "id_column")}, schema.names,
            files[0])
    require_label(data.label_column, schema.field(data.label_column).type)
    image = schema.field(data.image_column).type
    if not (_is_binary(image) or (pa.types.is_struct(image) and image.get_field_index("bytes") >= 0)):
        raise SeedDataError(f"data.image_column: '{data.image_column}' is {image}; images are struct{{bytes,path}} or "
                            "binary")
    return found, schema


def splits(data: DataConfig) -> list[str]:
    return dataset_files(data, ".parquet").splits


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def list_seeds(data: DataConfig) -> Listing:
    """Reads footers, labels and ids only, never image bytes."""
    found, schema = check(data)
    place, files = found.folder, found.names
    skipped = Skipped()
    skipped.add(found.others)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda name: _list_file(data, place, name, schema), files))
    label_parts, id_parts, groups = zip(*parts, strict=True)
    sizes = [len(part) for part in id_parts]
    encoded = encode_labels(pa.chunked_array(label_parts), data, schema)
    labels, keys = encoded.codes, encoded.keys
    ids = pa.chunked_array(id_parts).combine_chunks()
    ids, repeated = unique_ids(ids) if data.id_column else (ids, np.zeros(len(ids), bool))
    faults = np.zeros(len(ids), np.int8)
    faults[repeated] = fault_code(Reason.DUPLICATE_ID)
    faults[labels < 0] = fault_code(Reason.BAD_LABEL)
    group = [np.repeat(np.arange(len(rows), dtype=np.int32), rows) for rows in groups]
    offset = [np.arange(count, dtype=np.int32) for rows in groups for count in rows]
    return Listing(ids, labels, faults, keys, keys, files, np.repeat(np.arange(len(files), dtype=np.int32), sizes),
                   blanks(len(ids)), np.concatenate(group), np.concatenate(offset), encoded.named, skipped,
                   lambda: found.left_out(data, ".parquet"))


def _list_file(data: DataConfig, place: Place, name: str, schema: pa.Schema) -> tuple[pa.Array, pa.Array, list[int]]:
    """Labels, ids and row-group sizes of one file."""
    columns = [data.label_column] + ([data.id_column] if data.id_column else [])
    with blaming("data.path", name, place), place.at(name).open() as raw, pq.ParquetFile(raw, pre_buffer=False) as file:
        if absent := [c for c in columns if c not in file.schema_arrow.names]:
            raise SeedDataError(f"data.path: '{name}' has no column {few(absent)}, unlike the first file; remove it "
                                "or narrow data.split")
        _same_labels(data, name, file.schema_arrow, schema)
        table = file.read(columns=columns, use_threads=False)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    numbers = pa.array(np.arange(len(table))).cast(pa.string())
    ids = pc.binary_join_element_wise(posixpath.splitext(posixpath.basename(name))[0], numbers, "/")
    if data.id_column:
        ids = pc.coalesce(table[data.id_column].cast(pa.string()).combine_chunks(), ids)
    text = is_text(schema.field(data.label_column).type)
    return label_array(table[data.label_column], text), ids, sizes


def _same_labels(data: DataConfig, name: str, here: pa.Schema, first: pa.Schema) -> None:
    """Raises SeedDataError for a file whose labels mean something else than those of the first file."""
    kind, wanted = here.field(data.label_column).type, first.field(data.label_column).type
    if not pa.types.is_null(kind) and (is_text(kind), pa.types.is_integer(kind)) != (
            is_text(wanted), pa.types.is_integer(wanted)):
        raise SeedDataError(f"data.label_column: '{data.label_column}' is {kind} in '{name}' and {wanted} in the first "
                            "file; write all files with one type, or narrow data.split")
    names, known = class_label_names(here, data.label_column), class_label_names(first, data.label_column)
    if names is not None and known is not None and names != known:
        raise SeedDataError(f"data.label_column: '{name}' numbers other classes ({few(names)}) than the first file "
                            f"({few(known)}); write all files with the same names, or narrow data.split")


def reader(folder: Place, files: list[str], data: DataConfig) -> Read:
    """Keeps the last row group."""
    kept: dict[tuple[int, int], Any] = {}

    def row_group(file: int, group: int) -> Any:
        if (file, group) not in kept:
            kept.clear()
            with folder.at(files[file]).open() as raw, pq.ParquetFile(raw, pre_buffer=False) as parquet:
                table = parquet.read_row_group(group, columns=[data.image_column], use_threads=False)
                kept[file, group] = table.column(0)
        return kept[file, group]

    def read(row: dict[str, Any]) -> bytes:
        value = row_group(row["file"], row["group"])[row["offset"]].as_py()
        image, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if image is not None:
            return bytes(image)
        if not path:
            raise RowFault(Reason.MISSING, f"{row['seed_id']}: the row has neither image bytes nor a path")
        if re.match(r"[/\\~]|[A-Za-z]:|\w+://", path) or ".." in re.split(r"[/\\]", path) or "\0" in path:
            raise RowFault(Reason.UNSAFE_PATH, f"{row['seed_id']}: path '{path}' leaves the dataset folder; store "
                           "image bytes or paths below it")
        return read_below(folder, path, row["seed_id"])

    return read
