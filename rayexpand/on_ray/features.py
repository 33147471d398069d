"""Features of all images, and prototypes of each class, on Ray.

    driver    spans of rows -> map_batches(FeatureActor) -> features on the driver's disk -> one task for each class

The features of a dataset go to the driver's disk (10.7 GB for ImageNet with 2,048 features) and from there to tasks,
one class at a time. The numbers are those of `fitting.fit.HERE`, bit for bit on one stack, for any number of actors.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import ray

from rayexpand.contract.schema import SeedIndex
from rayexpand.diffusion.prototypes import ClassPrototypes, fit_class
from rayexpand.fitting.config import FitConfig
from rayexpand.fitting.features import Block, Intake, SeedFeatures
from rayexpand.models.guides import guide_model, load_guide
from rayexpand.on_ray.spans import SpanActor, over_spans
from rayexpand.on_ray.stage import guide_at, local

AHEAD = 2  # classes in flight for each CPU of the cluster


def feature_blocks(config: FitConfig, guide_sha256: str, index: SeedIndex, intake: Intake,
                   costs: dict[str, Any]) -> Iterator[Block]:
    """Features of all images. Raises ModelError or EnvironmentFault for a fault of the nodes."""
    models = {guide_sha256: guide_model(config.guide.weights, config.guide.checkpoint)}
    for row in over_spans(FeatureActor, {"config": config, "sha256": guide_sha256, "intake": intake}, config, models,
                          index, intake.batch, costs):
        sound = np.frombuffer(row["rows"], np.int64)
        yield Block(sound, np.frombuffer(row["features"], np.float32).reshape(len(sound), row["dim"]),
                    json.loads(row["refused"]))


def classes(parts: Iterable[np.ndarray], groups: int) -> Iterator[ClassPrototypes]:
    """Prototypes of the features of each class, in order; a few classes are in flight at a time."""
    task = ray.remote(num_cpus=1)(fit_class)
    room = max(1, int(ray.cluster_resources().get("CPU", 1))) * AHEAD
    waiting: deque[Any] = deque()
    for features_ND in parts:
        waiting.append(task.remote(features_ND, groups))
        if len(waiting) == room:
            yield ray.get(waiting.popleft())
    while waiting:
        yield ray.get(waiting.popleft())


class FeatureActor(SpanActor):
    nothing: ClassVar[dict[str, Any]] = {"rows": b"", "features": b"", "dim": 0, "refused": "{}"}

    def __init__(self, config: FitConfig, sha256: str, intake: Intake, server: Any, cwd: str) -> None:
        super().__init__(server, cwd)
        self._config, self._sha256, self._intake = config, sha256, intake
        self._features: SeedFeatures | None = None

    def _made(self, rows: range) -> dict[str, Any]:
        blocks = list(self._get()(rows))
        refused = {seed_id: reason for block in blocks for seed_id, reason in block.refused.items()}
        return {"rows": np.concatenate([block.rows for block in blocks]).tobytes(),
                "features": np.concatenate([block.features_ND for block in blocks]).tobytes(),
                "dim": blocks[0].features_ND.shape[1], "refused": json.dumps(refused)}

    def _get(self) -> SeedFeatures:
        if self._features is None:
            import torch

            config = self._config
            torch.set_num_threads(config.runtime.torch_threads)
            index = ray.get(self._server.shared.remote())
            found = guide_at(config.guide, str(local(
                guide_model(config.guide.weights, config.guide.checkpoint), self._sha256, self._server)))
            guide = load_guide(found.weights, found.checkpoint, index.classes.asked, device=config.device,
                               class_keys=index.classes.key)
            self._device = guide.device.type
            self._features = SeedFeatures(index, config.data, guide, self._intake, config.runtime.io_threads)
        return self._features
