"""Ray, connected, and pools of actors: what every verb on Ray is built from.

Workers start in the folder of the driver, where it exists on their node, so that relative paths of a configuration
mean the same everywhere. An error crosses to the driver with its class, as one JSON line.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayexpand.contract.errors import (
    EnvironmentFault,
    ProgramFault,
    RayexpandError,
    Stopped,
    UsageError,
    packed,
    unpacked,
)
from rayexpand.contract.log_lines import VARIABLE, json_worker
from rayexpand.methods import TRUSTED
from rayexpand.on_ray.metrics import publish_once, published
from rayexpand.runs.config import ClusterConfig
from rayexpand.storage.files import process_token, token_alive

NO_PROGRESS_S = -1  # never; Ray's default ends a run that waits half an hour for spot GPUs
NODE_GPUS = "RAYEXPAND_NODE_GPUS"  # of a node that an autoscaler would bring; set on the head
WAVE = 10_000  # items handed to Ray Data at once

log = logging.getLogger(__name__)


def place_of(cluster: ClusterConfig) -> dict[str, Any]:
    """What a node must have, as options of a task."""
    return {"resources": cluster.resources, "label_selector": cluster.label_selector}


@dataclass(frozen=True, slots=True)
class Pool:
    """How many actors of which size."""

    actors: int
    cpus: float
    gpus: float
    resources: dict[str, float]
    labels: dict[str, str]

    def map(self, items: Sequence[Mapping[str, Any]] | ray.data.Dataset, actor: type, arguments: Mapping[str, Any], *,
            in_flight: int = 2) -> ray.data.Dataset:
        """What `actor(**arguments, cwd=...)` makes of each item, one item a task, in any order. `in_flight`: tasks an
        actor holds at a time; a dead node loses so many."""
        rows = items if isinstance(items, ray.data.Dataset) else of_items(items)
        size = self.actors if isinstance(items, ray.data.Dataset) else min(self.actors, len(items))
        return rows.map_batches(
            actor, batch_size=1, num_cpus=self.cpus, num_gpus=self.gpus or None, resources=self.resources or None,
            label_selector=self.labels or None,
            compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=in_flight),
            fn_constructor_kwargs={**arguments, "cwd": os.getcwd()})


def of_items(items: Sequence[Mapping[str, Any]]) -> ray.data.Dataset:
    """A dataset of one block for each item: by default 65 of them would share a task."""
    return ray.data.from_items([dict(one) for one in items], override_num_blocks=len(items))


def waves(items: Sequence[Any]) -> Iterator[tuple[int, Sequence[Any]]]:
    """(position, items) of what is handed to Ray Data at once."""
    for start in range(0, len(items), WAVE):
        yield start, items[start:start + WAVE]


def enter(cwd: str) -> None:
    """Makes relative paths mean what they mean to the driver, in every process that has its folder."""
    if os.path.isdir(cwd):
        os.chdir(cwd)
    publish_once()
    _json_once()


_json_once = cache(json_worker)


def check_shared(folder: Path | str) -> None:
    """Raises UsageError where this node does not see a folder of artifacts that the driver works in."""
    if not os.path.isdir(folder):
        raise UsageError(f"out: {os.path.dirname(folder)} is not seen by {socket.gethostname()}; give a folder that "
                         "all nodes share")


def at_driver() -> NodeAffinitySchedulingStrategy:
    """On the node of this process: of the driver, or of a task that drives something."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def beside_driver(actor: Any, *arguments: Any) -> Any:
    """An actor on the node of the driver."""
    return actor.options(scheduling_strategy=at_driver()).remote(*arguments)


@contextlib.contextmanager
def ending(actor: Any) -> Iterator[Any]:
    """An actor that ends with the block. Without it Ray Data's plans, whose handles stand in cycles, keep it until
    Python looks for those."""
    try:
        yield actor
    finally:
        if ray.is_initialized():  # else ray.kill would start a cluster, where a generator is closed after Ray
            with contextlib.suppress(ray.exceptions.ActorHandleNotFoundError):  # of a cluster that is gone
                ray.kill(actor)


def cause_of(error: Exception) -> str:
    """One line for people: the message of an error of ours, else the last lines of what went wrong."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, RayexpandError):
        return str(cause)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {' / '.join(lines[-3:])}"


def error_of(failure: ray.exceptions.RayError, ended: str) -> RayexpandError:
    """What a task raised, with its class. EnvironmentFault where the place or the process was at fault: `ended`, whose
    {} is the cause."""
    cause = failure.cause if isinstance(failure, ray.exceptions.RayTaskError) else None
    if isinstance(cause, RayexpandError):
        return cause
    if isinstance(cause, Exception) and isinstance(found := unpacked(packed(cause)), ProgramFault):
        return found
    return EnvironmentFault(ended.format(cause_of(failure)))


def address_of(cluster: ClusterConfig) -> str | None:
    """The cluster that is joined: the one that is named, or that of the job this runs in. None: one of our own."""
    return cluster.address or os.environ.get("RAY_ADDRESS")


@contextlib.contextmanager
def connected(cluster: ClusterConfig) -> Iterator[None]:
    """Ray, connected: to `cluster.address`, to the cluster of the job this runs in, else to one of our own.

    A local cluster of our own has its own folder and no dashboard, so that two on one machine do not meet. Raises
    UsageError when the cluster does not answer.
    """
    for name in ("ray.data", "ray._private.authentication"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray.data.exceptions").addFilter(_no_stop)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_S
    if ray.is_initialized():
        _check_trust()
        _say_warning_of_restarts_once()
        yield
        return
    address = address_of(cluster)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    temporary, refusals = None, list[bytes]()
    if address:
        try:
            _reach(address)
            with _held_back(b"InvalidAuthToken") as refusals, _at_the_package():
                ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING,
                         runtime_env=_environment())
        except (OSError, ray.exceptions.RayError) as error:
            if refusals:
                raise UsageError(
                    f"cluster.address: token mismatch with {address}: the cluster wants its token, and this user gives "
                    "none or another one. Set RAY_AUTH_MODE=token and put the cluster's token into ~/.ray/auth_token "
                    "(or RAY_AUTH_TOKEN)") from error
            raise UsageError(
                f"cluster.address: no Ray cluster answers at {address} ({type(error).__name__}: {error}). Start one "
                "with `ray start --head`, correct the address, give this user the cluster's token "
                "(RAY_AUTH_MODE=token and ~/.ray/auth_token), or add --no-ray to run in this process.") from error
    else:
        temporary = _own_folder()
        with _at_the_package():
            ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING,
                     _temp_dir=f"{temporary}/r")  # Ray lets everybody write into this one
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)  # ray.init sets its own, which would lose our exit code
    try:
        if address:
            _check_token(address)
        _say_warning_of_restarts_once()
        with published():
            yield
    except SystemError as error:
        raise _stop_in(error) or error from error
    finally:
        ray.shutdown()
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _at_the_package() -> Iterator[None]:
    """Ray puts the folder it is started in first on the import path of its workers. Where this process does not import
    from there (it may be a run folder of somebody else), Ray is started beside this package instead."""
    here = os.getcwd()
    if not any(os.path.abspath(one) == here for one in sys.path):
        os.chdir(Path(__file__).parents[2])
    try:
        yield
    finally:
        os.chdir(here)


def _check_trust() -> None:
    """Raises UsageError where workers of a Ray that somebody else connected do not trust what this process trusts."""
    here = set(filter(None, os.environ.get(TRUSTED, "").split(",")))
    if not here:
        return
    there: str = ray.get(ray.remote(num_cpus=0)(lambda: os.environ.get(TRUSTED, "")).remote())
    if lacking := sorted(here - set(there.split(","))):
        raise UsageError(f"Ray was connected before {', '.join(lacking)} was trusted, so its workers do not import it. "
                         "Call ray.shutdown() first (rayexpand connects by itself), or connect with ray.init("
                         f"runtime_env={{'env_vars': {{'{TRUSTED}': '{','.join(sorted(here))}'}}}})")


def _check_token(address: str) -> None:
    """Raises UsageError where this process uses a token and the cluster does not: actors would die before they ran."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled as uses_token

    if uses_token() and not ray.get(ray.remote(num_cpus=0)(uses_token).remote()):
        raise UsageError(f"cluster.address: token mismatch with {address}: this process uses a token (RAY_AUTH_MODE, "
                         "or ~/.ray/auth_token, which a run on this machine leaves), and the cluster uses none. Set "
                         "RAY_AUTH_MODE=disabled for this command, or start the cluster with RAY_AUTH_MODE=token")


def _own_folder() -> str:
    """A new folder for a cluster of our own that only this user can enter; those of dead processes are removed."""
    for stale in Path(tempfile.gettempdir()).glob("rx-*"):
        with contextlib.suppress(OSError):
            if stale.stat().st_uid == os.getuid() and not token_alive((stale / "owner").read_text()):
                shutil.rmtree(stale, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix="rx-")  # short: sockets below it have a length limit
    Path(folder, "owner").write_text(process_token())
    return folder


def _stop_in(error: BaseException | None) -> Stopped | None:
    """The Stopped of a signal handler, which leaves Ray's compiled code wrapped in a SystemError."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__cause__ or error.__context__
    return error


def _no_stop(record: logging.LogRecord) -> bool:
    """Ray Data calls every exception that passes it a fault of its own; a stop is none."""
    return _stop_in(sys.exc_info()[1]) is None


@cache
def _say_warning_of_restarts_once() -> None:
    """Ray writes once in a process, from C++, that an actor with arguments in the object store may not restart. Every
    pool of Ray Data has such actors, so it is written here, for an actor of no node, and left out of stderr."""
    actor: Any = ray.remote(_Restarted)
    nowhere = NodeAffinitySchedulingStrategy(ray.NodeID.from_random().hex(), soft=False)
    with _held_back(b"constructor arguments in the object store"):
        actor.options(num_cpus=0, max_restarts=-1, scheduling_strategy=nowhere).remote(ray.put(None))


@contextlib.contextmanager
def _held_back(unwanted: bytes) -> Iterator[list[bytes]]:
    """What is written to stderr meanwhile, by C++ too, comes after it, but for lines with `unwanted`: then they are in
    what is yielded."""
    found: list[bytes] = []
    with tempfile.TemporaryFile() as written:
        stderr = os.dup(2)
        os.dup2(written.fileno(), 2)
        try:
            yield found
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            lines = written.readlines()
            found += [line for line in lines if unwanted in line]
            os.write(2, b"".join(line for line in lines if unwanted not in line))


class _Restarted:
    def __init__(self, argument: None) -> None: ...


def gpus_each(given: float | None, device: str, field: str) -> float:
    """GPUs of one process: those given, else one where its device may be a GPU and the cluster has any. Raises
    UsageError where there is no node yet to tell from: CPU processes on GPU nodes that come later would be silent."""
    if given is not None:
        return given
    total, to_come = ray.cluster_resources(), os.environ.get(NODE_GPUS)
    if device == "auto" and not total.get("GPU", 0) and not total.get("CPU", 0):
        if to_come is None:
            raise UsageError(f"{field}: this cluster has no node to work on yet, so it cannot be seen whether its "
                             f"nodes have GPUs. Say it: --set {field}=1, or 0 for nodes without GPU")
        return float(float(to_come) > 0)
    return float(device.startswith("cuda") or (device == "auto" and total.get("GPU", 0) > 0))


def choose_pool(cluster: ClusterConfig, device: str) -> Pool:
    """How many actors of which size. What is not configured follows from the cluster as it is now; `device`: what the
    actors compute on, "cpu" also for those without models.

    Raises UsageError when no number is given and the cluster has no room for a single actor yet.
    """
    total = ray.cluster_resources()
    gpus = gpus_each(cluster.gpus_per_actor, device, "cluster.gpus_per_actor")
    wants = {"CPU": cluster.cpus_per_actor, "GPU": gpus, **cluster.resources}
    room = min((int(total.get(name, 0) / amount) for name, amount in wants.items() if amount), default=1)
    actors = cluster.actors or room
    if actors < 1:
        raise UsageError(f"cluster.actors: this cluster has no room for an actor of {wants} yet ({dict(total)}). Set "
                         "cluster.actors to the number you want an autoscaler to bring, or ask for less per actor.")
    return Pool(actors, cluster.cpus_per_actor, gpus, dict(cluster.resources), dict(cluster.label_selector))


def room_for(wants: Mapping[str, float], actors: int | None, field: str, remedy: str) -> int:
    """How many trials run at once, each of which wants these resources: `actors`, for which an autoscaler is asked,
    else what the cluster holds. Raises UsageError where it holds none and nobody is asked."""
    total = ray.cluster_resources()
    room = min(int(total.get(name, 0) / amount + 1e-9) for name, amount in wants.items() if amount)
    there = {name: total.get(name, 0) for name in wants}
    if room < 1 and actors is None:
        raise UsageError(f"{field}: one trial wants {dict(wants)}, and the cluster has {there}. {remedy}, join a "
                         "larger cluster, or set cluster.actors to the number that an autoscaler is to bring nodes for")
    if room < 1:
        log.warning("waiting for capacity: one trial wants %s, and the cluster has %s so far", dict(wants), there)
    return actors or room


def any_starting() -> bool:
    """Whether an actor of this driver has a process that has not begun its work yet."""
    from ray._private.state import actors  # ray.util.state needs a dashboard

    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    return any(one["Pid"] for one in actors(job_id=job, actor_state_name="PENDING_CREATION").values())


def _reach(address: str) -> None:
    """Raises OSError at once where nothing listens; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _environment() -> dict[str, Any]:
    """What actors of a cluster that is already up must know of this process: the methods it trusts, what its lines
    say, and failpoints."""
    found = {name: value for name, value in os.environ.items()
             if name in (TRUSTED, VARIABLE) or name.startswith("RAYEXPAND_FAILPOINT")}
    return {"env_vars": found} if found else {}
