"""When real runs end whose nodes are killed and replaced, beside what the simulation of `plan` says (runs/fleet.py).

    python -m tests.benchmarks.fleet --nodes 4 --life 60 --seeds 1 2 3 4 5

A Ray cluster of several nodes on this machine, one sleeping sampler on each. A calm run gives the seconds of loading
and of a shard, and of bringing a node; that is all the simulation is told. Then each seed kills nodes after the lives
that the simulation draws with it, and brings another one after a pause. Prints one JSON line for the calm run and one
for each seed: seconds beside the simulated ones, and those simulated with the seconds that bringing a node took in
that very run.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

os.environ["RAY_AUTH_MODE"] = "token"  # before ray is imported

import numpy as np
import ray
from ray.cluster_utils import Cluster

from rayexpand.on_ray.expand import expand
from rayexpand.on_ray.pool import connected
from rayexpand.runs import run as runs
from rayexpand.runs.config import RunConfig
from rayexpand.runs.fleet import Fleet, lives, simulate
from tests.benchmarks.orchestration import run_config, write_seeds
from tests.on_ray.conftest import ensure_token


class Ran(NamedTuple):
    seconds: float  # from the first task to the last commit
    first: float  # of them, to the first commit
    losses: int
    bringing: list[float]  # seconds of each new node, the pause included


TRIED = 3  # nodes that are brought after the calm run, to time it


def measure(nodes: int, life: float, pause: float, shards: int, shard_s: float,
            seeds: list[int]) -> Iterator[dict[str, Any]]:
    """What was told, then a line for each seed."""
    calm = real(Fleet(nodes), 0, pause, shards, shard_s)
    overhead = max(0.0, (calm.seconds - calm.first) / (-(-shards // nodes) - 1) - shard_s)
    told = Fleet(nodes, 1, 3600 / life, float(np.mean(calm.bringing)), calm.first - shard_s - overhead, overhead, 1e9)
    yield {"nodes": nodes, "life_s": life, "pause_s": pause, "shards": shards, "shard_s": shard_s,
           "calm_s": round(calm.seconds, 1), "load_s": round(told.load_s, 2), "overhead_s": round(overhead, 3),
           "node_start_s": round(told.node_start_s, 1)}
    for seed in seeds:
        made = real(told, seed, pause, shards, shard_s)
        said = _said(told, shards, shard_s, seed)
        then = replace(told, node_start_s=float(np.mean(made.bringing or [told.node_start_s])))
        yield {"seed": seed, "losses": made.losses, "seconds": round(made.seconds, 1), "simulated": round(said, 1),
               "ratio": round(made.seconds / said, 3), "node_start_s": round(then.node_start_s, 1),
               "simulated_with_it": round(_said(then, shards, shard_s, seed), 1)}


def _said(fleet: Fleet, shards: int, shard_s: float, seed: int) -> float:
    """Seconds from the first task, for the nodes are up before."""
    return 3600 * simulate(np.full(shards, shard_s), fleet, seed).wall_hours - fleet.node_start_s


def real(fleet: Fleet, seed: int, pause: float, shards: int, shard_s: float) -> Ran:
    """A run on a cluster of its own, whose nodes live as `fleet` says."""
    ensure_token()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False,
                                                           "object_store_memory": 150_000_000})
    try:
        up = [_add(cluster) for _ in range(fleet.gpus)]
        cluster.wait_for_nodes()
        with tempfile.TemporaryDirectory() as folder:
            config: RunConfig = run_config(
                folder, write_seeds(folder, shards), ratio=10, batch=10, shard_images=10, actors=fleet.gpus,
                method={"name": "tests.methods.fakes.Sleeping", "seconds": shard_s / 10},
                cluster={"address": cluster.address, "resources": {"sampler": 1}})
            return _drive(cluster, runs.prepare(config, device_here=False), up, fleet, seed, pause)
    finally:
        ray.shutdown()
        cluster.shutdown()


def _drive(cluster: Cluster, run: runs.Run, up: list[Any], fleet: Fleet, seed: int, pause: float) -> Ran:
    """Kills and brings nodes in this thread, as Ray wants it, while another one drives."""
    drawn = [lives(fleet, node, seed, 0) for node in range(fleet.gpus)]
    commits: list[float] = []
    losses, bringing = 0, []
    with connected(run.config.cluster), ThreadPoolExecutor(1) as pool:
        began = threading.Event()

        def jobs() -> list[runs.Job]:
            began.set()
            return runs.pending_jobs(run)

        done: Future[Any] = pool.submit(expand, run, jobs, on_commit=lambda *_: commits.append(time.perf_counter()))
        began.wait()
        start = time.perf_counter()
        events = [(start + next(drawn[node]), "kill", node) for node in range(fleet.gpus)]
        heapq.heapify(events)
        killed: dict[int, float] = {}
        while not done.done():
            if events and events[0][0] <= time.perf_counter():
                _, what, node = heapq.heappop(events)
                if what == "kill":
                    cluster.remove_node(up[node], allow_graceful=False)
                    losses, killed[node] = losses + 1, time.perf_counter()
                    heapq.heappush(events, (killed[node] + pause, "bring", node))
                else:
                    up[node] = _add(cluster)
                    bringing.append(time.perf_counter() - killed[node])
                    heapq.heappush(events, (time.perf_counter() + next(drawn[node]), "kill", node))
            time.sleep(0.05)
        done.result()
    for node in () if fleet.loss_rate else range(TRIED):
        cluster.remove_node(up[node % fleet.gpus], allow_graceful=False)
        gone = time.perf_counter()
        time.sleep(pause)
        up[node % fleet.gpus] = _add(cluster)
        bringing.append(time.perf_counter() - gone)
    return Ran(commits[-1] - start, commits[0] - start, losses, bringing)


def _add(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=80_000_000, resources={"sampler": 1})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--life", type=float, default=60, help="mean seconds that a node is up")
    parser.add_argument("--pause", type=float, default=10, help="seconds from a loss to asking for another node")
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--shard-s", type=float, default=4, help="seconds that a shard sleeps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    given = parser.parse_args()
    for line in measure(given.nodes, given.life, given.pause, given.shards, given.shard_s, given.seeds):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
