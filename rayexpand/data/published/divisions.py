"""The splits of papers: official parts as they are, joined, or drawn at random.

A paper that draws at random publishes how many images, not which. Those drawn here follow from the paths alone, so that
they are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

import rayexpand
from rayexpand.contract.errors import SeedDataError, few
from rayexpand.data.published.found import FoundSet, Images, joined
from rayexpand.data.seeds.index import subset_rank


@dataclass(frozen=True)
class RandomPart:
    """Some images of each class become part `train`, the others `test`."""

    of: tuple[str, ...]  # official parts that are drawn from
    count: Callable[[int], int]  # images of a class, or of the whole set -> how many of them are drawn
    by_class: bool = True


@dataclass(frozen=True)
class Division:
    counts: Mapping[str, int]  # published images by part
    classes: int
    of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # official parts of each, where they differ
    about: str = ""  # what is ours
    draw: RandomPart | None = None
    per_class: Mapping[str, int] = field(default_factory=dict)  # as data.per_class of a part
    without: tuple[str, ...] = ()  # keys of classes that are left out
    only: str | None = None  # ready file with the keys of the classes that stay
    rename: Callable[[str], str] | None = None  # class name -> what this paper calls it
    also: Mapping[str, int] = field(default_factory=dict)  # counts of another release that passes


def divided(found: FoundSet, by: Division) -> FoundSet:
    """The dataset in the parts of a division."""
    found = _kept(found, by)
    classes = [words._replace(name=by.rename(words.name)) if by.rename else words for words in found.classes]
    if by.draw is not None:
        parts = _drawn(joined([found.parts[part] for part in by.draw.of if part in found.parts]), by.draw)
    else:
        empty = Images([], [])
        parts = {part: joined([found.parts.get(one, empty) for one in by.of.get(part, (part,))]) for part in by.counts}
    return replace(found, classes=classes, parts=parts)


def counted(images: Images, by: Division, part: str) -> int:
    """How many images of a part are used, with data.per_class."""
    if (most := by.per_class.get(part)) is None:
        return len(images)
    return int(np.minimum(np.bincount(images.labels), most).sum())


def _kept(found: FoundSet, by: Division) -> FoundSet:
    """Without the classes that a division leaves out; the others are numbered anew."""
    keys = [words.key for words in found.classes]
    wanted = keys if by.only is None else _ready_list(by.only)
    if absent := [key for key in wanted if key not in keys]:
        raise SeedDataError(f"{len(absent)} of {len(wanted)} classes of {by.only} are not there ({few(absent)}); "
                            "unpack the archive again")
    stay = [number for number, key in enumerate(keys) if key in {*wanted} - {*by.without}]
    if len(stay) == len(keys):
        return found
    renumbered = {old: new for new, old in enumerate(stay)}
    parts = {}
    for name, part in found.parts.items():
        some = part.rows([row for row, label in enumerate(part.labels) if label in renumbered])
        parts[name] = Images(some.paths, [renumbered[label] for label in some.labels])
    return replace(found, classes=[found.classes[number] for number in stay], parts=parts)


def _ready_list(name: str) -> list[str]:
    return Path(rayexpand.__file__).with_name("jobs").joinpath(name).read_text(encoding="utf-8").split()


def _drawn(every: Images, draw: RandomPart) -> dict[str, Images]:
    labels = np.asarray(every.labels, np.int64) if draw.by_class else np.zeros(len(every), np.int64)
    most = np.array([draw.count(size) for size in np.bincount(labels).tolist()], np.int64)
    taken = subset_rank(every.paths, labels, seed=0) < most[labels]
    return {part: every.rows(_rows(taken == wanted)) for part, wanted in (("train", True), ("test", False))}


def _rows(mask: np.ndarray) -> Sequence[int]:
    return [int(row) for row in np.flatnonzero(mask)]
