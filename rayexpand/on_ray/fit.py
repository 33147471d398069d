"""Prototypes on Ray: features by an actor pool over spans of the seed index, groups of each class as tasks.

    driver    spans of rows -> map_batches(FeatureActor) -> features on the driver's disk -> one task for each class

Spans follow the order in which images are stored, so that a row group is read once. The features of a dataset go to
the driver's disk (10.7 GB for ImageNet with 2,048 features) and from there to tasks, one class at a time. The numbers
are those of `fit.HERE`, bit for bit on one stack, for any number of actors.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data

from rayexpand.core.prototypes import ClassPrototypes, fit_class
from rayexpand.errors import EnvironmentFault, ModelError, RayexpandError
from rayexpand.fit import Engine, FitConfig
from rayexpand.fit import fit as fit_with
from rayexpand.guides import load_guide
from rayexpand.on_ray.expand import choose_pool, connected
from rayexpand.on_ray.stage import guide_at, guide_model, local, open_shelf
from rayexpand.priors import Progress
from rayexpand.schema import SeedIndex
from rayexpand.seed_features import Block, SeedFeatures

SPAN_IMAGES = 2048  # images of one task; long beside the 10-30 ms a task costs
AHEAD = 2  # classes in flight for each CPU of the cluster


def fit(config: FitConfig, progress: Progress) -> dict[str, Path]:
    """As fit.fit, with prototypes computed on a cluster; it is joined, or started, only if there are any to make."""
    with contextlib.ExitStack() as stack:

        def blocks(config: FitConfig, sha256: str, index: SeedIndex, costs: dict[str, Any]) -> Iterator[Block]:
            stack.enter_context(connected(config.cluster))
            return feature_blocks(config, sha256, index, costs)

        return fit_with(config, progress, Engine(blocks, classes))


def feature_blocks(config: FitConfig, guide_sha256: str, index: SeedIndex, costs: dict[str, Any]) -> Iterator[Block]:
    """Features of all images. Raises ModelError or EnvironmentFault for a fault of the nodes."""
    assert config.fit.prototypes is not None
    pool = choose_pool(config.cluster, models=config.device != "cpu")
    spans = _spans(len(index), config.fit.prototypes.batch, pool.actors)
    shelf = open_shelf({guide_sha256: guide_model(config.guide)}, shared=index)
    rows = ray.data.from_items([{"first": one.start, "stop": one.stop} for one in spans],
                               override_num_blocks=len(spans))
    made = rows.map_batches(
        FeatureActor, batch_size=1, num_cpus=pool.cpus, num_gpus=pool.gpus or None, resources=pool.resources or None,
        label_selector=pool.labels or None,
        compute=ray.data.ActorPoolStrategy(size=min(pool.actors, len(spans)), max_tasks_in_flight_per_actor=2),
        fn_constructor_kwargs={"config": config, "guide_sha256": guide_sha256, "shelf": shelf, "cwd": os.getcwd()})
    costs |= {"cpu_seconds": 0.0, "gpu_seconds": 0.0, "actors": min(pool.actors, len(spans))}
    for row in made.iter_rows():
        if row["fault"]:
            raise (ModelError if row["is_model"] else EnvironmentFault)(row["fault"])
        costs["device"] = row["device"]
        costs["cpu_seconds"] += row["cpu_seconds"]
        costs["gpu_seconds"] += row["seconds"] * pool.gpus * (row["device"] == "cuda")
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


def _spans(count: int, batch: int, actors: int) -> list[range]:
    """Ranges of whole calls; small datasets are cut finer, so that every actor has a share."""
    share = -(-count // (batch * actors))
    size = batch * max(1, min(SPAN_IMAGES // batch, share))
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


class FeatureActor:
    """One process of the pool. Loads its guide at the first span, so that a bad start is a fault, not a crash."""

    def __init__(self, config: FitConfig, guide_sha256: str, shelf: Any, cwd: str) -> None:
        if os.path.isdir(cwd):
            os.chdir(cwd)  # relative paths of the configuration are relative to where the driver was started
        self._config, self._sha256, self._shelf = config, guide_sha256, shelf
        self._features: SeedFeatures | None = None
        self._device = ""

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        (first,), (stop,) = batch["first"], batch["stop"]
        wall, cpu = time.perf_counter(), time.process_time()
        row = {"rows": b"", "features": b"", "dim": 0, "refused": "{}", "fault": "", "is_model": False}
        try:
            blocks = list(self._get()(range(int(first), int(stop))))
        except Exception as error:
            kind = "" if isinstance(error, RayexpandError) else f"{type(error).__name__}: "
            row |= {"fault": f"{kind}{error} (on {socket.gethostname()})", "is_model": isinstance(error, ModelError)}
        else:
            refused = {seed_id: reason for block in blocks for seed_id, reason in block.refused.items()}
            row |= {"rows": np.concatenate([block.rows for block in blocks]).tobytes(),
                    "features": np.concatenate([block.features_ND for block in blocks]).tobytes(),
                    "dim": blocks[0].features_ND.shape[1], "refused": json.dumps(refused)}
        row |= {"device": self._device, "seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        return {name: [value] for name, value in row.items()}

    def _get(self) -> SeedFeatures:
        if self._features is None:
            import torch

            config = self._config
            assert config.fit.prototypes is not None
            torch.set_num_threads(config.runtime.torch_threads)
            index = ray.get(self._shelf.shared.remote())
            found = guide_at(config.guide, str(local(guide_model(config.guide), self._sha256, self._shelf)))
            guide = load_guide(found.weights, found.checkpoint, index.classes.name, device=config.device,
                               class_keys=index.classes.key)
            self._device = guide.device.type
            self._features = SeedFeatures(index, config.data, guide, config.fit.prototypes.batch,
                                          config.runtime.io_threads)
        return self._features
