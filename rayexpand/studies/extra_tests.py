"""Further test sets of a study: how a finished classifier does on images from elsewhere, and in which groups of them.

Classes are matched by their key or by a class map (class_maps.py), and a set may have only some of those that were
trained. With `restrict` the classifier chooses among these alone (ImageNet-R and ImageNet-A); without it, among all
(Waterbird, 200 ways). Sets of corrupted images (`corrupt`, `layout`, source cifar_c) are shown to all finished
classifiers of a study at once: robustness.py.

    group    a name for some of the images, such as "waterbird on land"; every image is in one
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from rayexpand.classifier.accuracy import (
    Answers,
    answer,
    class_accuracies,
    group_accuracy,
    restrict,
    scores_of,
    softmax,
)
from rayexpand.contract.errors import SeedDataError, UsageError, few
from rayexpand.contract.schema import ClassTable, SeedIndex
from rayexpand.contract.settings import Later, Section
from rayexpand.data import seeds
from rayexpand.data.corruptions.config import Corrupt
from rayexpand.data.folds import read_groups
from rayexpand.data.seeds import DataConfig
from rayexpand.data.subsets import sound_rows
from rayexpand.studies.class_maps import OpenedTest, map_problems, matched


class ExtraTest(Section):
    data: DataConfig = Field(description="the images; their classes are some or all of those trained on")
    restrict: bool = Field(False, description="choose among the classes that have images here, not among all")
    groups: str | None = Field(None, description="CSV file with the columns seed_id (or path) and group")
    group_of: str | None = Field(None, description="regular expression whose first bracket, in the seed id, is the "
                                 "group; instead of a file")
    class_map: Annotated[str | None, Later(None)] = Field(
        None, description="CSV file with the columns key and train_key, several lines of a key allowed; or numbers: "
        "keys are the numbers of the trained classes. Images of other keys are left out. null: keys are those trained "
        "on")
    crop_border: Annotated[int, Later(0)] = Field(
        0, ge=0, description="pixels cut off at every edge of an image first (ObjectNet's red frame)")
    layout: Annotated[Literal["imagenet_c"] | None, Later(None)] = Field(
        None, description="imagenet_c: the published files of ImageNet-C in folders <corruption>/<severity>/<class>; "
        "`path` may then stand for `data`")
    corrupt: Annotated[Corrupt | None, Later(None)] = Field(
        None, description="corrupt the images in memory; null: not")

    @model_validator(mode="before")
    @classmethod
    def _path_of_layout(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or value.get("layout") is None or "path" not in value:
            return value
        if "data" in value:
            raise ValueError("path and data both say where the images are; give one of them")
        rest = {key: one for key, one in value.items() if key != "path"}
        return {**rest, "data": {"source": "imagefolder", "path": value["path"]}}

    @property
    def is_corrupted(self) -> bool:
        """Whether its images are corrupted, in memory or as published."""
        return self.corrupt is not None or self.layout is not None or self.data.source == "cifar_c"


def problems(test: ExtraTest) -> list[str]:
    """What is wrong as far as can be known without listing images: `field: what, why, next step`."""
    found = list(seeds.check(test.data))
    if test.groups is not None and test.group_of is not None:
        found.append("groups: given twice, by a file and by group_of; take one out")
    if test.class_map is not None:
        found += map_problems(test.class_map)
    if test.is_corrupted:
        found += _corrupted_problems(test)
    try:
        if test.groups is not None:
            read_groups(test.groups)
        if test.group_of is not None and not re.compile(test.group_of).groups:
            found.append(f"group_of: {test.group_of!r} has no bracket, so it names no group; put ( ) around it")
    except SeedDataError as error:
        found.append(str(error))
    except re.error as error:
        found.append(f"group_of: {test.group_of!r} is no regular expression ({error}); correct it")
    return found


def _corrupted_problems(test: ExtraTest) -> list[str]:
    found = [] if test.corrupt is None else [f"corrupt.{line}" for line in test.corrupt.problems()]
    published = "layout: imagenet_c" if test.layout is not None else "source cifar_c"
    if test.corrupt is not None and (test.layout is not None or test.data.source == "cifar_c"):
        found.append(f"corrupt: these images are corrupted already ({published}); take one of the two out")
    if test.layout is not None and test.data.source != "imagefolder":
        found.append(f"layout: imagenet_c is read as folders, not as source {test.data.source}; set data.source: "
                     "imagefolder")
    if test.layout is not None and test.data.split is not None:
        found.append("data.split: has no effect on layout imagenet_c, which has all types and severities; take it out")
    return found + [f"{name}: corrupted images are counted by type and severity, not by group; take it out"
                    for name in ("groups", "group_of") if getattr(test, name) is not None]


def open_test(test: ExtraTest, classes: ClassTable) -> OpenedTest:
    """Its index with labels in the numbering of `classes`. Raises UsageError for a class that is not among them, or
    where no image can be used; SeedDataError."""
    found = matched(seeds.build_index(test.data), classes, test.class_map)
    if not len(sound_rows(found.index)):
        raise UsageError("has no image that can be used; correct data.split, data.ids or the files")
    return found


def groups_of(test: ExtraTest, index: SeedIndex) -> np.ndarray | None:
    """str (n,): the group of each image, "" where listing found a fault; None for a set without groups. Raises
    UsageError for images without a group."""
    if test.groups is None and test.group_of is None:
        return None
    ids = index.seed_ids
    if test.groups is not None:
        table = read_groups(test.groups)
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


def classes_among(test: ExtraTest, opened: OpenedTest) -> np.ndarray | None:
    """int64, ascending: the classes the classifier may choose among; None: all."""
    return opened.among() if test.restrict else None


def answer_among(items_N: np.ndarray, logits_NK: np.ndarray, labels_N: np.ndarray, classes: np.ndarray | None = None,
                 accepted_NK: np.ndarray | None = None) -> Answers:
    """Answers of logits, cut to `classes` where they are given. Labels and predictions keep the numbering of all. Where
    several classes are right, the label of an image is the one of them that the classifier likes most."""
    if accepted_NK is not None:
        labels_N = np.where(accepted_NK, logits_NK, -np.inf).argmax(axis=1)
    if classes is None:
        return answer(items_N, softmax(logits_NK), labels_N)
    cut_NJ, positions_N = restrict(logits_NK, labels_N, classes.tolist())
    cut = answer(items_N, softmax(cut_NJ), positions_N)
    return replace(cut, label=classes[cut.label], predicted=classes[cut.predicted])


def scores(answers: Answers, test: ExtraTest, groups_n: np.ndarray | None, n_classes: int,
           opened: OpenedTest | None = None) -> dict[str, Any]:
    """`top1`, `top5`, `ece`, `per_class`, `images`, `classes`, `restricted`, and `by_group` (groups, counts, average by
    images, mean, worst), None without groups; with a class map also `left_out`, and classes are those of the set."""
    found = {**scores_of(answers, n_classes), "images": len(answers.item), "classes": len(np.unique(answers.label)),
             "restricted": test.restrict}
    if opened is not None and opened.accepted_JK is not None:
        own_N = opened.own_N[answers.item]
        shares_J = class_accuracies(answers.rank < 1, own_N, len(opened.accepted_JK))
        found |= {"per_class": float(np.nanmean(shares_J)), "classes": len(np.unique(own_N)),
                  "left_out": opened.left_out}
    return {**found, "by_group": None if groups_n is None else group_accuracy(answers.rank < 1, groups_n[answers.item])}
