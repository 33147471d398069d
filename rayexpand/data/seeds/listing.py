"""What every layout's listing looks like, and what layouts share: unique ids, words of splits, hidden names."""

from __future__ import annotations

import io
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, features

from rayexpand.contract.schema import Reason

COMMON = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
EXTENSIONS = (*COMMON, ".ppm", ".pgm", ".pbm", ".pnm", ".jfif", ".jpe", ".tga",
              *([".jp2"] if features.check("jpg_2000") else []), *([".avif"] if features.check("avif") else []))
SPLIT_NAMES = frozenset({"train", "training", "trainval", "val", "valid", "validation", "dev", "test", "testing",
                         "eval", "evaluation"})
INDEX_FAULTS = ("", Reason.BAD_LABEL, Reason.DUPLICATE_ID, Reason.MISSING, Reason.UNSAFE_PATH, Reason.UNREADABLE,
                Reason.TOO_LARGE)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")

Read = Callable[[dict[str, Any]], bytes]  # a row of the index -> its encoded image; raises RowFault or an OSError


@dataclass(slots=True)
class Skipped:
    """Files that lie among the images and are not used, by suffix."""

    count: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, paths: Iterable[str]) -> None:
        for path in paths:
            suffix = ("hidden " if is_hidden(path) else "") + (posixpath.splitext(path)[1].lower() or "no suffix")
            self.count[suffix] += 1
            shown = self.examples.setdefault(suffix, [])
            self.examples[suffix] = sorted([*shown, path])[:3]  # whatever the order of the listing

    def __str__(self) -> str:
        """Such as `40 .heic ('a/0.heic', 'a/1.heic', ...), 1 no suffix ('LICENSE')`; "" for none."""
        return ", ".join(
            f"{count} {suffix} ({', '.join(map(repr, self.examples[suffix]))}{', ...' if count > 3 else ''})"
            for suffix, count in self.most_common())

    def most_common(self) -> list[tuple[str, int]]:
        return sorted(self.count.items(), key=lambda one: (-one[1], one[0]))


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
    named: bool = False  # a class table of the dataset names the classes, also those without an image
    skipped: Skipped = field(default_factory=Skipped)
    left_out: Callable[[], list[str]] = list  # files at any depth that are not of the dataset; lists all there is


def is_hidden(path: str) -> bool:
    """Whether a part of a path begins with a dot; `./` and `../` are no names."""
    return any(part.startswith(".") and part.strip(".") for part in path.split("/"))


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
