"""Images of a dataset in the order in which they are stored, and what a guide says of them.

Every guide call has one shape, so the features of an image depend on the image, the guide and that shape alone: not on
its neighbours, nor on which process computes them.
"""

# N images, B rows of a call, D features

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from rayexpand.errors import RowFault, UsageError
from rayexpand.pixels import decode
from rayexpand.schema import SeedIndex
from rayexpand.seeds import DataConfig, SeedReader

Resize = Literal["squash", "crop"]


@dataclass(frozen=True, slots=True)
class Intake:
    """How a guide gets images: `batch` in one call, brought to its size in one of two ways.

    squash: both sides, bilinear, aspect not kept (DistDiff, section 4.1). crop: the shorter side, bicubic, then the
    middle (what CLIP's own preparation does). Both are antialiased.
    """

    batch: int = 64
    resize: Resize = "squash"


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Features of neighbouring rows of a seed index."""

    rows: np.ndarray  # int64[N]: those that could be read
    features_ND: np.ndarray  # float32
    refused: dict[str, str]  # the others: reason by seed id


class SeedBatches:
    """Reads and decodes rows of a seed index, `batch` images at a time; those of the next call meanwhile."""

    def __init__(self, index: SeedIndex, data: DataConfig, batch: int, io_threads: int = 1,
                 prepare: Callable[[np.ndarray, str], Any] = lambda pixels, seed_id: pixels) -> None:
        self._ids, self._data, self._batch, self._prepare = index.table["seed_id"], data, batch, prepare
        self._reader = SeedReader(index, data)
        self._pool = ThreadPoolExecutor(io_threads, thread_name_prefix="io")

    def __call__(self, rows: range) -> Iterator[tuple[np.ndarray, list[Any], dict[str, str]]]:
        """(rows that can be used, what `prepare` makes of their pixels, why the others cannot by seed id)."""
        chunks = [rows[i:i + self._batch] for i in range(0, len(rows), self._batch)]
        ahead = self._pool.submit(self._read, chunks[0])
        for following in [*chunks[1:], None]:
            found = ahead.result()
            if following is not None:
                ahead = self._pool.submit(self._read, following)
            yield found

    def close(self) -> None:
        self._pool.shutdown()

    def _read(self, rows: range) -> tuple[np.ndarray, list[Any], dict[str, str]]:
        sound, images, refused = [], [], {}
        for row, seed in zip(rows, self._reader.read(rows), strict=True):
            try:
                if isinstance(seed, RowFault):
                    raise seed
                pixels, _ = decode(seed.image, min_side=self._data.min_side, max_pixels=self._data.max_pixels)
                images.append(self._prepare(pixels, seed.seed_id))
                sound.append(row)
            except RowFault as fault:
                refused[self._ids[row].as_py()] = str(fault)
        return np.array(sound, np.int64), images, refused


class SeedFeatures:
    """Reads, decodes and scores rows of a seed index."""

    def __init__(self, index: SeedIndex, data: DataConfig, guide: Any, intake: Intake, io_threads: int = 1) -> None:
        self._guide, self._batch = guide, intake.batch
        self._images = SeedBatches(index, data, intake.batch, io_threads,
                                   lambda pixels, _: resized(pixels, guide.size, intake.resize))

    def __call__(self, rows: range) -> Iterator[Block]:
        """Blocks of at most one call."""
        import torch

        for sound, images, refused in self._images(rows):
            x_BHWC = np.zeros((self._batch, *self._guide.size, 3), np.uint8)  # a short call is filled up with black
            if images:
                x_BHWC[:len(images)] = images
            with torch.no_grad():
                f_BD = self._guide.features(torch.from_numpy(x_BHWC).permute(0, 3, 1, 2) / 255)
            yield Block(sound, f_BD[:len(images)].float().cpu().numpy(), refused)

    def close(self) -> None:
        self._images.close()


def resized(pixels: np.ndarray, size: tuple[int, int], how: Resize) -> np.ndarray:
    """uint8 (height, width, 3) of `size`; see Intake."""
    height, width = size
    if pixels.shape[:2] == (height, width):
        return pixels
    image = Image.fromarray(pixels)
    if how == "crop":
        return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def gathered(blocks: Iterable[Block], count: int, scratch: Path,
             progress: Callable[[str, int, int], None]) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """((count, D) float32 on disk: 10.7 GB for 1.3 million images of 2,048 features; which rows hold any; reasons)."""
    features_ND = None
    sound_N, refused = np.zeros(count, bool), dict[str, str]()
    for block in blocks:
        if features_ND is None:
            features_ND = np.memmap(scratch, np.float32, "w+", shape=(count, block.features_ND.shape[1]))
        features_ND[block.rows] = block.features_ND
        sound_N[block.rows] = True
        refused |= block.refused
        progress("features", int(sound_N.sum()) + len(refused), count)
    assert features_ND is not None, "a seed index has rows"
    return features_ND, sound_N, refused


def by_class(features_ND: np.ndarray, sound_N: np.ndarray, index: SeedIndex,
             lacking: str = "prototype") -> Iterator[np.ndarray]:
    """Features of each class in label order. Raises UsageError for a class without, or with features not finite."""
    labels = np.where(sound_N, index.labels, -1)
    order = np.argsort(labels, kind="stable")
    bounds = np.searchsorted(labels[order], np.arange(len(index.classes) + 1))
    for key, start, stop in zip(index.classes.key, bounds[:-1], bounds[1:], strict=True):
        if start == stop:
            raise UsageError(f"class {key!r} has no image that can be read, so it has no {lacking}; give it at least "
                             "one, or leave the class out of the dataset")
        found_ND = np.asarray(features_ND[order[start:stop]])
        if bad := int((~np.isfinite(found_ND).all(axis=1)).sum()):
            raise UsageError(f"the guide gives features that are no numbers for {bad} of {len(found_ND)} images of "
                             f"class {key!r}; try device: cpu, or another guide")
        yield found_ND
