"""Methods that plan and sample as another one does, but for what they say themselves."""

from __future__ import annotations

from typing import Any

import numpy as np

from rayexpand.contract.protocols import Batch, Expansion, Tools
from rayexpand.contract.rng import PlanRng, RowRng
from rayexpand.contract.schema import ClassTable, Draw, SeedIndex


class OnPlain:
    """Asks `_plain`, the other method, for all that a method of its own does not answer."""

    _plain: Any

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        return self._plain.expand(batch, tools)

    def needs(self) -> frozenset[str]:
        return self._plain.needs()

    def copies(self, index: SeedIndex, rng: PlanRng) -> np.ndarray:
        return self._plain.copies(index, rng)

    def draw(self, seed_id: str, label: int, copy: int, row: int, classes: ClassTable, rng: RowRng) -> Draw:
        return self._plain.draw(seed_id, label, copy, row, classes, rng)

    def group(self, copies: int) -> int:
        return 1

    def batch_key(self, draw: Draw) -> tuple[Any, ...]:
        return self._plain.batch_key(draw)

    def soft_label(self, source: np.ndarray, target: np.ndarray, strength: np.ndarray, n_classes: int,
                   **recipe: float) -> np.ndarray:
        return self._plain.soft_label(source, target, strength, n_classes, **recipe)
