"""Subsets of a seed dataset by explicit id lists, and the counts and weights of long-tail protocols.

A subset is drawn once and written as a list of seed ids; fit, expand and train read that list (`data.ids`), and
`ids_hash` proves that they saw the same images. All kinds share the random order of each class that `data.per_class`
uses, so a smaller subset lies inside a larger one. Symbols: n_c images of class c, K classes, D images in all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from rayexpand.contract.errors import EnvironmentFault, RowFault, SeedDataError, UsageError
from rayexpand.contract.rng import PlanRng
from rayexpand.contract.schema import SeedIndex
from rayexpand.contract.settings import Section
from rayexpand.data.seeds import DataConfig, SeedReader
from rayexpand.data.seeds.digits import digit_of
from rayexpand.data.seeds.index import subset_rank
from rayexpand.data.seeds.source import image_id

_READ = 1024  # images read at once
_COMPARED = 20_000  # images that are read to compare two datasets
SAMPLED = 16  # images of a fingerprint


class SubsetConfig(Section):
    """Which of the seeds a study trains on."""

    kind: Literal["full", "per_class", "few_shot", "long_tail", "counts"] = Field(
        "full", description="per_class: exactly n images of each class; few_shot: n, or all of a smaller class; "
        "long_tail: class sizes that fall exponentially; counts: the sizes that are given")
    n: int | None = Field(None, ge=1, description="images of each class, of per_class and few_shot")
    imbalance_factor: float | None = Field(None, gt=1, description="nominal size of the largest over the smallest "
                                           "class, of long_tail")
    counts: tuple[int, ...] | None = Field(None, description="images of each class in the order of the classes, of "
                                           "counts")
    seed: int | None = Field(None, ge=0, description="which random subset; null: another one for each study seed")

    @model_validator(mode="after")
    def _agree(self) -> SubsetConfig:
        problems = []
        for name, kinds in (("n", ("per_class", "few_shot")), ("imbalance_factor", ("long_tail",)),
                            ("counts", ("counts",))):
            given = getattr(self, name) is not None
            if given != (self.kind in kinds):
                problems.append(f"{name} has no effect on kind {self.kind}" if given else
                                f"kind {self.kind} needs {name}")
        if self.counts is not None and min(self.counts, default=0) < 1:
            problems.append(f"counts {list(self.counts)} must be 1 or more for each class")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def choose(index: SeedIndex, config: SubsetConfig, seed: int = 0) -> np.ndarray:
    """int64 rows of `index`, ascending. `seed` counts where the configuration has none. Raises UsageError."""
    seed = seed if config.seed is None else config.seed
    if config.kind == "long_tail":
        return long_tail(index, config.imbalance_factor or 0.0, seed)
    if config.kind == "full":
        return sound_rows(index)
    if config.kind == "counts":
        return of_counts(index, config.counts or (), seed)
    return (few_shot if config.kind == "few_shot" else per_class)(index, config.n or 0, seed)


def sound_rows(index: SeedIndex) -> np.ndarray:
    """int64 rows that listing found no fault with."""
    faults = index.table["fault"].combine_chunks().dictionary_encode()
    good = np.array([fault == "" for fault in faults.dictionary.to_pylist()], bool)
    return np.flatnonzero(good[faults.indices.to_numpy()])


def few_shot(index: SeedIndex, shots: int, seed: int) -> np.ndarray:
    """`shots` rows of each class without repetition, all of a class that has no more."""
    return _first_of_each(index, np.full(len(index.classes), shots), seed)


def per_class(index: SeedIndex, n: int, seed: int) -> np.ndarray:
    """Exactly `n` rows of each class. Raises UsageError where a class has fewer."""
    return _first_of_each(index, _enough(index, np.full(len(index.classes), n), f"{n} images of each class"), seed)


def of_counts(index: SeedIndex, counts: Sequence[int], seed: int) -> np.ndarray:
    """Exactly `counts[c]` rows of class c. Raises UsageError where a class has fewer, or there are other classes."""
    if len(counts) != len(index.classes):
        raise UsageError(f"subset.counts: {len(counts)} sizes for {len(index.classes)} classes; give one for each")
    return _first_of_each(index, _enough(index, np.array(counts, np.int64), "the given class sizes"), seed)


def long_tail(index: SeedIndex, imbalance: float, seed: int) -> np.ndarray:
    """Rows whose class sizes follow `long_tail_counts`, the largest class first (the lower label first among equals).
    Raises UsageError where a class has fewer."""
    have = real_counts(index)
    order = np.argsort(-have, kind="stable")
    wanted = np.empty_like(have)
    wanted[order] = long_tail_counts(int(have.sum()), len(have), imbalance)
    return _first_of_each(index, _enough(index, wanted, f"a long tail of factor {imbalance:g}"), seed)


def long_tail_counts(images: int, n_classes: int, imbalance: float) -> np.ndarray:
    """int64[K], falling: max(floor(D / K * imbalance ** (-k / (K - 2))), 1) of Diff-Mix's long-tail sets.

    The base is the mean class size and the divisor K - 2, unlike the usual n_max and K - 1, so the realised factor is
    smaller than the nominal one. Raises UsageError for fewer than 3 classes.
    """
    if n_classes < 3:
        raise UsageError(f"a long tail needs 3 classes or more, this dataset has {n_classes}; choose another subset")
    sizes = images / n_classes * float(imbalance) ** (-np.arange(n_classes) / (n_classes - 2))
    return np.maximum(np.floor(sizes + 1e-9), 1).astype(np.int64)


def fill_counts(counts: np.ndarray) -> np.ndarray:
    """int64[K]: samples that bring every class to the size of the largest one (SYNAuG)."""
    return np.max(counts) - np.asarray(counts)


def inverse_frequency(counts: np.ndarray) -> np.ndarray:
    """float64[K]: probabilities proportional to 1 / (n_c + 1), by which Diff-Mix draws classes on long tails."""
    weights = 1 / (np.asarray(counts) + 1)
    return weights / weights.sum()


def ids_hash(ids: Iterable[str]) -> str:
    """sha256 of a set of seed ids, whatever their order."""
    return hashlib.sha256(json.dumps(sorted(set(ids))).encode()).hexdigest()


def fingerprint(index: SeedIndex, data: DataConfig) -> str:
    """sha256 of all ids and labels and of the bytes of SAMPLED images spread over the index: what tells a dataset from
    another one whose images have the same ids. A change of single images is not noticed."""
    hasher = hashlib.sha256(ids_hash(index.seed_ids).encode() + index.labels.astype("<i4").tobytes())
    rows = np.unique(np.linspace(0, len(index) - 1, min(SAMPLED, len(index))).astype(int))
    for found in SeedReader(index, data).read(rows.tolist()):
        hasher.update(found.reason.encode() if isinstance(found, RowFault) else hashlib.sha256(found.image).digest())
    return hasher.hexdigest()


def differing(one: tuple[SeedIndex, DataConfig], other: tuple[SeedIndex, DataConfig]) -> list[str]:
    """Ids behind which two datasets of the same ids in the same order have other images, among SAMPLED of them. What
    cannot be read any more differs from nothing."""
    if _part(one[1]) == _part(other[1]):
        return []
    rows = np.unique(np.linspace(0, len(one[0]) - 1, min(SAMPLED, len(one[0]))).astype(int)).tolist()
    try:
        found = [list(SeedReader(index, data).read(rows)) for index, data in (one, other)]
    except (SeedDataError, EnvironmentFault):
        return []
    return [a.seed_id for a, b in zip(*found, strict=True)
            if not isinstance(a, RowFault) and not isinstance(b, RowFault) and a.image != b.image]


def ids_file(ids: Sequence[str]) -> bytes:
    """Content of a file for `data.ids`, one id per line. Raises UsageError for an id with a line break in it."""
    if broken := [one for one in ids if "\n" in one]:
        raise UsageError(f"seed id {broken[0]!r} holds a line break, and lists of seeds have one id per line; rename "
                         "that image, or name another data.id_column")
    return "".join(f"{one}\n" for one in ids).encode()


def overlap(train: tuple[SeedIndex, DataConfig], test: tuple[SeedIndex, DataConfig], *,
            content: bool = False) -> list[str]:
    """Ids of the test images that are training images too, in the order of the test set.

    By seed id, which says something only within one dataset, where a digit on any background is one image; with
    `content`, by the bytes of the encoded images, which also finds an image under two names. Images that cannot be read
    overlap with nothing.
    """
    if not content:
        held = set(image_names(*train))
        return [one for one, image in zip(test[0].seed_ids, image_names(*test), strict=True) if image in held]
    digests = set(_image_digests(*train).values()) - {b""}
    return [one for one, found in _image_digests(*test).items() if found in digests]


def shared_images(train: tuple[SeedIndex, DataConfig], test: tuple[SeedIndex, DataConfig]) -> list[str]:
    """Ids of the test images that are training images too, whatever the two datasets are called.

    Where both are the same part of one dataset, an id names one image. Else local images are compared by their bytes:
    all of them up to 20,000, of more a keyed sample of each side that holds equal ids together, so that a dataset
    tested on itself is found. Two parts of which one lies in an object store are taken to be different.
    """
    if _part(train[1]) == _part(test[1]):
        return overlap(train, test)
    if any("://" in (data.path or "") for _, data in (train, test)):
        return []
    if len(train[0]) + len(test[0]) > _COMPARED:
        train, test = ((_sample(index, _COMPARED // 2), data) for index, data in (train, test))
    return overlap(train, test, content=True)


def image_names(index: SeedIndex, data: DataConfig) -> list[str]:
    """The image of each seed."""
    return images_of(index.seed_ids, data)


def images_of(seed_ids: list[str], data: DataConfig) -> list[str]:
    """The image of each seed id: the same digit lies behind several ids, and an image listed again has one for each."""
    if not data.repeats and data.source != "digits":
        return seed_ids
    images = [image_id(data, one) for one in seed_ids]
    return list(map(digit_of, images)) if data.source == "digits" else images


def _part(data: DataConfig) -> tuple[object, ...]:
    """Equal where seed ids name the same images: the digits are numbered through all their splits."""
    if data.source == "digits" or data.path is None:
        return (data.source,)
    place = data.path.rstrip("/")
    if "://" not in place:
        place = os.path.realpath(Path(place or "/").expanduser())
    if data.source == "imagefolder":
        return data.source, f"{place}/{data.split or ''}".rstrip("/")
    return data.source, place, data.split, data.id_column, data.image_column


def _sample(index: SeedIndex, size: int) -> SeedIndex:
    key = PlanRng(0, "subset").per_seed("overlap", index.seed_ids)
    rows = np.sort(np.argsort(key, kind="stable")[:size])
    return SeedIndex(index.table.take(pa.array(rows)), index.classes)


def _image_digests(index: SeedIndex, data: DataConfig) -> dict[str, bytes]:
    reader, found = SeedReader(index, data), []
    for start in range(0, len(index), _READ):
        for seed in reader.read(range(start, min(start + _READ, len(index)))):
            found.append(b"" if isinstance(seed, RowFault) else hashlib.blake2b(seed.image, digest_size=16).digest())
    return dict(zip(index.seed_ids, found, strict=True))


def real_counts(index: SeedIndex) -> np.ndarray:
    """int64[K]: sound images of each class."""
    return np.bincount(index.labels[sound_rows(index)], minlength=len(index.classes))


def _enough(index: SeedIndex, wanted: np.ndarray, what: str) -> np.ndarray:
    """`wanted`, if every class has as many. Raises UsageError."""
    have = real_counts(index)
    if len(short := np.flatnonzero(have < wanted)):
        named = ", ".join(f"{index.classes.display[c]} has {have[c]} of {wanted[c]}" for c in short[:3])
        raise UsageError(f"subset: {what} asked for, but {len(short)} of {len(have)} classes have fewer sound ones "
                         f"({named}{', ...' if len(short) > 3 else ''}); ask for fewer, or use few_shot")
    return wanted


def _first_of_each(index: SeedIndex, wanted: np.ndarray, seed: int) -> np.ndarray:
    rows = sound_rows(index)
    labels = index.labels[rows]
    rank = subset_rank(index.table["seed_id"].take(rows).to_pylist(), labels, seed)
    return rows[rank < wanted[labels]]
