"""The Expander over a Ray Data actor pool: one shard is one row, one block and one task.

    driver    pending shards -> waves -> map_batches(ExpandActor) -> receipts (bytes, not images)
    Office    one small actor beside the driver: who is alive, rows decided
    Shelf     another one: the model files, for nodes without them (stage.py)

A fixed pool is the demand: its pending actors make an autoscaler bring nodes, they start as nodes come, and idle ones
leave at the end. `ExpandActor.__call__` never raises: a fault of the environment is a row that says so, and a fault of
the process ends the process, whose shard Ray gives to another one. Nothing here decides what a sample is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.data
from ray.util.metrics import Counter, Histogram
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayexpand.contract.errors import EnvironmentFault, Interrupted, RayexpandError, UsageError
from rayexpand.contract.schema import Receipt
from rayexpand.on_ray.stage import open_model_server, run_models, with_local_models
from rayexpand.runs import run as runs
from rayexpand.runs.blame import ProcessFault
from rayexpand.runs.config import ClusterConfig
from rayexpand.runs.expander import Expander
from rayexpand.runs.store import Totals

HEARTBEAT_S = 5.0
SILENT_S = 30.0  # an actor that has not been heard of for so long is not counted as alive
WAITING_S = 20.0  # no actor alive for so long is said in one line, and again every ten minutes
NO_PROGRESS_S = -1  # never; Ray's default ends a run that waits half an hour for spot GPUs
FAULTS_PER_ACTOR = 3  # environment faults in a row before an actor gives up its process, and its node is named


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the Office knows: actors heard of lately, their hosts, and rows decided since the start."""

    alive: int
    hosts: int
    rows: int


@ray.remote(num_cpus=0, max_restarts=0)
class Heartbeats:
    """Beside the driver: hears from actors."""

    def __init__(self) -> None:
        self._heard: dict[str, tuple[float, str, int]] = {}

    def hear(self, actor: str, host: str, rows: int) -> None:
        self._heard[actor] = (time.monotonic(), host, rows)

    def snapshot(self) -> Snapshot:
        now = time.monotonic()
        alive = [host for at, host, _ in self._heard.values() if now - at < SILENT_S]
        return Snapshot(len(alive), len(set(alive)), sum(rows for _, _, rows in self._heard.values()))


class ExpandActor:
    """One process of the pool. Loads its Expander at the first shard, so that a bad start is a fault, not a crash."""

    def __init__(self, folder: str, attempt: int, office: Any, shelf: Any, cwd: str) -> None:
        if os.path.isdir(cwd):
            os.chdir(cwd)  # relative paths of the configuration are relative to where the driver was started
        self._folder, self._attempt, self._office, self._shelf = folder, attempt, office, shelf
        self._expander: Expander | None = None
        self._faults = self._rows = 0
        self._method = ""
        self._metrics = _metrics()
        threading.Thread(target=self._beat, daemon=True).start()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        (shard_id,), (generation,) = batch["shard"], batch["generation"]
        if self._faults == FAULTS_PER_ACTOR:
            _end_process(f"{self._faults} environment faults in a row on {socket.gethostname()}")
        receipt, fault = "", ""
        try:
            committed = self._get()(int(shard_id), int(generation))
        except ProcessFault as error:
            _end_process(str(error))
        except Exception as error:
            self._faults += 1
            kind = "" if isinstance(error, RayexpandError) else f"{type(error).__name__}: "
            fault = f"{kind}{error} (shard {shard_id} on {socket.gethostname()})"
            self._metrics["faults"].inc(1, {"method": self._method or "unknown"})
        else:
            self._faults = 0
            receipt = committed.to_json()
            self._count(committed)
        return {"receipt": [receipt], "fault": [fault]}

    def _get(self) -> Expander:
        if self._expander is None:
            run = runs.open_run(self._folder)
            self._method = run.config.method.name
            run = replace(run, config=with_local_models(run.config, run.facts["models"], self._shelf))
            self._expander = runs.expander_of(run, self._attempt, on_rows=self._heard_of)
        return self._expander

    def _heard_of(self, rows: int) -> None:
        self._rows += rows

    def _beat(self) -> None:
        me = f"{socket.gethostname()}~{os.getpid()}~{time.time()}"
        with contextlib.suppress(ray.exceptions.RayError):
            while True:
                self._office.hear.remote(me, socket.gethostname(), self._rows)
                time.sleep(HEARTBEAT_S)

    def _count(self, receipt: Receipt) -> None:
        for status in ("kept", "rejected", "failed"):
            if rows := getattr(receipt, status):
                self._metrics["images"].inc(rows, {"method": self._method, "status": status})
        self._metrics["shards"].inc(1, {"method": self._method})
        for phase, seconds in receipt.seconds.items():
            self._metrics["seconds"].observe(seconds, {"method": self._method, "phase": phase})


class RayWave:
    """Maps jobs to receipts on a Ray cluster; an ExpandWave of `run.drive`."""

    def __init__(self, run: runs.Run, attempt: int, office: Any, shelf: Any, pool: Pool) -> None:
        self._run, self._attempt, self._office, self._shelf, self._pool = run, attempt, office, shelf, pool

    def __call__(self, jobs: Sequence[runs.Job]) -> Iterator[Receipt | EnvironmentFault]:
        size = min(self._pool.actors, len(jobs))
        in_a_row = 0
        for row in self._dataset(jobs, size).iter_rows():
            if row["receipt"]:
                in_a_row = 0
                yield Receipt.from_json(row["receipt"])
                continue
            in_a_row += 1
            yield EnvironmentFault(row["fault"])
            if in_a_row >= FAULTS_PER_ACTOR * size:
                return  # every actor fails: drive() decides whether to go on

    def _dataset(self, jobs: Sequence[runs.Job], size: int) -> Any:
        pool = self._pool
        # Without the override 65 shards share a task. batch_size 1 and one task in flight: a dead node holds one shard.
        rows = ray.data.from_items([{"shard": shard, "generation": generation} for shard, generation in jobs],
                                   override_num_blocks=len(jobs))
        return rows.map_batches(
            ExpandActor, batch_size=1, num_gpus=pool.gpus or None, num_cpus=pool.cpus,
            resources=pool.resources or None, label_selector=pool.labels or None,
            compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1),
            fn_constructor_kwargs={
                "folder": str(self._run.folder), "attempt": self._attempt, "office": self._office, "shelf": self._shelf,
                "cwd": os.getcwd()})


@dataclass(frozen=True, slots=True)
class Pool:
    actors: int
    cpus: float
    gpus: float
    resources: dict[str, float]
    labels: dict[str, str]


def expand(run: runs.Run, jobs: Callable[[], list[runs.Job]], *, to_the_end: bool = False,
           on_counts: Callable[[Totals], None] = lambda counts: None,
           on_snapshot: Callable[[Snapshot], None] = lambda snapshot: None,
           say: Callable[[str], None] = lambda line: None) -> Any:
    """Drives `jobs` on Ray and returns the totals (see `run.drive`, whose errors it raises).

    `on_counts` is called after every commit, `on_snapshot` every few seconds; `say` gets a line when the cluster has no
    capacity.
    """
    with connected(run.config.cluster):
        pool = choose_pool(run.config.cluster, models=bool(run.config.method.needs() & {"prior", "guide"}))
        attempt = runs.begin(run)
        office, shelf = _open_office(), open_model_server(run_models(run.config, run.facts["models"]))
        with _watched(office, on_snapshot, say):
            wave = RayWave(run, attempt, office, shelf, pool)
            return runs.drive(run, wave, jobs, to_the_end=to_the_end, on_counts=on_counts)


@contextlib.contextmanager
def connected(cluster: ClusterConfig) -> Iterator[None]:
    """Ray, connected: to `cluster.address`, to the cluster of the job this runs in, else to one of our own.

    A local cluster of our own has its own folder and no dashboard, so that two on one machine do not meet. Raises
    UsageError when the cluster does not answer.
    """
    for name in ("ray.data", "ray._private.authentication"):
        logging.getLogger(name).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_S
    if ray.is_initialized():
        yield
        return
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    temporary = None
    if address:
        try:
            _reach(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, runtime_env=_failpoints())
        except (OSError, ray.exceptions.RayError) as error:
            raise UsageError(
                f"cluster.address: no Ray cluster answers at {address} ({type(error).__name__}: {error}). Start one "
                "with `ray start --head`, correct the address, give this user the cluster's token "
                "(RAY_AUTH_MODE=token and ~/.ray/auth_token), or add --no-ray to run in this process.") from error
    else:
        temporary = tempfile.mkdtemp(prefix="rx-")  # short: sockets below it have a length limit
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING,
                 _temp_dir=temporary)
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)  # ray.init sets its own, which would lose our exit code
    try:
        yield
    except SystemError as error:
        raise _stopped(error) or error from error
    finally:
        ray.shutdown()
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def _stopped(error: SystemError) -> Interrupted | None:
    """The Interrupted of a signal handler, which leaves Ray's compiled code wrapped in a SystemError."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, Interrupted):
        cause = cause.__cause__ or cause.__context__
    return cause


def choose_pool(cluster: ClusterConfig, *, models: bool) -> Pool:
    """How many actors of which size. What is not configured follows from the cluster as it is now; `models`: the
    actors hold models, so they want GPUs where there are any.

    Raises UsageError when no number is given and the cluster has no room for a single actor yet.
    """
    total = ray.cluster_resources()
    on_gpu = models and total.get("GPU", 0) > 0
    gpus = float(on_gpu) if cluster.gpus_per_actor is None else cluster.gpus_per_actor
    wants = {"CPU": cluster.cpus_per_actor, "GPU": gpus, **cluster.resources}
    room = min((int(total.get(name, 0) / amount) for name, amount in wants.items() if amount), default=1)
    actors = cluster.actors or room
    if actors < 1:
        raise UsageError(f"cluster.actors: this cluster has no room for an actor of {wants} yet ({dict(total)}). Set "
                         "cluster.actors to the number you want an autoscaler to bring, or ask for less per actor.")
    return Pool(actors, cluster.cpus_per_actor, gpus, dict(cluster.resources), dict(cluster.label_selector))


def _open_office() -> Any:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Heartbeats.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


@contextlib.contextmanager
def _watched(office: Any, on_snapshot: Callable[[Snapshot], None], say: Callable[[str], None]) -> Iterator[None]:
    stop = threading.Event()

    def watch() -> None:
        last_alive, next_word = time.monotonic(), WAITING_S
        while not stop.wait(2.0):
            try:
                snapshot = ray.get(office.snapshot.remote(), timeout=10)
            except ray.exceptions.RayError:
                continue  # the Office is starting, or the driver ends and so does the watch
            on_snapshot(snapshot)
            now = time.monotonic()
            if snapshot.alive:
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


def _reach(address: str) -> None:
    """Raises OSError at once where nothing listens; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _failpoints() -> dict[str, Any]:
    """Failpoints of the driver hold in the actors of a cluster that is already up (tests)."""
    found = {name: value for name, value in os.environ.items() if name.startswith("RAYEXPAND_FAILPOINT")}
    return {"env_vars": found} if found else {}


def _end_process(why: str) -> None:
    print(f"rayexpand actor ends: {why}", file=sys.stderr, flush=True)  # noqa: T201  (the actor's own log)
    os._exit(1)


def _metrics() -> dict[str, Any]:
    return {"images": Counter("rayexpand_images", "Rows decided.", ("method", "status")),
            "shards": Counter("rayexpand_shards_committed", "Shards committed.", ("method",)),
            "faults": Counter("rayexpand_environment_faults", "Shards given back, the place at fault.", ("method",)),
            "seconds": Histogram("rayexpand_shard_seconds", "Seconds of a shard by phase.",
                                 boundaries=[0.1, 1, 10, 60, 300, 1800], tag_keys=("method", "phase"))}


