"""What guided methods share: how they take gradients, and what they say about the rows of a call."""

# B rows

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from rayexpand.contract.protocols import Expansion
from rayexpand.contract.schema import Reason

if TYPE_CHECKING:
    import torch

Out = TypeVar("Out")

# Divided out of the gradient again. A power of two changes no number in float32 or bfloat16, and keeps gradients of a
# float16 UNet above its smallest number.
LOSS_SCALE = 2.0**10


def with_graph(function: Callable[[torch.Tensor], Out], x: torch.Tensor, *, recompute: bool) -> Out:
    """function(x), whose activations are kept for the backward pass, or computed again there."""
    import torch
    from torch.utils.checkpoint import checkpoint

    if not (recompute and torch.is_grad_enabled()):
        return function(x)
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


class Guided:
    def __init__(self, rows: int) -> None:
        self.scores: dict[str, Sequence[float]] = {}
        self._diverged_B = np.zeros(rows, bool)

    def score(self, name: str, values_B: torch.Tensor) -> None:
        self.scores[name] = values_B.tolist()

    def check(self, before_B: torch.Tensor, *after: torch.Tensor) -> None:
        """A row that was a finite number `before` and is not `after` has diverged: projection would hide an inf."""
        import torch

        finite_B = torch.stack([torch.isfinite(numbers).flatten(1).all(1) for numbers in after]).all(0)
        self._diverged_B |= (torch.isfinite(before_B) & ~finite_B).cpu().numpy()

    def expansion(self, images: list[np.ndarray | None], reasons: list[Reason | None]) -> Expansion:
        """Images and reasons, without the diverged rows, and with the scores."""
        for i in np.flatnonzero(self._diverged_B):
            images[i], reasons[i] = None, Reason.GUIDANCE_DIVERGED
        return Expansion(images, reasons, scores=self.scores)
