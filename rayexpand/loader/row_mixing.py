"""Which rows of a training set are mixed with which real images, and what label a mixed row has.

Samples are mixed, and real rows where nothing else is trained. A row draws from its own stream, keyed by (seed, epoch,
item, occurrence), so the mix of a row does not depend on the batch it is in.

The label of a mixed row is that of the row: both images show its class. A sample that was painted as another class than
its seed (Diff-Mix) gives the share of the real image to the class of the real image (ours; the paper has no such rows).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from rayexpand.classifier.seed_mixing import Mixture
from rayexpand.loader.training_set import TrainingSet


class RowMixes(NamedTuple):
    """The mixed rows among some slots, in their order."""

    at: np.ndarray  # int64 (M,), positions of the slots
    partners: np.ndarray  # int64 (M,), items of real images
    mixtures: list[Mixture]


class RowMixer:
    def __init__(self, rows: TrainingSet, size: int) -> None:
        assert rows.mix is not None
        self._mix, self._size = rows.mix, size
        self._first = rows.n_seeds if rows.n_synthetic else 0  # item from which rows are mixed
        self._labels, self._seeds = rows.column("label"), rows.column("seed")
        if self._mix.partner == "class":
            real = self._labels[:rows.n_seeds]
            self._order = np.argsort(real, kind="stable")  # real items by class
            self._have = np.bincount(real, minlength=rows.n_classes)
            self._start = np.cumsum(self._have) - self._have
            self._place = np.empty(len(real), np.int64)  # of a real item among those of its class
            self._place[self._order] = np.arange(len(real)) - self._start[real[self._order]]

    def draw(self, items: np.ndarray, occurrence: np.ndarray, stream: Callable[[int, int], np.random.Generator]
             ) -> RowMixes:
        at, partners, mixtures = list[int](), list[int](), list[Mixture]()
        for i, (item, repeat) in enumerate(zip(items.tolist(), occurrence.tolist(), strict=True)):
            if item < self._first:
                continue
            mixture, which = self._mix.draw(stream(item, repeat), self._size)
            if mixture is not None:
                at.append(i)
                partners.append(self._partner(item, which))
                mixtures.append(mixture)
        return RowMixes(np.array(at, np.int64), np.array(partners, np.int64), mixtures)

    def _partner(self, item: int, which: float) -> int:
        """The seed of a row, or another real image of its class; where that is the only one, its seed."""
        seed, label = int(self._seeds[item]), self._labels[item]
        if self._mix.partner == "seed":
            return seed
        is_among = self._labels[seed] == label
        others = int(self._have[label]) - int(is_among)
        if others < 1:
            return seed
        place = int(which * others)
        place += int(is_among and place >= self._place[seed])
        return int(self._order[self._start[label] + place])

    def labels(self, y_BK: np.ndarray, items: np.ndarray, mixes: RowMixes) -> np.ndarray:
        """float32 (B, K): labels of slots, of which some are mixed with an image of another class."""
        for i, partner, mixture in zip(mixes.at.tolist(), mixes.partners.tolist(), mixes.mixtures, strict=True):
            if self._labels[partner] != self._labels[items[i]]:
                y_BK[i] *= 1 - mixture.lam
                y_BK[i, self._labels[partner]] += mixture.lam
        return y_BK
