"""Further test sets of a study: how a finished classifier does on images from elsewhere, and in which groups of them.

Classes are matched by their key, and a set may have only some of those that were trained. With `restrict` the
classifier chooses among these alone (ImageNet-R and ImageNet-A); without it, among all (Waterbird, 200 ways).

    group    a name for some of the images, such as "waterbird on land"; every image is in one
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from rayexpand.classifier.accuracy import Answers, answer, group_accuracy, restrict, scores_of, softmax
from rayexpand.contract.errors import SeedDataError, UsageError, few
from rayexpand.contract.schema import ClassTable, SeedIndex
from rayexpand.contract.settings import Section
from rayexpand.data import seeds
from rayexpand.data.seeds import DataConfig
from rayexpand.data.seeds.places import read_text
from rayexpand.data.subsets import sound_rows

ID_COLUMNS = ("seed_id", "path")  # what the column of the images may be called in a file of groups


class ExtraTest(Section):
    data: DataConfig = Field(description="the images; their classes are some or all of those trained on")
    restrict: bool = Field(False, description="choose among the classes that have images here, not among all")
    groups: str | None = Field(None, description="CSV file with the columns seed_id (or path) and group")
    group_of: str | None = Field(None, description="regular expression whose first bracket, in the seed id, is the "
                                 "group; instead of a file")


def problems(test: ExtraTest) -> list[str]:
    """What is wrong as far as can be known without listing images: `field: what, why, next step`."""
    found = list(seeds.check(test.data))
    if test.groups is not None and test.group_of is not None:
        found.append("groups: given twice, by a file and by group_of; take one out")
    try:
        if test.groups is not None:
            _read_groups(test.groups)
        if test.group_of is not None and not re.compile(test.group_of).groups:
            found.append(f"group_of: {test.group_of!r} has no bracket, so it names no group; put ( ) around it")
    except SeedDataError as error:
        found.append(str(error))
    except re.error as error:
        found.append(f"group_of: {test.group_of!r} is no regular expression ({error}); correct it")
    return found


def open_test(test: ExtraTest, classes: ClassTable) -> SeedIndex:
    """Its index with labels in the numbering of `classes`. Raises UsageError for a class that is not among them, or
    where no image can be used; SeedDataError."""
    index = seeds.build_index(test.data)
    number = {key: label for label, key in enumerate(classes.key)}
    if unknown := [key for key in index.classes.key if key not in number]:
        raise UsageError(f"its classes {few(unknown)} are none of those that are trained ({few(classes.key)}); give "
                         "folders or labels the keys of the training set, or map them with data.classes")
    if not len(sound_rows(index)):
        raise UsageError("has no image that can be used; correct data.split, data.ids or the files")
    labels = np.array([number[key] for key in index.classes.key], np.int32)[index.labels]
    column = index.table.schema.get_field_index("label")
    return SeedIndex(index.table.set_column(column, index.table.schema.field(column), pa.array(labels)), classes)


def groups_of(test: ExtraTest, index: SeedIndex) -> np.ndarray | None:
    """str (n,): the group of each image, "" where listing found a fault; None for a set without groups. Raises
    UsageError for images without a group."""
    if test.groups is None and test.group_of is None:
        return None
    ids = index.seed_ids
    if test.groups is not None:
        table = _read_groups(test.groups)
        found = [table.get(one, "") for one in ids]
    else:
        matches = [re.search(str(test.group_of), one) for one in ids]
        found = [match[1] or "" if match else "" for match in matches]
    if without := [ids[row] for row in sound_rows(index) if not found[row]]:
        raise UsageError(f"{len(without):,} of its {len(ids):,} images are in no group ({few(without)}); name every "
                         "image in groups, or correct group_of")
    return np.array(found, str)


def groups_sha256(groups: np.ndarray | None) -> str:
    return "" if groups is None else hashlib.sha256("\n".join(groups.tolist()).encode()).hexdigest()


def classes_among(test: ExtraTest, index: SeedIndex) -> np.ndarray | None:
    """int64, ascending: the classes the classifier may choose among; None: all."""
    return np.unique(index.labels[sound_rows(index)]).astype(np.int64) if test.restrict else None


def answer_among(items_N: np.ndarray, logits_NK: np.ndarray, labels_N: np.ndarray,
                 classes: np.ndarray | None = None) -> Answers:
    """Answers of logits, cut to `classes` where they are given. Labels and predictions keep the numbering of all."""
    if classes is None:
        return answer(items_N, softmax(logits_NK), labels_N)
    cut_NJ, positions_N = restrict(logits_NK, labels_N, classes.tolist())
    cut = answer(items_N, softmax(cut_NJ), positions_N)
    return Answers(cut.item, classes[cut.label], cut.rank, classes[cut.predicted], cut.confidence)


def scores(answers: Answers, test: ExtraTest, groups_n: np.ndarray | None, n_classes: int) -> dict[str, Any]:
    """`top1`, `top5`, `ece`, `per_class`, `images`, `classes`, `restricted`, and `by_group` (groups, counts, average by
    images, mean, worst), None without groups."""
    found = {**scores_of(answers, n_classes), "images": len(answers.item), "classes": len(np.unique(answers.label)),
             "restricted": test.restrict}
    return {**found, "by_group": None if groups_n is None else group_accuracy(answers.rank < 1, groups_n[answers.item])}


def _read_groups(path: str) -> dict[str, str]:
    """Seed id -> group. Raises SeedDataError."""
    lines = csv.DictReader(io.StringIO(read_text("groups", path)))
    names = lines.fieldnames or ()
    column = next((name for name in ID_COLUMNS if name in names), None)
    if column is None or "group" not in names:
        raise SeedDataError(f"groups: '{path}' has the columns {few(list(names))}, and needs "
                            f"{' or '.join(ID_COLUMNS)}, and group; name them so in its first line")
    table: dict[str, str] = {}
    for line in lines:
        if table.setdefault(line[column], line["group"]) != line["group"]:
            raise SeedDataError(f"groups: '{path}' puts '{line[column]}' in two groups; keep one of these lines")
    return table
