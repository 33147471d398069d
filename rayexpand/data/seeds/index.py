"""The seed index: every mistake at once, then all seeds in a fixed order, with their classes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayexpand.contract.errors import SeedDataError, few
from rayexpand.contract.rng import PlanRng
from rayexpand.contract.schema import SEED_INDEX, ClassTable, SeedIndex
from rayexpand.data.seeds.layouts import LAYOUTS
from rayexpand.data.seeds.listing import INDEX_FAULTS, Listing
from rayexpand.data.seeds.source import REPEAT, DataConfig, class_mapping, wanted_ids

SHOWN = 10  # classes of each end in a survey


def check(data: DataConfig) -> list[str]:
    """What is wrong with `data` as far as can be known without listing everything: `field: what, why, next step`.

    Raises EnvironmentFault when the storage does not answer.
    """
    problems = []
    if data.source == "digits" and data.path is not None:
        problems.append(f"data.path: '{data.path}' has no effect, the digits are built in; remove it or name a source")
    if data.source != "digits" and data.path is None:
        problems.append(f"data.path: missing, source '{data.source}' needs a folder or URL; set data.path")
    if data.source not in ("parquet", "manifest") and data.id_column is not None:
        problems.append(f"data.id_column: has no effect on source '{data.source}'; remove it")
    problems += [f"data.{name}: has no effect on source '{data.source}', only the digits have it; remove it"
                 for name in ("digits_split", "digits_background")
                 if data.source != "digits" and getattr(data, name) != DataConfig.model_fields[name].default]
    layout = LAYOUTS[data.source].check if data.path is not None or data.source == "digits" else None
    tests: tuple[Callable[[DataConfig], Any] | None, ...] = (class_mapping, wanted_ids, layout)
    for test in tests:
        try:
            if test is not None:
                test(data)
        except SeedDataError as problem:
            problems.append(str(problem))
    return problems


def renamed(problems: Sequence[str], section: str) -> list[str]:
    """Lines of `check` about a section that has another name than `data`."""
    return [f"{section}.{line.removeprefix('data.')}" if line.startswith("data.") else f"{section}: {line}"
            for line in problems]


def build_index(data: DataConfig) -> SeedIndex:
    """Lists the dataset once: seeds in a fixed order (class, then path; or file, then row) with stable, unique ids.

    No image is opened. An image with a known fault keeps its row; a row with a bad label has label 0, so that labels
    can be counted, and is not in ClassTable.count. Schema metadata: b"files" (JSON, relative to the layout's root) and
    b"layout" (the source). Paths are kept as they are, without Unicode normalisation.
    Raises SeedDataError (all problems of `check`, empty classes, unknown ids), EnvironmentFault.
    """
    return _indexed(data)[0]


def survey(data: DataConfig) -> dict[str, Any]:
    """The second of `surveyed`."""
    return surveyed(data)[1]


def surveyed(data: DataConfig) -> tuple[SeedIndex, dict[str, Any]]:
    """`build_index`, and what the dataset holds, for people: seeds, classes with the most and the fewest seeds, splits,
    skipped files by suffix, faults known from listing."""
    index, listing = _indexed(data)
    listing.skipped.add(listing.left_out())
    sizes = sorted(zip(index.classes.key, index.classes.count, strict=True), key=lambda one: -one[1])
    faults = Counter(fault for fault in index.table["fault"].to_pylist() if fault)
    split = LAYOUTS[data.source].splits(data)
    found: dict[str, Any] = {
        "seeds": len(index), "classes": len(index.classes), "largest_classes": dict(sizes[:SHOWN]),
        "smallest_classes": dict(sizes[max(SHOWN, len(sizes) - SHOWN):]), "splits": split,
        "skipped": {suffix: {"files": count, "examples": listing.skipped.examples[suffix]}
                    for suffix, count in listing.skipped.most_common()},
        "same_names": index.classes.same_names(), "faults": dict(sorted(faults.items()))}
    return index, {name: value for name, value in found.items() if value not in ({}, [])}


def survey_lines(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A survey in words, one (what, text) for each of its parts."""
    return [(name.replace("_", " "), ", ".join(f"{key} ({count:,})" for key, count in value.items())
             if name == "largest_classes" else _said(value)) for name, value in found.items()]


def _said(value: Any) -> str:
    """Numbers by name, names in a row."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_said(one)}" for name, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else f"{value:,}" if isinstance(value, int) else value


def _indexed(data: DataConfig) -> tuple[SeedIndex, Listing]:
    if problems := check(data):
        raise SeedDataError("\n  ".join([f"seeds ({data.source}): {len(problems)} problem(s)", *problems]))
    listing = LAYOUTS[data.source].list_seeds(data)
    if data.ids is None or data.source == "imagefolder":
        _refuse_empty_classes(listing, named=listing.named or data.classes is not None)
    rows = _selected(listing, data)
    if data.repeats:
        rows, ids = _repeated(listing, rows, data)
    labels = listing.labels[rows]
    counts = np.bincount(labels[labels >= 0], minlength=len(listing.keys))
    faults = pa.DictionaryArray.from_arrays(listing.faults, list(map(str, INDEX_FAULTS))).cast(pa.string())
    table = pa.table({"seed_id": listing.ids, "label": np.maximum(listing.labels, 0), "file": listing.file,
                      "member": listing.member, "group": listing.group, "offset": listing.offset, "fault": faults}
                     ).cast(SEED_INDEX)
    if data.repeats:
        table = table.take(pa.array(rows)).set_column(0, SEED_INDEX.field("seed_id"), ids)
    elif len(rows) < len(table):
        table = table.take(pa.array(rows))
    metadata = {b"files": json.dumps(listing.files).encode(), b"layout": data.source.encode()}
    classes = _class_table(listing, class_mapping(data), counts)
    return SeedIndex(table.replace_schema_metadata(metadata), classes), listing


def _refuse_empty_classes(listing: Listing, named: bool) -> None:
    """Classes that a table names may lie in another part of the dataset; a class folder without an image is a fault."""
    counts = np.bincount(listing.labels[listing.labels >= 0], minlength=len(listing.keys))
    bad = int((listing.labels < 0).sum())
    also = f"; {bad} rows have a null or out-of-range label" if bad else ""
    if named and len(listing.keys) and not counts.any():
        raise SeedDataError(f"data.path: no image has a label of the {len(listing.keys)} classes{also}; correct "
                            "data.path, data.classes or the labels")
    if not named and (empty := [listing.keys[c] for c in np.flatnonzero(counts == 0)]):
        raise SeedDataError(f"data.path: {len(empty)} of {len(listing.keys)} classes have no image ({few(empty)})"
                            f"{also}; remove these classes, or add images to them" + (
                                f". Files of other kinds were skipped: {listing.skipped}" if listing.skipped.count
                                else ""))
    if not listing.keys:
        raise SeedDataError(f"data.path: the dataset has no class{also}; correct data.path or the labels")


def _selected(listing: Listing, data: DataConfig) -> np.ndarray:
    """int64 rows that data.ids and data.per_class leave, ascending."""
    rows = np.arange(len(listing.ids))
    if (wanted := wanted_ids(data)) is not None:
        where = pc.index_in(pa.array(wanted, pa.string()), value_set=listing.ids)
        if where.null_count:
            unknown = [wanted[i] for i in np.flatnonzero(where.is_null().to_numpy(zero_copy_only=False))]
            raise SeedDataError(f"data.ids: {len(unknown)} of {len(wanted)} ids of '{data.ids}' are not in the dataset "
                                f"({few(unknown)}); ids look like '{listing.ids[0]}'")
        rows = np.sort(where.to_numpy())
    if data.per_class is None:
        return rows
    present = np.unique(listing.labels[rows][listing.labels[rows] >= 0])
    rows = rows[listing.faults[rows] == 0]
    counts = np.bincount(listing.labels[rows], minlength=len(listing.keys))
    if short := [f"{listing.keys[c]} ({counts[c]})" for c in present if counts[c] < data.per_class]:
        raise SeedDataError(f"data.per_class: {data.per_class} seeds asked of each class, but {len(short)} classes "
                            f"have fewer sound ones ({few(short)}); lower data.per_class or list seeds in data.ids")
    rank = subset_rank(listing.ids.take(pa.array(rows)).to_pylist(), listing.labels[rows], data.subset_seed)
    return rows[rank < data.per_class]


def _repeated(listing: Listing, rows: np.ndarray, data: DataConfig) -> tuple[np.ndarray, pa.Array]:
    """Rows with those of data.repeats as often as it says, one after the other, and their ids. Raises SeedDataError."""
    names = listing.ids.take(pa.array(rows)).to_pylist()
    if unknown := sorted(set(data.repeats) - set(names)):
        raise SeedDataError(f"data.repeats: {few(unknown)} are no ids of these seeds; ids look like '{names[0]}'")
    if wrong := sorted(name for name, times in data.repeats.items() if times < 1):
        raise SeedDataError(f"data.repeats: {few(wrong)} would be listed less than once; give 1 or more, or leave "
                            "images out with data.ids")
    times = [data.repeats.get(name, 1) for name in names]
    found = [name if n == 1 else f"{name}{REPEAT}{n}" for name, last in zip(names, times, strict=True)
             for n in range(1, last + 1)]
    if len(set(found)) < len(found):
        raise SeedDataError(f"data.repeats: an id of the dataset ends in {REPEAT} and a number like that of an image "
                            "listed again; rename it")
    return np.repeat(rows, times), pa.array(found, pa.string())


def subset_rank(ids: Sequence[str], labels: np.ndarray, seed: int) -> np.ndarray:
    """int64[n]: place of each seed in the one random order of its class that all subsets are taken from, so that a
    smaller subset lies inside a larger one."""
    order = np.lexsort((PlanRng(seed, "subset").per_seed("subset", ids), labels))
    sorted_labels = labels[order]
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.searchsorted(sorted_labels, sorted_labels, side="left")
    return rank


def _class_table(listing: Listing, mapping: Mapping[str, Mapping[str, str]] | None, counts: np.ndarray) -> ClassTable:
    if mapping is None:
        return ClassTable.of(listing.keys, listing.names, counts.tolist())
    if absent := [key for key in listing.keys if key not in mapping]:
        raise SeedDataError(f"data.classes: {len(absent)} of {len(listing.keys)} classes have no entry ({few(absent)})"
                            "; add them to the mapping")
    name, metaclass, noun = ([mapping[key][part] for key in listing.keys] for part in ("name", "metaclass", "noun"))
    return ClassTable.of(listing.keys, name, counts.tolist(), metaclass, noun)
