"""Images of a dataset in the order in which they are stored, and what a guide says of them.

Every guide call has one shape, so the features of an image depend on the image, the guide and that shape alone: not on
its neighbours, nor on which process computes them.
"""

# N images, B rows of a call, D features

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayexpand.contract.errors import UsageError
from rayexpand.contract.schema import SeedIndex
from rayexpand.data.batches import Resize, SeedBatches, resized
from rayexpand.data.seeds import DataConfig


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
            raise UsageError(f"the guide gives features that are not finite for {bad} of {len(found_ND)} images of "
                             f"class {key!r}; try device: cpu, or another guide")
        yield found_ND
