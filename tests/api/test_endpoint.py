"""What Prometheus is told: by an endpoint that prometheus_client reads, and by a real server where there is one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from rayexpand import api, methods
from rayexpand.contract import metrics
from rayexpand.contract.errors import UsageError
from rayexpand.contract.schema import Reason, Status
from rayexpand.runs.driving import OWN_METHOD
from tests.api.test_statuses import _raw
from tests.commands import ROOT
from tests.prometheus import DASHBOARD, binary, expressions, free_port, queried, scraping

VERBS = {"expand", "retry", "fit", "train", "sweep", "select", "evaluate", "audit"}
VALUES = {"verb": VERBS, "status": {one.value for one in Status}, "reason": {one.value for one in Reason},
          "cause": set(metrics.CAUSES), "model": set(metrics.MODELS), "method": {*methods.names(), OWN_METHOD},
          "stage": {*metrics.STAGES.values(), metrics.OTHER, "load", "read", "decode", "prepare", "sample", "encode",
                    "commit"}}


@pytest.fixture
def endpoint() -> Iterator[str]:
    port = api.serve_metrics(0)
    yield f"http://127.0.0.1:{port}/metrics"
    metrics.publish_to("endpoint", None)


def read(url: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    with urllib.request.urlopen(url, timeout=10) as reply:
        text = reply.read().decode()
    return {(one.name, frozenset(one.labels.items())): one.value for family in text_string_to_metric_families(text)
            for one in family.samples}


def _of(found: dict[tuple[str, frozenset[tuple[str, str]]], float], name: str, **labels: str) -> float:
    return found[f"rayexpand_{name}", frozenset(labels.items())]


def test_a_study_without_ray_counts_what_its_files_say(endpoint: str, image_folder: Path, tmp_path: Path) -> None:
    raw = _raw(image_folder, tmp_path / "ids")
    api.train({"name": "my-study", "out": str(tmp_path), **raw}, same_process=True)
    found = read(endpoint)
    runs = [api.RunFolder(str(one)) for one in (tmp_path / "my-study/runs").iterdir()]
    assert _of(found, "images_total", method="classical", status="kept") == sum(one.status().kept for one in runs) == 16
    assert _of(found, "images_total", method="classical", status="failed") == 0
    assert _of(found, "shards_committed_total", method="classical") == 2
    seconds = [one.seconds for run in runs for one in run._run().store.receipts()]
    assert _of(found, "stage_seconds_total", stage="sample") == pytest.approx(sum(one["sample"] for one in seconds))
    updates = sum(json.loads(one.read_text())["samples_seen"] for one in (tmp_path / "my-study/results").iterdir())
    assert _of(found, "training_images_total", model="classifier") == updates
    assert 0 <= _of(found, "training_accuracy", model="classifier") <= 1
    assert _of(found, "training_step", model="classifier") == 4
    assert abs(_of(found, "heartbeat_timestamp_seconds", verb="train") - time.time()) < 60
    assert _of(found, "work_total", verb="train", stage="train") == 6
    assert _of(found, "stage_planned", verb="train", stage="train") == 6
    own = {name for name, _ in found if name.startswith("rayexpand_")}
    known = {f"rayexpand_{one.name}" for one in metrics.METRICS}
    assert {name for name in own if not name.endswith("_created")} <= known
    for name, labels in found:
        for label, value in labels if name.startswith("rayexpand_") else ():
            assert value in VALUES[label], f"{name}: the label {label} has no bound: {value}"


def test_a_fit_and_a_selection_are_counted(endpoint: str, image_folder: Path, tmp_path: Path) -> None:
    data = {"source": "imagefolder", "path": str(image_folder)}
    api.fit({"name": "four", "out": str(tmp_path / "artifacts"), "data": data, "fit": {"guide": {
        "kind": "classifier", "recipe": {"updates": 3, "epochs": 1, "batch": 4, "backbone_args": {"width": 4}}}}})
    run = api.expand({"name": "run", "out": str(tmp_path), "data": data, "method": {
        "name": "classical", "policy": "randaugment", "ratio": 1}}, same_process=True)
    api.select({"name": "half", "run": run.folder, "rule": {"kind": "random", "share": 0.5, "per": "class"}})
    found = read(endpoint)
    assert _of(found, "training_images_total", model="guide") == 12
    assert _of(found, "stage_planned", verb="fit", stage="fit") == 1
    assert {verb for verb in ("fit", "expand", "select") if ("rayexpand_heartbeat_timestamp_seconds", frozenset(
        {("verb", verb)})) in found} == {"fit", "expand", "select"}


def test_a_method_of_a_user_is_no_label() -> None:
    assert metrics.stage_of("my secret run of birds") == metrics.OTHER
    with pytest.raises(AssertionError):
        metrics.record(metrics.IMAGES, 1, seed="ant/3.png")


def test_a_port_that_is_taken_is_said(endpoint: str) -> None:
    port = int(re.findall(r":(\d+)/", endpoint)[0])
    with pytest.raises(UsageError, match=f"--metrics {port}: cannot be served"):
        api.serve_metrics(port)


def test_every_task_of_the_package_has_a_stage() -> None:
    said = [re.findall(r'(?:progress|on_rows)\(f?"([a-z-]+)', file.read_text())
            for file in (ROOT / "rayexpand").rglob("*.py") if "demo" not in file.name]
    words = {word for found in said for word in found}
    assert len(words) > 8
    assert {word for word in words if metrics.stage_of(word) == metrics.OTHER} == set()


def test_the_dashboard_asks_for_metrics_that_exist_and_has_published_fields() -> None:
    board = json.loads(DASHBOARD.read_text())
    known = {one.name for one in metrics.METRICS}
    asked = {name for one in expressions().values() for name in re.findall(r"rayexpand_(\w+)", one)}
    assert asked == known, "and every metric is shown"
    assert set(board) <= {
        "uid", "id", "title", "description", "tags", "timezone", "editable", "graphTooltip", "schemaVersion", "panels",
        "version", "refresh", "time", "timepicker", "annotations", "links", "templating", "style", "liveNow",
        "weekStart", "fiscalYearStartMonth"}  # the JSON model of Grafana's documentation
    assert {"title", "schemaVersion", "panels"} <= set(board)
    places = set()
    for panel in board["panels"]:
        assert set(panel) == {"id", "type", "title", "description", "datasource", "gridPos", "fieldConfig", "options",
                              "targets"}
        assert panel["type"] in ("timeseries", "stat")
        assert set(panel["gridPos"]) == {"x", "y", "w", "h"}
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & places
        places |= cells
        for target in panel["targets"]:
            assert set(target) == {"refId", "expr", "legendFormat", "datasource"}
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert len({one["id"] for one in board["panels"]}) == len(board["panels"])


def test_the_scrape_configuration_is_one_of_prometheus(tmp_path: Path) -> None:
    file = ROOT / "cluster/prometheus.yml"
    assert [one["job_name"] for one in yaml.safe_load(file.read_text())["scrape_configs"]] == ["rayexpand", "ray"]
    checker = Path(binary()).with_name("promtool")
    done = subprocess.run([checker, "check", "config", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_real_server_scrapes_a_running_study_and_every_query_of_the_dashboard_has_data(
        image_folder: Path, tmp_path: Path) -> None:
    binary()
    raw = _raw(image_folder, tmp_path / "ids")
    raw["recipe"] |= {"updates": 400, "epochs": 8}
    job = tmp_path / "study.yaml"
    job.write_text(yaml.safe_dump({"name": "study", "out": str(tmp_path), **raw}))
    port, waiting, seen = free_port(), expressions(), dict[str, list[Any]]()
    with scraping(f"127.0.0.1:{port}", tmp_path / "prometheus") as server:
        verb = subprocess.Popen([sys.executable, "-m", "rayexpand", "train", str(job), "--no-ray", "--metrics",
                                 str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT,
                                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
        try:
            while verb.poll() is None and waiting.keys() > seen.keys():
                for panel, one in waiting.items():
                    if panel not in seen and (found := queried(server, one)):
                        seen[panel] = found
                time.sleep(1)
        finally:
            verb.send_signal(signal.SIGKILL)
            verb.wait()
    assert waiting.keys() == seen.keys(), waiting.keys() - seen.keys()
    assert {one["metric"]["verb"] for one in seen["Since the last heartbeat A"]} == {"train"}


