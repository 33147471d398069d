"""Labels as a dataset writes them -> class numbers and keys.

A label is a key: `01` and `1` are two classes, and integers need not be 0..K-1. Numbers sort as numbers, texts as text.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayexpand.contract.errors import SeedDataError, few
from rayexpand.data.seeds.source import DataConfig, class_mapping

_INTEGER = re.compile(r"-?[0-9]{1,18}")
_PLAIN = re.compile(r"0|-?[1-9][0-9]{0,17}")  # as Python writes it


@dataclass(frozen=True, slots=True)
class Labels:
    codes: np.ndarray  # int32, -1 where bad
    keys: list[str]  # of the classes, by code
    named: bool = False  # by a class table, which may name classes without an image


def is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def label_array(column: pa.ChunkedArray, text: bool) -> pa.Array:
    """A label column as string (`text`) or int64."""
    return column.cast(pa.string() if text else pa.int64(), safe=False).combine_chunks()


def parsed_labels(texts: Sequence[str | None], data: DataConfig) -> pa.ChunkedArray:
    """Labels written as text, of a file that knows no types: int64 where they are numbers, else string; null where one
    of them is not.

    The mapping data.classes decides which; without it, numbers are what at least half of the labels are, so one
    damaged label cannot turn numbers into names. Where one number has a leading zero, all are texts.
    """
    texts = [text.strip() or None if text else None for text in texts]
    mapping = class_mapping(data)
    known = {text for text in texts if text is not None}
    numbers = {text for text in known if _INTEGER.fullmatch(text)}
    if mapping is not None:
        numeric = all(map(_PLAIN.fullmatch, mapping)) and len({*map(int, numbers)}) == len(numbers)
        padded = False
    else:
        numeric = 2 * sum(text in numbers for text in texts) >= sum(text is not None for text in texts)
        padded = not all(map(_PLAIN.fullmatch, numbers))
    if numeric and not padded:
        values = [int(text) if text in numbers else None for text in texts]
        return pa.chunked_array([pa.array(values, pa.int64())])
    keys = {text for text in numbers if not text.startswith("-")} if numeric else known
    return pa.chunked_array([pa.array([text if text in keys else None for text in texts], pa.string())])


def encode_labels(labels: pa.ChunkedArray, data: DataConfig, schema: pa.Schema | None = None) -> Labels:
    """Of string or int64 labels. Empty and negative ones are bad, and those that a class table does not name."""
    if pa.types.is_string(labels.type):
        keys = sorted(key for key in pc.unique(labels).drop_null().to_pylist() if key.strip())
        codes = pc.index_in(labels, value_set=pa.array(keys, pa.string()))
        return Labels(pc.fill_null(codes, -1).to_numpy().astype(np.int32), keys)
    values = pc.fill_null(labels, -1).to_numpy()
    if schema is not None and (names := class_label_names(schema, data.label_column)) is not None:
        _refuse_names(data, names)
        return Labels(np.where((values >= 0) & (values < len(names)), values, -1).astype(np.int32), names, named=True)
    mapping = class_mapping(data)
    named = bool(mapping) and all(map(_PLAIN.fullmatch, mapping or ()))
    keys_N = np.array(sorted(map(int, mapping or ())), np.int64) if named else np.unique(values)
    keys_N = keys_N[keys_N >= 0]
    if not len(keys_N):
        return Labels(np.full(len(values), -1, np.int32), [], named)
    codes = np.minimum(np.searchsorted(keys_N, values), len(keys_N) - 1)
    return Labels(np.where(keys_N[codes] == values, codes, -1).astype(np.int32), list(map(str, keys_N.tolist())), named)


def _refuse_names(data: DataConfig, names: list[str]) -> None:
    """Raises SeedDataError for a class table that names a class twice, or not at all."""
    where = f"data.label_column: the class table of '{data.label_column}'"
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise SeedDataError(f"{where} names {few(twice)} more than once; write the files again with one name for each "
                            "class, or without the table (then numbers are the keys, and data.classes may name them)")
    if empty := sum(not name.strip() for name in names):
        raise SeedDataError(f"{where}: {empty} of {len(names)} classes have no name; write the files again with one")


def class_label_names(schema: pa.Schema, column: str) -> list[str] | None:
    """The names of a Hugging Face ClassLabel; None where the column is none."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return [str(name) for name in feature["names"]] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None


def with_class_names(schema: pa.Schema, column: str, names: Sequence[str]) -> pa.Schema:
    """`schema` with a Hugging Face ClassLabel for `column`, which `class_label_names` reads again."""
    features: dict[str, dict[str, object]] = {field.name: {"dtype": str(field.type), "_type": "Value"}
                                              for field in schema}
    features[column] = {"names": [*names], "_type": "ClassLabel"}
    return schema.with_metadata({**(schema.metadata or {}),
                                 b"huggingface": json.dumps({"info": {"features": features}}).encode()})
