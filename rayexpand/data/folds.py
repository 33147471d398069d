"""Folds of a seed dataset: which seeds are held out together from the classifier that scores them.

    here      meaning
    unit      seeds that are held out together: those of one image, or of one group that the user names
    fold_N    number of the fold of each seed, NEVER where it is held out of none

The fold of a unit follows from its name, the names of the other units of its class, and the number of folds.
"""

from __future__ import annotations

import csv
import io

import numpy as np
import pyarrow as pa

from rayexpand.contract.errors import SeedDataError, UsageError, few
from rayexpand.contract.rng import PlanRng
from rayexpand.contract.schema import SeedIndex
from rayexpand.data import seeds
from rayexpand.data.seeds import DataConfig
from rayexpand.data.seeds.places import read_text
from rayexpand.data.subsets import image_names, sound_rows

NEVER = -1
ID_COLUMNS = ("seed_id", "path")  # what the column of the images may be called in a file of groups


def folds_of(index: SeedIndex, data: DataConfig, folds: int, seed: int, group: str | None = None) -> np.ndarray:
    """int64 (N,): the fold of each seed, stratified by class and of equal size but for one unit. NEVER: seeds with a
    fault, the only seed of its class, and all where `folds` is 1.

    `group`: see `units_of`. Raises UsageError where no seed can be held out, and for classes whose seeds are all in one
    fold, which would be scored by a classifier that has seen none of them; SeedDataError.
    """
    fold_N, sound = np.full(len(index), NEVER), sound_rows(index)
    n_K = np.bincount(index.labels[sound], minlength=len(index.classes))
    if folds == 1:
        return fold_N
    names, unit_n = _units(index, data, sound, group)
    labels, size_U = index.labels[sound], np.bincount(unit_n, minlength=len(names))
    _, first_U = np.unique(unit_n, return_index=True)
    label_U = labels[first_U]
    is_alone_U = (size_U == 1) & (n_K[label_U] == 1)
    order = np.lexsort((PlanRng(seed, "scores").per_seed("fold", names), label_U))
    order = order[~is_alone_U[order]]
    if not len(order):
        raise UsageError("scores: no class has two images that can be used, so none can be scored without itself; give "
                         "more images, or set folds: 1 for scores in sample")
    fold_U = np.full(len(names), NEVER)
    fold_U[order] = np.arange(len(order)) % folds
    fold_N[sound] = fold_U[unit_n]
    _refuse_lonely(index, fold_N, sound, n_K)
    return fold_N


def units_of(index: SeedIndex, data: DataConfig, group: str | None = None) -> list[str]:
    """The unit of each seed: its image, which another seed id may name too; with `group` the text in that column of
    the dataset, or in the column `group` of a .csv file with `seed_id` or `path`. Raises SeedDataError, UsageError for
    sound seeds without a group."""
    if group is None:
        return image_names(index, data)
    if group.endswith(".csv"):
        table = read_groups(group, "group")
        found = [table.get(one, "") for one in index.seed_ids]
    else:
        found = [text or "" for text in seeds.texts(data, index, group)]
    if without := [row for row in sound_rows(index).tolist() if not found[row]]:
        ids = index.table["seed_id"].take(without[:4]).to_pylist()
        raise UsageError(f"group: {len(without):,} of {len(index):,} seeds are in no group of '{group}' ({few(ids)}); "
                         "name one for every seed")
    return found


def read_groups(path: str, field: str = "groups") -> dict[str, str]:
    """Seed id -> group of a CSV file. Raises SeedDataError."""
    lines = csv.DictReader(io.StringIO(read_text(field, path)))
    names = lines.fieldnames or ()
    column = next((name for name in ID_COLUMNS if name in names), None)
    if column is None or "group" not in names:
        raise SeedDataError(f"{field}: '{path}' has the columns {few(list(names))}, and needs "
                            f"{' or '.join(ID_COLUMNS)}, and group; name them so in its first line")
    table: dict[str, str] = {}
    for line in lines:
        if table.setdefault(line[column], line["group"]) != line["group"]:
            raise SeedDataError(f"{field}: '{path}' puts '{line[column]}' in two groups; keep one of these lines")
    return table


def _units(index: SeedIndex, data: DataConfig, sound: np.ndarray, group: str | None) -> tuple[list[str], np.ndarray]:
    """Names of the units, and the unit of each sound seed, int64 (n,)."""
    coded = pa.array(units_of(index, data, group), pa.string()).take(pa.array(sound)).dictionary_encode()
    return coded.dictionary.to_pylist(), coded.indices.to_numpy().astype(np.int64)


def _refuse_lonely(index: SeedIndex, fold_N: np.ndarray, sound: np.ndarray, n_K: np.ndarray) -> None:
    """Raises UsageError for classes of several seeds that are in one fold, all of them."""
    least, most = np.full(len(n_K), np.iinfo(np.int64).max), np.full(len(n_K), np.iinfo(np.int64).min)
    np.minimum.at(least, index.labels[sound], fold_N[sound])
    np.maximum.at(most, index.labels[sound], fold_N[sound])
    if len(bad := np.flatnonzero((n_K > 1) & (least == most))):
        raise UsageError(f"scores: all seeds of {len(bad):,} classes fall into one fold "
                         f"({few([index.classes.key[c] for c in bad[:4]])}), so that a classifier that is trained "
                         "without them has seen none of the class: they are one image or one group, or share groups "
                         "with other classes. Give these classes more images or groups, take more folds, or leave them "
                         "out with data.ids")
