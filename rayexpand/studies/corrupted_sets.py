"""Further test sets of corrupted images: what is in them, and their images as a classifier sees them.

    cell     one type in one severity: the same images in every cell, in the same order
    view     how a classifier is shown an image: the part of its recipe that tests look at
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from rayexpand.classifier.recipe import Recipe
from rayexpand.contract.errors import SeedDataError, UsageError
from rayexpand.contract.schema import ClassTable, SeedIndex
from rayexpand.contract.settings import digest
from rayexpand.data.corruptions.corruptor import VERSION, Corruptor
from rayexpand.data.corruptions.tables import COMMON, SEVERITIES
from rayexpand.data.seeds import DataConfig, build_index, cifar_c
from rayexpand.data.seeds.places import place
from rayexpand.data.subsets import fingerprint, sound_rows
from rayexpand.evaluation.robustness import CIFAR_C, IMAGENET_C
from rayexpand.loader.loader import TestSet
from rayexpand.studies.class_maps import OpenedTest, map_sha256, matched
from rayexpand.studies.extra_tests import ExtraTest

Cell = tuple[str, int]
Listed = Callable[[DataConfig], SeedIndex]


@dataclass(frozen=True)
class CorruptedSet:
    """Published files have one listing for each cell, images corrupted in memory one for all."""

    name: str
    test: ExtraTest
    called: str  # ImageNet-C, CIFAR-C or corrupted-v1
    cells: tuple[Cell, ...]
    listings: tuple[tuple[DataConfig, OpenedTest], ...]
    fingerprint: str  # of the images that are corrupted in memory, whatever is trained; keys every draw
    sha256: str  # of images, labels, classes that are right, and corruptions

    @property
    def first(self) -> OpenedTest:
        return self.listings[0][1]

    @property
    def rows(self) -> np.ndarray:
        """int64: rows of the listings that can be used."""
        return sound_rows(self.first.index)

    @property
    def note(self) -> str:
        """What must be said beside a mean over types."""
        if self.test.corrupt is not None:
            return self.test.corrupt.note
        types, severities = ({cell[part] for cell in self.cells} for part in (0, 1))
        return "" if types == {*COMMON} else f"{len(types)} of {len(COMMON)} types, in {len(severities)} severities"

    def view_of(self, recipe: Recipe) -> Recipe:
        """How a classifier is shown the images. The files of ImageNet-C were cut to their middle square already."""
        return recipe.model_copy(update={"resize": None}) if self.called == IMAGENET_C else recipe


def open_corrupted(name: str, test: ExtraTest, classes: ClassTable, listed: Listed = build_index) -> CorruptedSet:
    """Lists a set of corrupted images. Raises UsageError where its classes are not those that are trained or its cells
    do not hold the same images; SeedDataError."""
    if test.corrupt is not None:
        index = listed(test.data)
        opened = _matched(test, index, classes)
        cells = tuple((kind, severity) for kind in test.corrupt.names for severity in sorted(test.corrupt.severities))
        found = CorruptedSet(name, test, VERSION, cells, ((test.data, opened),),
                             fingerprint(index, test.data), "")
        corrupted = test.corrupt.model_dump(mode="json", exclude={"frost"})
    else:
        parts = _published(test)
        listings = tuple((data, _matched(test, listed(data), classes)) for _, data in parts)
        found = CorruptedSet(name, test, IMAGENET_C if test.layout is not None else CIFAR_C,
                             tuple(cell for cell, _ in parts), listings, "", "")
        _refuse_other_images(found)
        corrupted = {}
    prints = [fingerprint(opened.index, data) for data, opened in found.listings]
    cut = ["not cut again"] if found.called == IMAGENET_C else []
    return replace(found, sha256=digest([found.called, found.fingerprint, prints, list(found.cells), corrupted,
                                         map_sha256(test.class_map), test.crop_border, *cut]))


def _matched(test: ExtraTest, index: SeedIndex, classes: ClassTable) -> OpenedTest:
    found = matched(index, classes, test.class_map)
    if not len(sound_rows(found.index)):
        raise UsageError("has no image that can be used; correct data.split, data.ids or the files")
    return found


def _published(test: ExtraTest) -> list[tuple[Cell, DataConfig]]:
    """The cells of published files, and how each is read. Raises SeedDataError."""
    if test.layout is None:
        return [((kind, severity), test.data.model_copy(update={"split": f"{kind}/{severity}"}))
                for kind, severity in cifar_c.check(test.data)]
    top = place("data.path", str(test.data.path))
    there = {kind: [s for s in SEVERITIES if top.at(kind, str(s)).kind() == "folder"] for kind in COMMON}
    if not (have := {kind: severities for kind, severities in there.items() if severities}):
        raise SeedDataError(f"data.path: '{test.data.path}' has no folder <corruption>/<severity> such as fog/3; "
                            "name the folder that holds gaussian_noise to jpeg_compression")
    if uneven := [f"{kind}: {severities}" for kind, severities in have.items()
                  if severities != next(iter(have.values()))]:
        raise SeedDataError(f"data.path: the types of '{test.data.path}' do not have the same severities "
                            f"({'; '.join(uneven[:3])}); unpack the archives again")
    return [((kind, severity), test.data.model_copy(update={"path": f"{str(test.data.path).rstrip('/')}/{kind}/"
                                                                    f"{severity}"}))
            for kind, severities in have.items() for severity in severities]


def _refuse_other_images(found: CorruptedSet) -> None:
    first, named = found.first, found.test.layout is not None
    for (kind, severity), (_, opened) in zip(found.cells, found.listings, strict=True):
        is_same = np.array_equal(opened.own_N, first.own_N) and np.array_equal(opened.index.labels, first.index.labels)
        if not is_same or (named and opened.index.seed_ids != first.index.seed_ids):
            raise UsageError(f"{kind}/{severity} has other images or labels than {'/'.join(map(str, found.cells[0]))}; "
                             "all types and severities are made of the same images, so unpack the archives again")


class CorruptedImages:
    """The images of a set as one view sees them, in one process."""

    def __init__(self, shown: CorruptedSet, view: Recipe) -> None:
        self._shown = shown
        self._sets = [TestSet(opened.index, data, view, 0, 1, 1, cache_bytes=0,
                              section=f"extra_tests.{shown.name}.data", crop_border=shown.test.crop_border)
                      for data, opened in shown.listings]
        self._ids = shown.first.index.table["seed_id"]
        config = shown.test.corrupt
        self._corruptor = None if config is None else Corruptor(config, shown.fingerprint)

    def made(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Number of a cell and uint8 (B, S, S, 3), for every cell. Raises UsageError naming an image that cannot be
        read."""
        if self._corruptor is None:
            for number, one in enumerate(self._sets):
                yield number, one.at(rows).x_BHWC
            return
        clean_BHWC, ids = self._sets[0].at(rows).x_BHWC, self._ids.take(rows).to_pylist()
        for number, (kind, severity) in enumerate(self._shown.cells):
            yield number, np.stack([self._corruptor(x_HWC, image_id, kind, severity)
                                    for x_HWC, image_id in zip(clean_BHWC, ids, strict=True)])
