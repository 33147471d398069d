"""Features of the images of a side: sums over all of them, and rows of those that are kept.

A span (consecutive chunks) is worked on in one process, which gives back the features of kept rows and, for each half
of the reference and the rest, count, mean and scatter of all rows. `Gathered` puts spans together by their numbers, in
whatever order they come. Images never come to the driver.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from rayexpand.evaluation.features import Extractor, ImageBatch, stacked
from rayexpand.evaluation.moments import NONE, Moments, MomentsInOrder
from rayexpand.evaluation.sides import Side

CALLS_AHEAD = 4  # of one chunk, that wait decoded
HALVES = (0, 1, 2)  # of the reference; 0: neither, and samples

OnRows = Callable[[str, int, int], None]


class Sums(NamedTuple):
    """Of all images by their half."""

    rest: Moments
    first: Moments
    second: Moments

    @property
    def total(self) -> Moments:
        return self.rest.merged(self.first).merged(self.second)


class SpanPart(NamedTuple):
    """Of the sound images of one span."""

    features_ND: np.ndarray  # float32, of kept rows
    labels_N: np.ndarray  # of kept rows
    half_N: np.ndarray  # of kept rows
    sums: Sums | None
    rows: int
    refused: int


class Found(NamedTuple):
    """Of one side."""

    features_ND: np.ndarray  # of kept rows: float32, or float64 where a driver needs them in that
    refused: int  # images that could not be decoded
    size: int  # side of the extractor's input, pixels
    classes: np.ndarray | None = None  # key of the class of each kept row
    half_M: np.ndarray | None = None  # of each kept row of a reference
    sums: Sums | None = None
    rows: int | None = None  # all sound images; None: as many as are kept

    @property
    def images(self) -> int:
        return len(self.features_ND) if self.rows is None else self.rows


def part_of(chunks: Iterable[tuple[pa.Table, Iterable[ImageBatch]]], extractor: Extractor, *, sums: bool) -> SpanPart:
    """What is found of the calls of each chunk of a span."""
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    totals, rows, refused = [NONE] * len(HALVES), 0, 0
    for chunk, calls in chunks:
        parts, at, labels = [], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for call in calls:
            refused += call.refused
            if call.rows:
                parts.append(extractor(call.x_BHWC)[:call.rows])
                at.append(np.asarray(call.at))
                labels.append(np.full(call.rows, -1) if call.labels is None else call.labels)
        if not parts:
            continue
        h_ND, at_N, labels_N = np.concatenate(parts), np.concatenate(at), np.concatenate(labels)
        keep_N, half_N = chunk["keep"].to_numpy()[at_N], chunk["half"].to_numpy()[at_N]
        if sums:
            totals = [total.merged(Moments.of(h_ND[half_N == i])) for i, total in zip(HALVES, totals, strict=True)]
        kept.append((h_ND[keep_N], labels_N[keep_N], half_N[keep_N]))
        rows += len(h_ND)
    h_ND, labels_N, half_N = (np.concatenate(one) for one in zip(*kept, strict=True)) if kept else (
        stacked([]), np.empty(0, np.int64), np.empty(0, np.int8))
    return SpanPart(h_ND, labels_N, half_N, Sums(*totals) if sums else None, rows, refused)


class Gathered:
    """Spans of one side, put together."""

    def __init__(self, side: Side, size: int = 0) -> None:
        self._kept: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._sums = [MomentsInOrder(len(side.spans)) for _ in HALVES]
        self._keys, self.size = np.asarray(side.keys, object), size
        self._summed, self._rows, self._refused = False, 0, 0

    def add(self, number: int, part: SpanPart) -> None:
        if len(part.features_ND):
            self._kept[number] = part[:3]
        if part.sums is not None:
            self._summed = True
            for half, moments in zip(self._sums, part.sums, strict=True):
                half.add(number, moments)
        self._rows += part.rows
        self._refused += part.refused

    def found(self) -> Found:
        kept = [self._kept[number] for number in sorted(self._kept)]
        h_ND, labels_N, half_M = (np.concatenate(one) for one in zip(*kept, strict=True)) if kept else (
            stacked([]), np.empty(0, np.int64), np.empty(0, np.int8))
        sums = Sums(*(half.total for half in self._sums)) if self._summed else None
        classes = self._keys[labels_N] if len(self._keys) and (labels_N >= 0).all() else None
        return Found(h_ND, self._refused, self.size, classes, half_M if half_M.any() else None, sums, self._rows)


def ahead(calls: Iterator[ImageBatch]) -> Iterator[ImageBatch]:
    """The calls, made by a thread while those before are worked on."""
    with ThreadPoolExecutor(1, thread_name_prefix="calls") as pool:
        waiting = deque(pool.submit(next, calls, None) for _ in range(CALLS_AHEAD))
        while (call := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, calls, None))
            yield call


def counted(calls: Iterator[ImageBatch], say: Callable[[int], None]) -> Iterator[ImageBatch]:
    """The calls, with how many images of each are done."""
    for call in calls:
        yield call
        say(call.rows + call.refused)
