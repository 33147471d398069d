"""Which trained classes are right for the images of a further test set: by their own key, or by a class map.

A class map is a CSV with the columns key and train_key, or the word `numbers`, where the key k stands for the k-th
trained class, from 0 (ImageNet-V2, whose folders are numbers). A key may have several lines: then every one of its
classes is right (ObjectNet). Images whose key has no line are left out and counted.

    J    classes of the test set that are used, by their own keys
    K    trained classes
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rayexpand.contract.errors import SeedDataError, UsageError, few
from rayexpand.contract.schema import ClassTable, SeedIndex
from rayexpand.data.seeds.places import read_text
from rayexpand.data.subsets import sound_rows

NUMBERS = "numbers"


@dataclass(frozen=True)
class OpenedTest:
    """A further test set. Labels of `index` are in the numbering of the trained classes; of a mapped class, its first.
    `own_N` is the number of the class of each image in the set itself, and `accepted_JK` says which trained classes are
    right for it; None where that is the label alone."""

    index: SeedIndex
    own_N: np.ndarray
    accepted_JK: np.ndarray | None = None
    left_out: int = 0  # images whose class is not mapped

    def among(self) -> np.ndarray:
        """int64, ascending: the trained classes that are right for some image."""
        rows = sound_rows(self.index)
        if self.accepted_JK is None:
            return np.unique(self.index.labels[rows]).astype(np.int64)
        return np.flatnonzero(self.accepted_JK[np.unique(self.own_N[rows])].any(axis=0)).astype(np.int64)

    def accepted(self, items_B: np.ndarray) -> np.ndarray | None:
        """bool (B, K) of rows of the index."""
        return None if self.accepted_JK is None else self.accepted_JK[self.own_N[items_B]]


def map_problems(path: str) -> list[str]:
    """What is wrong with the file alone."""
    try:
        if path != NUMBERS:
            _read(path)
    except SeedDataError as error:
        return [str(error)]
    return []


def map_sha256(path: str | None) -> str:
    """Of the lines of a class map; "" for none."""
    if path is None:
        return ""
    lines = NUMBERS if path == NUMBERS else json.dumps(sorted(_read(path)))
    return hashlib.sha256(lines.encode()).hexdigest()


def matched(index: SeedIndex, classes: ClassTable, class_map: str | None) -> OpenedTest:
    """A listed test set with its classes matched. Raises UsageError where one is not, SeedDataError."""
    number = {key: label for label, key in enumerate(classes.key)}
    if class_map is None:
        if unknown := [key for key in index.classes.key if key not in number]:
            raise UsageError(
                f"its classes {few(unknown)} are none of those that are trained ({few(classes.key)}); give folders or "
                "labels the keys of the training set, or map them with class_map: a CSV with the columns key and "
                f"train_key, or {NUMBERS} where they are the numbers of the trained classes")
        labels = np.array([number[key] for key in index.classes.key], np.int32)[index.labels]
        return OpenedTest(_relabelled(index, labels, classes), labels)
    accepted_JK = _accepted(index.classes, classes, class_map, number)
    is_mapped = accepted_JK[index.labels].any(axis=1)
    rows = np.flatnonzero(is_mapped)
    kept = SeedIndex(index.table.take(pa.array(rows)), index.classes) if len(rows) < len(index) else index
    own = kept.labels
    labels = accepted_JK.argmax(axis=1).astype(np.int32)[own]
    return OpenedTest(_relabelled(kept, labels, classes), own, accepted_JK, int((~is_mapped).sum()))


def _relabelled(index: SeedIndex, labels: np.ndarray, classes: ClassTable) -> SeedIndex:
    column = index.table.schema.get_field_index("label")
    return SeedIndex(index.table.set_column(column, index.table.schema.field(column), pa.array(labels)), classes)


def _accepted(own: ClassTable, classes: ClassTable, class_map: str, number: dict[str, int]) -> np.ndarray:
    """bool (J, K) of the lines of a class map."""
    if class_map == NUMBERS:
        wrong = [key for key in own.key if not (key.isdecimal() and int(key) < len(classes))]
        if wrong:
            raise UsageError(f"class_map: {NUMBERS}: its classes {few(wrong)} are no numbers from 0 to "
                             f"{len(classes) - 1}; give a CSV with the columns key and train_key")
        pairs = [(key, int(key)) for key in own.key]
    else:
        lines = _read(class_map)
        if unknown := [train for _, train in lines if train not in number]:
            raise UsageError(f"class_map: '{class_map}' has the train_key {few(unknown)}, none of those that are "
                             f"trained ({few(classes.key)}); correct or take out these lines")
        pairs = [(key, number[train]) for key, train in lines]
    accepted_JK, position = np.zeros((len(own), len(classes)), bool), {key: j for j, key in enumerate(own.key)}
    for key, label in pairs:
        if key in position:
            accepted_JK[position[key], label] = True
    if not accepted_JK.any():
        raise UsageError(f"class_map: '{class_map}' has no line for any of its classes ({few(own.key)}); keys are the "
                         "names of folders or labels of the test set")
    return accepted_JK


def _read(path: str) -> list[tuple[str, str]]:
    """(key, train_key) of every line. Raises SeedDataError."""
    lines = csv.DictReader(io.StringIO(read_text("class_map", path)))
    if missing := [name for name in ("key", "train_key") if name not in (lines.fieldnames or ())]:
        raise SeedDataError(f"class_map: '{path}' has the columns {few(list(lines.fieldnames or ()))}, and needs "
                            f"{' and '.join(missing)}; name them so in its first line")
    found = [(line["key"] or "", line["train_key"] or "") for line in lines]
    if not found or not all(key and train for key, train in found):
        raise SeedDataError(f"class_map: '{path}' has {'an empty cell' if found else 'no line'}; give a key and a "
                            "train_key in every line")
    return found
