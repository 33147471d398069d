"""What every layout's listing looks like, and what layouts share: labels, unique ids, paths by convention."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from rayexpand.contract.errors import SeedDataError
from rayexpand.contract.schema import Reason
from rayexpand.data.seeds.source import DataConfig, class_mapping

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SPLIT_NAMES = frozenset({"train", "training", "trainval", "val", "valid", "validation", "dev", "test", "testing",
                         "eval", "evaluation"})
INDEX_FAULTS = ("", Reason.BAD_LABEL, Reason.DUPLICATE_ID, Reason.MISSING, Reason.UNSAFE_PATH, Reason.UNREADABLE,
                Reason.TOO_LARGE)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_INTEGER = re.compile(r"-?[0-9]{1,18}")

Read = Callable[[dict[str, Any]], bytes]  # a row of the index -> its encoded image; raises RowFault or an OSError


@dataclass(slots=True)
class Listing:
    """All seeds of a dataset before selection; arrays have one entry per seed."""

    ids: pa.Array
    labels: np.ndarray  # int32, -1 where bad
    faults: np.ndarray  # int8, number in INDEX_FAULTS
    keys: list[str]  # of the classes, by label
    names: Sequence[str]
    files: list[str]  # relative to the layout's root
    file: np.ndarray  # int32, number in `files`
    member: pa.Array  # string, "" where the layout needs none
    group: np.ndarray  # int32; group and offset find the row inside its file, each layout in its way
    offset: np.ndarray  # int32


def split_words(name: str) -> frozenset[str]:
    """The words in the name of a file or folder that say which split it is: {"train"} of imagenet1k-Train-0000."""
    return frozenset(word.lower() for word in _WORD.findall(name)) & SPLIT_NAMES


def fault_code(fault: str) -> int:
    return INDEX_FAULTS.index(fault)


def unique_ids(ids: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Ids made unique with suffixes #2, #3, ..., and a mask of the rows that needed one. The first row keeps its id."""
    codes = ids.dictionary_encode().indices.to_numpy()
    repeat = np.ones(len(ids), bool)
    repeat[np.unique(codes, return_index=True)[1]] = False
    if not repeat.any():
        return ids, repeat
    names = ids.to_pylist()
    taken, last = set(names), dict.fromkeys(names, 1)
    for row in np.flatnonzero(repeat):
        name = names[row]
        while (fresh := f"{name}#{last[name] + 1}") in taken:
            last[name] += 1
        last[name] += 1
        taken.add(fresh)
        names[row] = fresh
    return pa.array(names, pa.string()), repeat


def blanks(count: int) -> pa.Array:
    """`count` empty strings."""
    return pa.array([""]).take(pa.array(np.zeros(count, np.int8)))


def encode_png(pixels: np.ndarray) -> bytes:
    """Lossless image of uint8 (H, W) or (H, W, 3) pixels."""
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


# --- labels


def is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def label_array(column: pa.ChunkedArray, text: bool) -> pa.Array:
    """A label column as string (`text`) or int64."""
    return column.cast(pa.string() if text else pa.int64(), safe=False).combine_chunks()


def parsed_labels(texts: Sequence[str | None], data: DataConfig) -> pa.ChunkedArray:
    """Labels written as text: int64 where they are numbers, else string; null where one of them is not.

    The mapping data.classes decides which; without it, numbers are what at least half of the labels are, so one
    damaged label cannot turn numbers into names.
    """
    texts = [text.strip() or None if text else None for text in texts]
    mapping = class_mapping(data)
    numbers = [text is not None and _INTEGER.fullmatch(text) is not None for text in texts]
    known = sum(text is not None for text in texts)
    if all(map(str.isdecimal, mapping)) if mapping is not None else 2 * sum(numbers) >= known:
        return pa.chunked_array([pa.array([int(text or 0) if ok else None
                                           for text, ok in zip(texts, numbers, strict=True)], pa.int64())])
    return pa.chunked_array([pa.array(texts, pa.string())])


def encode_labels(labels: pa.ChunkedArray, data: DataConfig, schema: pa.Schema | None = None
                  ) -> tuple[np.ndarray, list[str]]:
    """int32 labels (-1 where bad) and class keys of string or int64 labels."""
    if pa.types.is_string(labels.type):
        keys = sorted(pc.unique(labels).drop_null().to_pylist())
        codes = pc.index_in(labels, value_set=pa.array(keys, pa.string()))
        return pc.fill_null(codes, -1).to_numpy().astype(np.int32), keys
    values = pc.fill_null(labels, -1).to_numpy()
    names = None if schema is None else _class_label_names(schema, data.label_column)
    if names is None:
        mapping = class_mapping(data)
        count = len(mapping) if mapping and all(map(str.isdecimal, mapping)) else int(values.max(initial=-1)) + 1
        if count > max(len(values), len(mapping or ())):
            raise SeedDataError(f"data.label_column: labels reach {count - 1} in {len(values)} rows, so they are not "
                                "0..K-1; give data.classes, or store them as strings")
        names = [str(label) for label in range(count)]
    return np.where((values >= 0) & (values < len(names)), values, -1).astype(np.int32), names


def _class_label_names(schema: pa.Schema, column: str) -> list[str] | None:
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return [str(name) for name in feature["names"]] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None
