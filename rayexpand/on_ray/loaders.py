"""Loaders of a training worker: processes beside it that make its rows of the next steps, in order.

Each worker starts its own pool, for Ray's streaming_split hands rows to any worker. A loader makes a span of steps per
task and its rows carry the CPU seconds they cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data._internal.execution.operators import actor_pool_map_operator

from rayexpand.on_ray.pool import NO_PROGRESS_S

SPAN_IMAGES = 2048  # images one loader task makes; long beside the 10-30 ms a task costs
SEGMENT = 1000  # loader tasks of one Ray dataset

Columns = dict[str, np.ndarray]  # of the rows of one step


@dataclass
class LoaderTime:
    """CPU seconds that the loaders of this worker spent, since it started."""

    seconds: float = 0.0


def spans_of(start: int, stop: int, steps: int) -> list[tuple[int, int]]:
    """Steps `start` to `stop`, cut into tasks of `steps`."""
    return [(first, min(first + steps, stop)) for first in range(start, stop, steps)]


def loaded_steps(loader: type, arguments: Mapping[str, Any], spans: Sequence[tuple[int, int]], *, processes: int,
                 rows: int, spent: LoaderTime) -> Iterator[Columns]:
    """The columns of each step of `spans`, `rows` rows each, made by `loader(**arguments)` in that many processes."""
    for at in range(0, len(spans), SEGMENT):
        for batch in _dataset(loader, arguments, spans[at:at + SEGMENT], processes).iter_batches(
                batch_size=rows, batch_format="numpy", prefetch_batches=2):
            spent.seconds += float(batch["cpu_seconds"].sum())
            yield batch


def timed_steps(batch: Mapping[str, Any], make: Callable[[int, int], Iterator[tuple[int, Columns]]],
                ) -> Iterator[Columns]:
    """What a loader answers to a task: the columns of `make(first, stop)`, which yields (step, columns), with the step
    and the CPU seconds of each row."""
    for first, stop in zip(batch["first"], batch["stop"], strict=True):
        before = time.process_time()
        for step, columns in make(int(first), int(stop)):
            rows, now = len(next(iter(columns.values()))), time.process_time()
            each, before = (now - before) / rows, now
            yield {**columns, "step": np.full(rows, step), "cpu_seconds": np.full(rows, each)}


def _dataset(loader: type, arguments: Mapping[str, Any], spans: Sequence[tuple[int, int]], processes: int) -> Any:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_S  # workers have a context of their own
    context.execution_options.preserve_order = True
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    items = ray.data.from_items([{"first": first, "stop": stop} for first, stop in spans],
                                override_num_blocks=len(spans))
    _load_to_the_end()
    # CPUs are reserved by the worker the loaders serve: a share for each would deadlock workers that fill the cluster
    return items.map_batches(
        loader, batch_size=1, num_cpus=0, label_selector=here, fn_constructor_kwargs=dict(arguments),
        compute=ray.data.ActorPoolStrategy(size=min(processes, len(spans)), max_tasks_in_flight_per_actor=2))


def _load_to_the_end() -> None:
    """Ray Data gives actors of a node that will be taken away nothing more to do. Loaders serve a worker on their own
    node, which trains until that is gone, so in the process of a worker no node counts as one that goes."""
    pools: Any = actor_pool_map_operator
    pools.get_draining_nodes = dict
