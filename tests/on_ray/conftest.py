"""One real Ray cluster on this machine, with its own ports and folder, for all tests of this folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.commands import ROOT

# before ray is imported; with Ray's niceness of 15, workers starve beside other work of the machine
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_worker_niceness": "0"}


@dataclass(frozen=True)
class Head:
    address: str
    dashboard: str
    env: dict[str, str]
    folder: Path
    ports: tuple[int, ...]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def processes_of(folder: Path) -> list[psutil.Process]:
    """The daemons of a cluster (they name its folder) and everything they started."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if any(str(folder) in part for part in process.cmdline()):
                for one in [process, *process.children(recursive=True)]:
                    found[one.pid] = one
        except psutil.Error:
            continue
    found.pop(os.getpid(), None)
    return list(found.values())


def ensure_token() -> None:
    """A cluster started by hand wants a token that exists; one started by ray.init would make it."""
    token = Path.home() / ".ray" / "auth_token"
    if not token.exists():
        token.parent.mkdir(exist_ok=True)
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(16))


def start_head(*, cpus: int, gpus: int = 0, auth: str = "token", ports: tuple[int, ...] = ()) -> Head:
    """`ports`: those of a head before, whose place this one takes."""
    folder = Path(tempfile.mkdtemp(prefix="rxt-"))  # short: sockets below it have a length limit
    ports = ports or tuple(free_ports(5))
    port, dashboard, agent, client, metrics = ports
    env = {**os.environ, "RAY_AUTH_MODE": auth, "RAY_TMPDIR": str(folder), "OMP_NUM_THREADS": "1",
           "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    env.pop("RAY_ADDRESS", None)
    ensure_token()
    _ray_start(env, "--head", f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
               f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}",
               f"--metrics-export-port={metrics}", f"--num-cpus={cpus}", f"--num-gpus={gpus}", f"--temp-dir={folder}")
    return Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", env, folder, ports)


def add_node(head: Head, *, cpus: int, gpus: int = 0) -> None:
    """A node with a folder of its own: two that share one remove each other's packages of jobs."""
    agent, metrics = free_ports(2)
    folder = Path(tempfile.mkdtemp(dir=head.folder, prefix="n"))
    _ray_start({**head.env, "RAY_TMPDIR": str(folder)}, f"--address={head.address}", f"--num-cpus={cpus}",
               f"--num-gpus={gpus}", f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}",
               f"--temp-dir={folder}")


def _ray_start(env: dict[str, str], *options: str) -> None:
    subprocess.run([sys.executable, "-m", "ray.scripts.scripts", "start", *options, "--node-ip-address=127.0.0.1",
                    "--object-store-memory=200000000", "--disable-usage-stats"], env=env, check=True,
                   capture_output=True)


def stop_head(head: Head) -> None:
    processes = processes_of(head.folder)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)
    shutil.rmtree(head.folder, ignore_errors=True)


@pytest.fixture(scope="package")
def head() -> Iterator[Head]:
    started = start_head(cpus=4)
    try:
        yield started
    finally:
        stop_head(started)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without room for actors; tests add nodes."""
    import ray
    from ray.cluster_utils import Cluster

    ensure_token()
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False,
                                                         "object_store_memory": 150_000_000})
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
