"""The generators that are trained here on first use, by their names in `prior.weights`."""

from __future__ import annotations

from pathlib import Path

from rayexpand.contract.protocols import Progress
from rayexpand.models.folders import DIGITS, DIGITS_MAE, DIGITS_UNCLIP, cache_root
from rayexpand.models.tiny import digits, digits_mae, digits_unclip

_TRAINERS = {DIGITS: (digits, "pipeline"), DIGITS_MAE: (digits_mae, "mae"), DIGITS_UNCLIP: (digits_unclip, "pipeline")}


def trained(weights: str, progress: Progress | None = None) -> Path:
    """Its folder."""
    trainer, part = _TRAINERS[weights]
    return trainer.ensure(progress) / part


def place(weights: str) -> Path:
    """Where its folder is once it is trained."""
    trainer, part = _TRAINERS[weights]
    return cache_root() / trainer.cache_name() / part
