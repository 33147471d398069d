"""Metrics of this process on the endpoint of its Ray node, with `ray_` before their names."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge

from rayexpand.contract.metrics import PREEMPTIONS, PREFIX, Metric, is_published, publish_to, record

NODES_S = 5.0  # between two looks at the nodes of the cluster
REPEAT_S, GAUGE_S = 5.0, 300.0  # Ray forgets a gauge that is not set for 20 s; here it is repeated so long
IDLE = 4  # Ray's NodeDeathInfo.AUTOSCALER_DRAIN_IDLE: nobody took it away
_KINDS = {"counter": Counter, "gauge": Gauge}  # no histogram: Ray's sums are those of bucket middles (measured)


def publish_on_ray() -> None:
    """Tells Ray what this process counts; see contract.metrics."""
    made: dict[str, Any] = {}
    gauges: dict[tuple[str, tuple[str, ...]], tuple[float, float]] = {}  # value, and when it was set

    def sink(metric: Metric, value: float, labels: dict[str, str]) -> None:
        if metric.name not in made:
            made[metric.name] = _KINDS[metric.kind](PREFIX + metric.name, metric.text, metric.labels)
        if metric.kind == "gauge":
            made[metric.name].set(value, labels)
            gauges[metric.name, tuple(labels.values())] = value, time.monotonic()
        elif value > 0:  # Ray refuses to add nothing
            made[metric.name].inc(value, labels)

    def repeat() -> None:
        while is_published("ray", sink):
            for (name, values), (value, at) in tuple(gauges.items()):
                if time.monotonic() - at < GAUGE_S:
                    made[name].set(value, dict(zip(made[name].info["tag_keys"], values, strict=True)))
            time.sleep(REPEAT_S)

    publish_to("ray", sink)
    threading.Thread(target=repeat, daemon=True, name="gauges").start()


publish_once = cache(publish_on_ray)  # of a worker, which serves one cluster


@contextlib.contextmanager
def published() -> Iterator[None]:
    """Of a driver while it is connected: it also counts the nodes that are taken away."""
    publish_on_ray()
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(stop,), daemon=True, name="nodes")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=NODES_S)
        publish_to("ray", None)


def _watch(stop: threading.Event) -> None:
    alive: set[str] = set()
    while not stop.wait(NODES_S):
        try:
            nodes = ray.nodes()
        except (ray.exceptions.RayError, RuntimeError, OSError):
            continue  # the head is away, or the driver ends and so does the watch
        lost = lost_of(alive, nodes)
        alive = {one["NodeID"] for one in nodes if one["Alive"]}
        if lost:
            record(PREEMPTIONS, lost)


def lost_of(alive: set[str], nodes: list[dict[str, Any]]) -> int:
    """How many nodes that were alive are dead, and not because nobody used them."""
    return sum(one["NodeID"] in alive and not one["Alive"] and one.get("DeathReason") != IDLE for one in nodes)
