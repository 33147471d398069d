"""Batches of seed images of one size, in stored order, decoded ahead of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from rayexpand.contract.errors import RowFault
from rayexpand.contract.schema import SeedIndex
from rayexpand.data.pixels import decode
from rayexpand.data.seeds import DataConfig, SeedReader

Resize = Literal["squash", "crop"]


class SeedBatches:
    """Reads and decodes rows of a seed index, `batch` images at a time; those of the next call meanwhile. What
    `prepare` makes of their pixels is held, so it should be of a model's size."""

    def __init__(self, index: SeedIndex, data: DataConfig, batch: int, io_threads: int,
                 prepare: Callable[[np.ndarray, str], Any]) -> None:
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


def resized(pixels: np.ndarray, size: tuple[int, int], how: Resize) -> np.ndarray:
    """uint8 (height, width, 3) of `size`; see fitting.features.Intake."""
    height, width = size
    if pixels.shape[:2] == (height, width):
        return pixels
    image = Image.fromarray(pixels)
    if how == "crop":
        return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
