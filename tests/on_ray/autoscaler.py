"""A Ray head whose autoscaler brings fake GPU nodes to this machine (v1, fake_multinode), and what is seen of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from tests.on_ray.conftest import ROOT, ensure_token, free_ports, processes_of

IDLE_S = 9.0  # a node without work is given back after so long


@dataclass(frozen=True)
class Autoscaled:
    address: str
    folder: Path
    env: dict[str, str]

    def nodes(self) -> list[psutil.Process]:
        """Raylets with a GPU: the nodes the autoscaler brought."""
        found = []
        for process in processes_of(self.folder):
            with contextlib.suppress(psutil.Error):
                if process.name() == "raylet" and any("GPU" in part for part in process.cmdline()):
                    found.append(process)
        return found

    def workers(self, title: str) -> int:
        """Processes of Ray that say they are at such work."""
        found = 0
        for node in self.nodes():
            for process in node.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    found += "ray::" in (said := " ".join(process.cmdline())) and title in said
        return found

    def until_empty(self) -> None:
        while self.nodes():
            time.sleep(0.5)


@contextlib.contextmanager
def autoscaled(nodes: int, idle_s: float = IDLE_S) -> Iterator[Autoscaled]:
    """A head with one CPU, and up to `nodes` nodes of one CPU and one GPU that come when they are asked for."""
    folder = Path(tempfile.mkdtemp(prefix="rxt-"))  # short: sockets below it have a length limit
    port, = free_ports(1)
    node = {"node_config": {}, "resources": {"CPU": 1, "GPU": 1, "object_store_memory": 80_000_000}}
    ensure_token()
    (folder / "cluster.json").write_text(json.dumps({
        "cluster_name": "fake", "max_workers": nodes, "upscaling_speed": 100.0, "idle_timeout_minutes": idle_s / 60,
        "provider": {"type": "fake_multinode", "disable_node_updaters": True, "disable_launch_config_check": True,
                     "gcs_address": f"127.0.0.1:{port}", "launch_multiple": True, "head_node_id": FAKE_HEAD_NODE_ID,
                     "use_node_id_as_ip": True},
        "available_node_types": {"ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
                                 "gpu": {**node, "min_workers": 0, "max_workers": nodes}},
        "head_node_type": "ray.head.default", "auth": {}, "file_mounts": {}, "cluster_synced_files": [],
        "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [], "initialization_commands": [],
        "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [], "head_start_ray_commands": [],
        "worker_start_ray_commands": []}))
    env = {**os.environ, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_AUTH_MODE": "token",
           "RAY_TMPDIR": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env.pop("RAY_ADDRESS", None)
    try:
        subprocess.run([sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}",
                        "--node-ip-address=127.0.0.1", "--num-cpus=1", "--num-gpus=0",
                        "--object-store-memory=150000000", "--include-dashboard=false",
                        f"--autoscaling-config={folder}/cluster.json", f"--temp-dir={folder}", "--disable-usage-stats"],
                       env=env, check=True, capture_output=True)
        yield Autoscaled(f"127.0.0.1:{port}", folder, env)
    finally:
        for process in processes_of(folder):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Timeline:
    """(seconds, nodes, processes at work, pieces of work done), at every change."""

    rows: list[tuple[float, int, int, int]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def look(self, cluster: Autoscaled, title: str, done: Callable[[], int]) -> None:
        now = (len(cluster.nodes()), cluster.workers(title), done())
        if not self.rows or now != self.rows[-1][1:]:
            self.rows.append((round(time.monotonic() - self.started, 1), *now))

    def watch(self, cluster: Autoscaled, title: str, done: Callable[[], int], ends: Callable[[], bool]) -> None:
        while not ends():
            self.look(cluster, title, done)
            time.sleep(0.5)

    def most(self, column: int) -> int:
        return max(row[column] for row in self.rows)

    def first(self, column: int, value: int) -> float:
        """Seconds until a column first had this value."""
        return next(row[0] for row in self.rows if row[column] == value)

    def show(self, what: str) -> None:
        print(f"\n{what}\n{'seconds':>8}{'nodes':>7}{'at work':>9}{'done':>6}")
        for seconds, *counts in self.rows:
            print(f"{seconds:8.1f}{counts[0]:7}{counts[1]:9}{counts[2]:6}")


def driver(cluster: Autoscaled, *arguments: Any) -> subprocess.Popen[str]:
    """A command of rayexpand on this cluster, in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "rayexpand", *map(str, arguments), "--json"], cwd=ROOT,
                            env=cluster.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
