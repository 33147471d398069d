"""Guide features of the images of a dataset, in the order in which they are stored.

Every guide call has one shape, so the features of an image depend on the image, the guide and that shape alone: not on
its neighbours, nor on which process computes them.
"""

# N images, B rows of a call, D features

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from rayexpand.errors import RowFault
from rayexpand.pixels import decode
from rayexpand.schema import SeedIndex
from rayexpand.seeds import DataConfig, SeedReader


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Features of neighbouring rows of a seed index."""

    rows: np.ndarray  # int64[N]: those that could be read
    features_ND: np.ndarray  # float32
    refused: dict[str, str]  # the others: reason by seed id


class SeedFeatures:
    """Reads, decodes and scores rows of a seed index, `batch` images at a time."""

    def __init__(self, index: SeedIndex, data: DataConfig, guide: Any, batch: int, io_threads: int = 1) -> None:
        self._ids, self._data, self._guide, self._batch = index.table["seed_id"], data, guide, batch
        self._reader = SeedReader(index, data)
        self._pool = ThreadPoolExecutor(io_threads, thread_name_prefix="io")

    def __call__(self, rows: range) -> Iterator[Block]:
        """Blocks of at most `batch` rows; the images of the next one are decoded meanwhile."""
        import torch

        chunks = [rows[i:i + self._batch] for i in range(0, len(rows), self._batch)]
        ahead = self._pool.submit(self._read, chunks[0])
        for following in [*chunks[1:], None]:
            sound, images, refused = ahead.result()
            if following is not None:
                ahead = self._pool.submit(self._read, following)
            x_BHWC = np.zeros((self._batch, *self._guide.size, 3), np.uint8)  # a short call is filled up with black
            if images:
                x_BHWC[:len(images)] = images
            with torch.no_grad():
                f_BD = self._guide.features(torch.from_numpy(x_BHWC).permute(0, 3, 1, 2) / 255)
            yield Block(np.array(sound, np.int64), f_BD[:len(images)].float().cpu().numpy(), refused)

    def close(self) -> None:
        self._pool.shutdown()

    def _read(self, rows: range) -> tuple[list[int], list[np.ndarray], dict[str, str]]:
        """(rows that can be used, their pixels, why the others cannot)."""
        sound, images, refused = [], [], {}
        for row, seed in zip(rows, self._reader.read(rows), strict=True):
            try:
                if isinstance(seed, RowFault):
                    raise seed
                pixels, _ = decode(seed.image, min_side=self._data.min_side, max_pixels=self._data.max_pixels)
                images.append(self._resized(pixels))
                sound.append(row)
            except RowFault as fault:
                refused[self._ids[row].as_py()] = str(fault)
        return sound, images, refused

    def _resized(self, pixels: np.ndarray) -> np.ndarray:
        """Both sides brought to the guide's (bilinear, antialiased, aspect not kept: DistDiff, section 4.1)."""
        height, width = self._guide.size
        if pixels.shape[:2] == (height, width):
            return pixels
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
