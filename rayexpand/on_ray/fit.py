"""Fitting on Ray: features by an actor pool over spans of the seed index, groups of each class as tasks.

    driver    spans of rows -> map_batches(FeatureActor) -> features on the driver's disk -> one task for each class

Captions take the same way (captions.py). Spans follow the order in which images are stored, so that a row group is read
once. The features of a dataset go to the driver's disk (10.7 GB for ImageNet with 2,048 features) and from there to
tasks, one class at a time. The numbers are those of `fit.HERE`, bit for bit on one stack, for any number of actors.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import ray
import ray.data

from rayexpand.contract.errors import EnvironmentFault, ModelError, RayexpandError
from rayexpand.contract.protocols import Progress
from rayexpand.contract.schema import SeedIndex
from rayexpand.diffusion.prototypes import ClassPrototypes, fit_class
from rayexpand.fitting.captions import CaptionBlock
from rayexpand.fitting.config import FitConfig
from rayexpand.fitting.features import Block, Intake, SeedFeatures
from rayexpand.fitting.fit import Engine
from rayexpand.fitting.fit import fit as fit_with
from rayexpand.models.guides import load_guide
from rayexpand.on_ray.expand import Pool, choose_pool, connected
from rayexpand.on_ray.stage import Model, guide_at, guide_model, local, open_model_server

SPAN_IMAGES = 2048  # images of one task; long beside the 10-30 ms a task costs
AHEAD = 2  # classes in flight for each CPU of the cluster

log = logging.getLogger(__name__)


def fit(config: FitConfig, progress: Progress) -> dict[str, Path]:
    """As fit.fit, with prototypes, features and captions computed on a cluster; it is joined, or started, only if
    there are any to make."""
    from rayexpand.on_ray.captions import caption_blocks
    from rayexpand.on_ray.finetune import tuning_on

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


def feature_blocks(config: FitConfig, guide_sha256: str, index: SeedIndex, intake: Intake,
                   costs: dict[str, Any]) -> Iterator[Block]:
    """Features of all images. Raises ModelError or EnvironmentFault for a fault of the nodes."""
    for row in over_spans(FeatureActor, {"config": config, "sha256": guide_sha256, "intake": intake}, config,
                          {guide_sha256: guide_model(config.guide)}, index, intake.batch, costs):
        sound = np.frombuffer(row["rows"], np.int64)
        yield Block(sound, np.frombuffer(row["features"], np.float32).reshape(len(sound), row["dim"]),
                    json.loads(row["refused"]))


def over_spans(actor: type[SpanActor], arguments: dict[str, Any], config: FitConfig, models: dict[str, Model],
               index: SeedIndex, batch: int, costs: dict[str, Any],
               spans: list[range] | None = None) -> Iterator[dict[str, Any]]:
    """Rows that a pool of `actor` makes of all spans of `index`, whole calls of `batch` images each (or of `spans`), in
    any order.

    A span that its node spoils is made once more, by new actors. Raises EnvironmentFault for one that is spoilt twice,
    and for more of them than there are actors; ModelError for a model that cannot be used.
    """
    pool = choose_pool(config.cluster, models=config.device != "cpu")
    spans = spans or _spans(len(index), batch, pool.actors)
    made_with = {**arguments, "shelf": open_model_server(models, shared=index), "cwd": os.getcwd()}
    costs |= {"cpu_seconds": 0.0, "gpu_seconds": 0.0, "actors": min(pool.actors, len(spans))}
    spoilt: list[range] = []
    for again in (False, True):
        for row in _pool_rows(actor, made_with, pool, spoilt if again else spans):
            costs["device"] = row["device"] or costs.get("device", "")
            costs["cpu_seconds"] += row["cpu_seconds"]
            costs["gpu_seconds"] += row["seconds"] * pool.gpus * (row["device"] == "cuda")
            if not row["fault"]:
                yield row
                continue
            if row["is_model"] or again or len(spoilt) >= pool.actors:
                raise (ModelError if row["is_model"] else EnvironmentFault)(row["fault"])
            log.warning("images %d to %d could not be worked on (%s); they are tried once more", row["span_start"],
                        row["span_stop"] - 1, row["fault"])
            spoilt.append(range(row["span_start"], row["span_stop"]))
        if not spoilt:
            return


def _pool_rows(actor: type[SpanActor], arguments: dict[str, Any], pool: Pool,
               spans: list[range]) -> Iterator[dict[str, Any]]:
    rows = ray.data.from_items([{"first": one.start, "stop": one.stop} for one in spans],
                               override_num_blocks=len(spans))
    made = rows.map_batches(
        actor, batch_size=1, num_cpus=pool.cpus, num_gpus=pool.gpus or None, resources=pool.resources or None,
        label_selector=pool.labels or None,
        compute=ray.data.ActorPoolStrategy(size=min(pool.actors, len(spans)), max_tasks_in_flight_per_actor=2),
        fn_constructor_kwargs=arguments)
    yield from made.iter_rows()


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


class SpanActor(ABC):
    """One process of a pool. Loads its model at the first span, so that a bad start is a fault, not a crash."""

    nothing: ClassVar[dict[str, Any]]  # what `_made` gives, empty: all rows of a Ray dataset have the same columns

    def __init__(self, shelf: Any, cwd: str) -> None:
        if os.path.isdir(cwd):
            os.chdir(cwd)  # relative paths of the configuration are relative to where the driver was started
        self._shelf, self._device = shelf, ""

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        (first,), (stop,) = batch["first"], batch["stop"]
        wall, cpu = time.perf_counter(), time.process_time()
        row = {**self.nothing, "fault": "", "is_model": False, "span_start": int(first), "span_stop": int(stop)}
        try:
            row |= self._made(range(int(first), int(stop)))
        except Exception as error:
            kind = "" if isinstance(error, RayexpandError) else f"{type(error).__name__}: "
            row |= {"fault": f"{kind}{error} (on {socket.gethostname()})", "is_model": isinstance(error, ModelError)}
        row |= {"device": self._device, "seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        return {name: [value] for name, value in row.items()}

    @abstractmethod
    def _made(self, rows: range) -> dict[str, Any]:
        """What is made of a span. Sets `_device`."""


class FeatureActor(SpanActor):
    nothing: ClassVar[dict[str, Any]] = {"rows": b"", "features": b"", "dim": 0, "refused": "{}"}

    def __init__(self, config: FitConfig, sha256: str, intake: Intake, shelf: Any, cwd: str) -> None:
        super().__init__(shelf, cwd)
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
            index = ray.get(self._shelf.shared.remote())
            found = guide_at(config.guide, str(local(guide_model(config.guide), self._sha256, self._shelf)))
            guide = load_guide(found.weights, found.checkpoint, index.classes.name, device=config.device,
                               class_keys=index.classes.key)
            self._device = guide.device.type
            self._features = SeedFeatures(index, config.data, guide, self._intake, config.runtime.io_threads)
        return self._features
