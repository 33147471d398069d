"""The Expander over a Ray Data actor pool: one shard is one row, one block and one task.

    driver    pending shards -> waves -> map_batches(ExpandActor) -> receipts (bytes, not images)
    Heartbeats    one small actor beside the driver: who is alive and on which node, rows decided
    ModelServer   another one: the model files, for nodes without them (stage.py)

A fixed pool is the demand: its pending actors make an autoscaler bring nodes, they start as nodes come, and idle ones
leave at the end. On a node that will be taken away an actor gets no more shards (Ray Data sees to that); it finishes
the one in work if there is time, and ends, so that a place elsewhere is asked for while the node is still there.

`ExpandActor.__call__` never raises: a fault of the environment is a row that says so, and a fault of
the process ends the process, whose shard Ray gives to another one. Nothing here decides what a sample is.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from rayexpand.contract import log_lines
from rayexpand.contract.errors import EnvironmentFault, packed, unpacked
from rayexpand.contract.schema import Receipt
from rayexpand.on_ray.pool import Pool, any_starting, beside_driver, choose_pool, connected, ending, enter
from rayexpand.on_ray.preemption import Leaving, staying_nodes
from rayexpand.on_ray.stage import open_model_server, run_models, with_local_models
from rayexpand.runs import run as runs
from rayexpand.runs.blame import ProcessFault
from rayexpand.runs.config import MODELS
from rayexpand.runs.driving import Listener, RunProgress, jobs_of
from rayexpand.runs.expander import Expander
from rayexpand.runs.store import Totals
from rayexpand.storage.files import process_token

HEARTBEAT_S = 5.0
SILENT_S = 30.0  # an actor that has not been heard of for so long is not counted as alive
WAITING_S = 20.0  # no actor alive or starting for so long is said in one line, and again every ten minutes
FAULTS_PER_ACTOR = 3  # environment faults in a row before an actor gives up its process, and its node is named


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What Heartbeats knows: actors heard of lately, their hosts, and rows decided since the start."""

    alive: int
    hosts: int
    rows: int


@ray.remote(num_cpus=0, max_restarts=0)
class Heartbeats:
    """Beside the driver: hears from actors, by the token of their process."""

    def __init__(self) -> None:
        self._heard: dict[str, tuple[float, str, int]] = {}
        self._nodes: dict[str, str] = {}

    def hear(self, actor: str, host: str, node: str, rows: int) -> None:
        self._heard[actor], self._nodes[actor] = (time.monotonic(), host, rows), node

    def lost(self, actors: set[str]) -> set[str]:
        """Those of this attempt whose node is gone, or will be."""
        there = staying_nodes()
        return {one for one in actors & self._nodes.keys() if self._nodes[one] not in there}

    def snapshot(self) -> Snapshot:
        now = time.monotonic()
        alive = [host for at, host, _ in self._heard.values() if now - at < SILENT_S]
        return Snapshot(len(alive), len(set(alive)), sum(rows for _, _, rows in self._heard.values()))


class ExpandActor:
    """One process of the pool. Loads its Expander at the first shard, so that a bad start is a fault, not a crash."""

    def __init__(self, folder: str, attempt: int, heartbeats: Any, server: Any, cwd: str) -> None:
        enter(cwd)
        log_lines.bind(run=folder.rstrip("/").rpartition("/")[2], attempt=attempt)
        self._folder, self._attempt, self._heartbeats, self._server = folder, attempt, heartbeats, server
        self._expander: Expander | None = None
        self._work: _Work | None = None
        self._faults = self._rows = 0
        threading.Thread(target=self._beat, daemon=True).start()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        (shard_id,), (generation,) = batch["shard"], batch["generation"]
        if self._faults == FAULTS_PER_ACTOR:
            _end_process(f"{self._faults} environment faults in a row on {socket.gethostname()}")
        receipt, fault = "", ""
        self._work = _Work(int(shard_id))
        try:
            committed = self._get()(int(shard_id), int(generation))
        except ProcessFault as error:
            _end_process(str(error))
        except Exception as error:
            self._faults += 1
            fault = packed(error, f"shard {shard_id} on {socket.gethostname()}")
        else:
            self._faults = 0
            receipt = committed.to_json()
        self._work = None
        return {"receipt": [receipt], "fault": [fault], "shard": [int(shard_id)]}

    def _get(self) -> Expander:
        if self._expander is None:
            run = runs.open_run(self._folder)
            run = replace(run, config=with_local_models(run.config, run.facts["models"], self._server))
            self._expander = runs.expander_of(
                run, self._attempt, on_rows=self._heard_of,
                lost=lambda tokens: ray.get(self._heartbeats.lost.remote(tokens)))
        return self._expander

    def _heard_of(self, rows: int) -> None:
        self._rows += rows
        if self._work is not None:
            self._work.heard(rows)

    def _beat(self) -> None:
        me, host, leaving = process_token(), socket.gethostname(), Leaving()
        with contextlib.suppress(ray.exceptions.RayError):
            while True:
                self._heartbeats.hear.remote(me, host, leaving.node, self._rows)
                if (deadline := leaving.deadline()) is not None and not self._finishes(deadline):
                    if self._expander is not None:
                        self._expander.blame.withdraw()
                    _end_process(f"its node {leaving.node} will be taken away")
                time.sleep(HEARTBEAT_S)

    def _finishes(self, deadline: float) -> bool:
        """Whether a shard is in work and can be committed before the deadline (0: unknown), as far as one can tell."""
        work, expander = self._work, self._expander
        if work is None:
            return False
        if not deadline or expander is None or (seconds := work.seconds_each()) is None:
            return True
        planned = sum(map(len, expander.plan.units(work.shard)))
        return time.time() + seconds * (planned - work.rows) + HEARTBEAT_S < deadline


class _Work:
    """How far the shard in work is."""

    def __init__(self, shard: int) -> None:
        self.shard, self.rows = shard, 0
        self._first: tuple[float, int] | None = None  # when the first rows were decided: models are loaded by then

    def heard(self, rows: int) -> None:
        self.rows += rows
        self._first = self._first or (time.monotonic(), self.rows)

    def seconds_each(self) -> float | None:
        """Of a row; None before there is a measure."""
        if self._first is None or self.rows <= self._first[1]:
            return None
        return (time.monotonic() - self._first[0]) / (self.rows - self._first[1])


class RayWave:
    """Maps jobs to receipts on a Ray cluster; an ExpandWave of `run.drive`."""

    def __init__(self, run: runs.Run, attempt: int, heartbeats: Any, server: Any, pool: Pool) -> None:
        self._run, self._attempt, self._heartbeats, self._server, self._pool = run, attempt, heartbeats, server, pool

    def __call__(self, jobs: Sequence[runs.Job]) -> Iterator[Receipt | EnvironmentFault]:
        items = [{"shard": shard, "generation": generation} for shard, generation in jobs]
        arguments = {"folder": str(self._run.folder), "attempt": self._attempt, "heartbeats": self._heartbeats,
                     "server": self._server}
        in_a_row = 0
        for row in self._pool.map(items, ExpandActor, arguments, in_flight=1).iter_rows():
            if row["receipt"]:
                in_a_row = 0
                yield Receipt.from_json(row["receipt"])
                continue
            fault = unpacked(row["fault"])
            if not isinstance(fault, EnvironmentFault):
                raise fault
            in_a_row += 1
            log_lines.say("fault", shard=int(row["shard"]), message=str(fault))
            yield fault
            if in_a_row >= FAULTS_PER_ACTOR * self._pool.actors:
                return  # every actor fails: drive() decides whether to go on


def expand(run: runs.Run, jobs: Callable[[], list[runs.Job]], *, to_the_end: bool = False,
           on_commit: runs.OnCommit = lambda counts, receipt: None,
           on_snapshot: Callable[[Snapshot], None] = lambda snapshot: None,
           say: Callable[[str], None] = lambda line: None) -> Any:
    """Drives `jobs` on Ray and returns the totals (see `run.drive`, whose errors it raises).

    `on_commit` is called after every commit, `on_snapshot` every few seconds; `say` gets a line when the cluster has no
    capacity.
    """
    with connected(run.config.cluster):
        device = run.config.prior.device if run.config.needs & MODELS else "cpu"
        pool = choose_pool(run.config.cluster.at("expand"), device)
        attempt = runs.begun(run).attempt
        models = run_models(run.config, run.facts["models"])
        with (ending(beside_driver(Heartbeats)) as heartbeats, ending(open_model_server(models)) as server,
              _watched(heartbeats, on_snapshot, say)):
            wave = RayWave(run, attempt, heartbeats, server, pool)
            return runs.drive(run, wave, jobs, to_the_end=to_the_end, on_commit=on_commit)


def drive_on_ray(run: runs.Run, progress: Listener, *, retry: bool = False) -> Totals:
    """A Driver on the cluster of the run."""
    heard = RunProgress(run, progress, retry=retry)

    def snapshot(now: Snapshot) -> None:
        heard.actors(now.alive, now.hosts, now.rows)

    return heard.ended(expand(run, jobs_of(run, retry=retry), to_the_end=retry, on_commit=heard.committed,
                              on_snapshot=snapshot, say=heard.say))


@contextlib.contextmanager
def _watched(heartbeats: Any, on_snapshot: Callable[[Snapshot], None], say: Callable[[str], None]) -> Iterator[None]:
    stop = threading.Event()

    def watch() -> None:
        last_alive, next_word = time.monotonic(), WAITING_S
        while not stop.wait(2.0):
            try:
                snapshot = ray.get(heartbeats.snapshot.remote(), timeout=10)
                in_work = snapshot.alive or any_starting()
            except ray.exceptions.RayError:
                continue  # the actor is starting, or the driver ends and so does the watch
            on_snapshot(snapshot)
            now = time.monotonic()
            if in_work:
                last_alive, next_word = now, WAITING_S
            elif now - last_alive > next_word:
                say(f"waiting for capacity: no actor has been alive for {now - last_alive:.0f} s")
                next_word += 600

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)


def _end_process(why: str) -> None:
    print(f"rayexpand actor ends: {why}", file=sys.stderr, flush=True)  # noqa: T201  (the actor's own log)
    os._exit(1)
