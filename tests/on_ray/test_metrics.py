"""Metrics on the endpoint of a real cluster, as a job on it counts them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from rayexpand.contract.metrics import PREFIX
from rayexpand.on_ray.metrics import IDLE, lost_of
from tests.api.test_statuses import _raw
from tests.commands import ROOT
from tests.on_ray.conftest import Head

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def _endpoints(head: Head) -> list[str]:
    """What Prometheus is told to scrape: the list that the head keeps."""
    listed = json.loads((head.folder / "prom_metrics_service_discovery.json").read_text())
    return [f"http://{target}/metrics" for group in listed for target in group["targets"]]


def _samples(head: Head) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for url in _endpoints(head):
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                text = reply.read().decode()
        except OSError:
            continue
        for family in text_string_to_metric_families(text):
            for one in family.samples:
                if one.name.startswith(f"ray_{PREFIX}"):
                    found.setdefault(one.name.removeprefix("ray_"), []).append((one.labels, one.value))
    return found


def _until(head: Head, is_there: Callable[[dict[str, Any]], bool], verb: subprocess.Popen[bytes]) -> dict[str, Any]:
    deadline = time.monotonic() + 480
    found: dict[str, Any] = {}
    while time.monotonic() < deadline:
        if is_there(found := _samples(head)):
            return found
        if verb.poll() is not None and verb.returncode:
            break
        time.sleep(1)
    pytest.fail(f"not there: {sorted(found)}, the verb ended with {verb.poll()}")


def test_a_study_on_ray_counts_on_the_endpoints_of_its_cluster(head: Head, image_folder: Path, tmp_path: Path) -> None:
    raw = _raw(image_folder, tmp_path / "ids")
    raw["recipe"] |= {"updates": 60, "epochs": 3}
    raw["training"] = {"cpus_per_worker": 1}
    job = tmp_path / "study.yaml"
    job.write_text(yaml.safe_dump({"name": "my-study", "out": str(tmp_path), **raw,
                                   "cluster": {"address": head.address, "actors": 1}}))
    with open(tmp_path / "said.txt", "w") as said:
        verb = subprocess.Popen([sys.executable, "-m", "rayexpand", "train", str(job)], stdout=said, stderr=said,
                                cwd=ROOT, env=head.env)
    try:
        found = _until(head, lambda now: {f"{PREFIX}images_total", f"{PREFIX}training_images_total",
                                          f"{PREFIX}training_loss"} <= now.keys(), verb)
        assert sum(value for labels, value in found[f"{PREFIX}images_total"] if labels["status"] == "kept") == 16
        assert {labels["verb"] for labels, _ in found[f"{PREFIX}heartbeat_timestamp_seconds"]} == {"train"}
        assert sum(value for _, value in found[f"{PREFIX}shards_committed_total"]) == 2
        assert all(value > 0 for _, value in found[f"{PREFIX}stage_seconds_total"])
        for samples in found.values():
            assert not [labels for labels, _ in samples if "my-study" in str(labels) or "noisy" in str(labels)]
    finally:
        verb.kill()
        verb.wait()


def test_a_node_that_nobody_used_was_not_taken_away() -> None:
    def node(name: str, alive: bool, reason: int = 0) -> dict[str, Any]:
        return {"NodeID": name, "Alive": alive, "DeathReason": reason}

    alive = {"a", "b", "c"}
    assert lost_of(alive, [node("a", True), node("b", False, 2), node("c", False, IDLE), node("d", False, 2)]) == 1
