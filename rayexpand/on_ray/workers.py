"""Ray Train workers of one training: started again whenever a node of theirs is lost, and what they tell each other."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from rayexpand.on_ray.pool import beside_driver
from rayexpand.on_ray.preemption import DEATH_S, LOST_NODES, NOTICE_S, any_lost, is_lost

LAST_S = 8.0  # before a node goes, the last checkpoint of its training is due
START_S = 1800  # workers may wait so long for nodes, which an autoscaler is asked for, before they are asked for anew


def train_on_workers(work: Callable[[dict[str, Any]], None], config: dict[str, Any], *, workers: int, cpus: float,
                     gpus: float, where: Mapping[str, Any], name: str, place: str, most: int,
                     is_refused: Callable[[], bool]) -> None:
    """Runs `work(config)` on Ray Train workers to the end. `where`: see pool.place_of; `place`: where Ray Train keeps
    notes of its own.

    The workers are started again after up to `most` failures, and whenever a node of theirs was lost. Raises
    WorkerGroupError for what failed more often, and at once where `is_refused` says that no new attempt can mend it.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchTrainer

    os.environ.update(RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S=str(START_S),
                      RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S=str(NOTICE_S))
    resources = {"CPU": cpus, **({"GPU": gpus} if gpus else {}), **where["resources"]}
    labels: Any = {"label_selector": where["label_selector"] or None}
    failures = lost = 0
    while True:
        nodes = beside_driver(_Nodes)
        try:
            TorchTrainer(
                _work_on, train_loop_config={"work": work, "config": config, "nodes": nodes},
                scaling_config=ScalingConfig(num_workers=workers, use_gpu=bool(gpus),
                                             resources_per_worker=resources, **labels),
                run_config=RunConfig(name=name, storage_path=place, failure_config=FailureConfig(max_failures=0))).fit()
            return
        except WorkerGroupError as error:
            if is_refused():
                raise
            if _lost_a_node(error, nodes):
                lost += 1
            else:
                failures += 1
            if failures > most or lost > LOST_NODES:
                raise


def _work_on(config: dict[str, Any]) -> None:
    ray.get(config["nodes"].add.remote(ray.get_runtime_context().get_node_id()))
    config["work"](config["config"])


@ray.remote(num_cpus=0, max_restarts=0)
class _Nodes:
    """Where the workers of one attempt are."""

    def __init__(self) -> None:
        self._nodes: set[str] = set()

    def add(self, node: str) -> None:
        self._nodes.add(node)

    def all(self) -> list[str]:
        return sorted(self._nodes)


def _lost_a_node(error: Any, nodes: Any) -> bool:
    """Whether workers failed because a node of theirs is gone. Those on other nodes fail first, with a broken
    connection, and Ray knows of the node some seconds later."""
    failures = list(error.worker_failures.values())
    if any(is_lost(one) for one in failures):
        return True
    died = any(isinstance(one, ray.exceptions.ActorDiedError) for one in failures)
    return any_lost(ray.get(nodes.all.remote()), within_s=0 if died else DEATH_S)


class Notices:
    """When workers of a training keep one more checkpoint, because nodes of theirs will be taken away: asked by each
    after every step. True at a new notice, and once more LAST_S before the node goes. Ray is asked at the same steps by
    all, about every NOTICE_S seconds."""

    def __init__(self, device: Any) -> None:
        self._device, self._steps, self._since, self._known = device, 0, time.perf_counter(), None
        self._next, self._is_last = 1, True

    def __call__(self) -> bool:
        from ray.train import get_preemption_info

        self._steps += 1
        if self._steps < self._next:
            return False
        (seconds,) = mean_over_workers([(time.perf_counter() - self._since) / self._steps], self._device)
        self._next = max(1, int(NOTICE_S / seconds))
        self._steps, self._since = 0, time.perf_counter()
        before, self._known = self._known, get_preemption_info()
        if self._known is None:
            return False
        if self._known != before:
            self._is_last = not self._known.deadline_ms
            return True
        if self._is_last:
            return False
        (left,) = mean_over_workers([self._known.deadline_ms / 1000 - time.time()], self._device)
        self._is_last = left < LAST_S
        return self._is_last


def mean_over_workers(values: Sequence[float], device: Any) -> list[float]:
    """The mean over the workers of a training of each number; every worker must call it."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(values)
    total = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return [float(one) / dist.get_world_size() for one in total]
