"""A real Prometheus server of a test: the binary `prometheus` on PATH, or RAYEXPAND_TEST_PROMETHEUS."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import ROOT

DASHBOARD = ROOT / "cluster/grafana-dashboard.json"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def binary() -> str:
    found = os.environ.get("RAYEXPAND_TEST_PROMETHEUS") or shutil.which("prometheus")
    if found is None:
        pytest.skip("no prometheus on PATH and none named by RAYEXPAND_TEST_PROMETHEUS; on Debian `apt-get download "
                    "prometheus` and `dpkg-deb -x` bring one")
    return found


@contextlib.contextmanager
def scraping(target: str, folder: Path) -> Iterator[str]:
    """The URL of a server that scrapes `target` (host:port) every second, as cluster/prometheus.yml does."""
    config = yaml.safe_load((ROOT / "cluster/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    folder.mkdir()
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    with open(folder / "log.txt", "w") as log:
        server = subprocess.Popen(
            [binary(), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
             f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=2)
                break
            if time.monotonic() > deadline or server.poll() is not None:
                pytest.fail((folder / "log.txt").read_text()[-2000:])
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def queried(server: str, expression: str) -> list[dict[str, Any]]:
    query = urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(f"{server}/api/v1/query?{query}", timeout=10) as reply:
        found = json.load(reply)
    assert found["status"] == "success"
    return found["data"]["result"]


def expressions() -> dict[str, str]:
    """The queries of the dashboard, by panel, as Grafana would send them."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return {f"{panel['title']} {target['refId']}": target["expr"].replace("$__rate_interval", "30s")
            for panel in panels for target in panel["targets"]}
