"""When real runs end whose nodes are killed and replaced, beside what the simulation of `plan` says (runs/fleet.py).

    python -m tests.benchmarks.fleet --nodes 3 --life 100 --seeds 301 302 303 304 305

A Ray cluster of several nodes on this machine, one sleeping sampler on each. A calm run gives the seconds of a node's
start, of loading and of a shard. Then each seed kills nodes after the lives that the simulation draws with it, and
brings another one after a pause. Prints one JSON line for the calm run and one for each seed: seconds of the run,
`blind` is what the simulation says that was told the calm run alone, and `simulated` what it says with the mean seconds
of start and loading in that very run, which on a machine with other work are not those of the calm one.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"RAY_AUTH_MODE": "token", "RAY_worker_niceness": "0"}  # before ray is imported

import numpy as np
import ray
from ray.cluster_utils import Cluster

from rayexpand.contract.protocols import Batch, Expansion, Tools
from rayexpand.on_ray.expand import expand
from rayexpand.on_ray.pool import connected
from rayexpand.runs import run as runs
from rayexpand.runs.config import RunConfig
from rayexpand.runs.fleet import Fleet, lives, simulate
from tests.benchmarks.orchestration import run_config, write_seeds
from tests.methods.fakes import Sleeping
from tests.on_ray.conftest import ensure_token

TRIED = 3  # nodes that are brought after the calm run, to time it
IMAGES = 10  # of a shard, one in a call


class Noting(Sleeping):
    """Notes in a folder when a process first samples."""

    notes: str

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        file = Path(self.notes, str(os.getpid()))
        if not file.exists():
            file.write_text(str(time.time()))
        return super().expand(batch, tools)


class Ran(NamedTuple):
    seconds: float  # from the first task to the last commit
    first: float  # of them, to the first commit
    losses: int
    bringing: list[float]  # seconds of each new node, the pause included
    loading: list[float]  # seconds from a node that is up to its first sampler call


def measure(nodes: int, life: float, pause: float, shards: int, shard_s: float,
            seeds: list[int], below: float) -> Iterator[dict[str, Any]]:
    """What the calm run says, then a line for each seed."""
    calm = real(Fleet(nodes), 0, pause, shards, shard_s, below)
    overhead = max(0.0, (calm.seconds - calm.first) / (-(-shards // nodes) - 1) - shard_s)
    told = Fleet(nodes, 1, 3600 / life, float(np.mean(calm.bringing)), float(np.mean(calm.loading)), overhead, 1e9)
    yield {"nodes": nodes, "life_s": life, "pause_s": pause, "shards": shards, "shard_s": shard_s,
           "calm_s": round(calm.seconds, 1), "overhead_s": round(overhead, 3), **_rounded(told)}
    for seed in seeds:
        made = real(told, seed, pause, shards, shard_s, below)
        then = replace(told, node_start_s=float(np.mean(made.bringing or [told.node_start_s])),
                       load_s=float(np.mean(made.loading)))
        blind, said = _said(told, shards, shard_s, seed), _said(then, shards, shard_s, seed)
        yield {"seed": seed, "losses": made.losses, "seconds": round(made.seconds, 1), "blind": round(blind, 1),
               "over_blind": round(made.seconds / blind, 3), **_rounded(then), "simulated": round(said, 1),
               "over_simulated": round(made.seconds / said, 3)}


def _rounded(fleet: Fleet) -> dict[str, float]:
    return {"node_start_s": round(fleet.node_start_s, 1), "load_s": round(fleet.load_s, 1)}


def _said(fleet: Fleet, shards: int, shard_s: float, seed: int) -> float:
    """Seconds from the first task, for the nodes are up before."""
    return 3600 * simulate(np.full(shards, shard_s), fleet, seed).wall_hours - fleet.node_start_s


def real(fleet: Fleet, seed: int, pause: float, shards: int, shard_s: float, below: float = math.inf) -> Ran:
    """A run on a cluster of its own, whose nodes live as `fleet` says, once the machine's load is below a limit."""
    ensure_token()
    while os.getloadavg()[0] >= below:
        time.sleep(5)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False,
                                                           "object_store_memory": 150_000_000})
    try:
        up = [_add(cluster) for _ in range(fleet.gpus)]
        cluster.wait_for_nodes()
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as notes:
            config: RunConfig = run_config(
                folder, write_seeds(folder, shards), ratio=IMAGES, batch=1, shard_images=IMAGES, actors=fleet.gpus,
                method={"name": "tests.benchmarks.fleet.Noting", "seconds": shard_s / IMAGES, "notes": notes},
                cluster={"address": cluster.address, "resources": {"sampler": 1}})
            return _drive(cluster, runs.prepare(config, device_here=False), up, fleet, seed, pause, Path(notes))
    finally:
        ray.shutdown()
        cluster.shutdown()


def _drive(cluster: Cluster, run: runs.Run, up: list[Any], fleet: Fleet, seed: int, pause: float,
           notes: Path) -> Ran:
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
        start, ups = time.perf_counter(), [time.time()] * fleet.gpus
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
                    ups.append(time.time())
                    heapq.heappush(events, (time.perf_counter() + next(drawn[node]), "kill", node))
            time.sleep(0.05)
        done.result()
    for node in () if fleet.loss_rate else range(TRIED):
        cluster.remove_node(up[node % fleet.gpus], allow_graceful=False)
        gone = time.perf_counter()
        time.sleep(pause)
        up[node % fleet.gpus] = _add(cluster)
        bringing.append(time.perf_counter() - gone)
    return Ran(commits[-1] - start, commits[0] - start, losses, bringing, _loading(ups, notes))


def _loading(ups: list[float], notes: Path) -> list[float]:
    """Each process that sampled was begun on the last node that came up before, of those without one; one that Ray
    began again on the same node counts for none."""
    found = []
    for first in sorted(float(file.read_text()) for file in notes.iterdir()):
        if before := [up for up in ups if up < first]:
            ups.remove(max(before))
            found.append(first - max(before))
    return found


def _add(cluster: Cluster) -> Any:
    """A node, asked for again where the machine was too busy for one to start within Ray's half minute."""
    while True:
        try:
            return cluster.add_node(num_cpus=1, object_store_memory=80_000_000, resources={"sampler": 1})
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--life", type=float, default=100, help="mean seconds that a node is up")
    parser.add_argument("--pause", type=float, default=15, help="seconds from a loss to asking for another node")
    parser.add_argument("--shards", type=int, default=36)
    parser.add_argument("--shard-s", type=float, default=15, help="seconds that a shard sleeps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[301, 302, 303, 304, 305])
    parser.add_argument("--below", type=float, default=math.inf, help="begin each run when the load is below this")
    given = parser.parse_args()
    for line in measure(given.nodes, given.life, given.pause, given.shards, given.shard_s, given.seeds,
                        given.below):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
