"""A training set as a torch dataset, for people with a trainer of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from rayexpand.loader.images import ImageReader
from rayexpand.loader.training_set import TrainingSet


class SampleDataset(Dataset[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]):
    """Item i: image uint8 (3, H, W) of its own size, soft label float32 (K,), and where it comes from: `label`,
    `source_label`, `strength`, `synthetic`. Real images come first. Read on demand, in any order, by any worker."""

    def __init__(self, rows: TrainingSet) -> None:
        self.rows, self.classes = rows, rows.classes.display
        self._n_real = rows.n_real
        self._images: ImageReader | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        if not 0 <= item < len(self):
            raise IndexError(item)
        if self._images is None:  # opened by each worker for itself
            self._images = ImageReader(self.rows)
        at = np.array([item])
        (pixels_HWC,) = self._images.decoded(at)
        (label_K,) = self._images.targets(at)
        facts = {"label": int(self.rows.column("label")[item]), "source_label": int(self.rows.column("source")[item]),
                 "strength": float(self.rows.column("strength")[item]), "synthetic": item >= self._n_real}
        return torch.from_numpy(pixels_HWC).permute(2, 0, 1).contiguous(), torch.from_numpy(label_K), facts

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": None}
