"""Fitting on Ray: which of its parts run where. The cluster is joined, or started, when there is something to make."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rayexpand.contract.protocols import Progress
from rayexpand.contract.schema import SeedIndex
from rayexpand.fitting.captions import CaptionBlock
from rayexpand.fitting.config import FitConfig
from rayexpand.fitting.features import Block, Intake
from rayexpand.fitting.fit import fit as fit_with
from rayexpand.fitting.maker import Engine
from rayexpand.on_ray.captions import caption_blocks
from rayexpand.on_ray.features import classes, feature_blocks
from rayexpand.on_ray.finetune import tuning_on
from rayexpand.on_ray.pool import connected


def fit(config: FitConfig, progress: Progress) -> dict[str, Path]:
    """As fit.fit, with prototypes, features and captions computed on a cluster; it is joined, or started, only if
    there are any to make."""
    with contextlib.ExitStack() as stack:

        def blocks(config: FitConfig, sha256: str, index: SeedIndex, intake: Intake,
                   costs: dict[str, Any]) -> Iterator[Block]:
            stack.enter_context(connected(config.cluster))
            return feature_blocks(config, sha256, index, intake, costs)

        def captions(config: FitConfig, sha256: str, index: SeedIndex, costs: dict[str, Any]) -> Iterator[CaptionBlock]:
            stack.enter_context(connected(config.cluster))
            return caption_blocks(config, sha256, index, costs)

        return fit_with(config, progress, Engine(blocks, classes, captions, tuning_on(
            config, lambda: stack.enter_context(connected(config.cluster)))))
