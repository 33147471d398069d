"""From no node to some and back to none, for every verb that asks for nodes: an autoscaler over fake nodes, whose nodes
and work are printed as a timeline (`-s` shows it).

The driver lives on after its verb returned, as one that writes a report does: nodes leave meanwhile.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayexpand.runs import run as runs
from rayexpand.runs.blame import running_here
from rayexpand.runs.config import RunConfig
from rayexpand.storage.places import open_files
from tests.conftest import FAKES, MakeConfig, complete, hashes
from tests.on_ray.autoscaler import ROOT, Autoscaled, Timeline, autoscaled
from tests.on_ray.test_sweep import raw as raw_sweep
from tests.studies.test_study import SMALL, raw_study

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]
LOAD_S = 3.0
BUSY_S = 25.0  # from the last node to the last busy actor, LOAD_S included; two cores start all of them
FOUND = (3, 4)  # nodes; Ray launches one too many at times, and takes it down at once
DRIVER = """
import sys, time, rayexpand
verb, job, address = sys.argv[1:]
getattr(rayexpand, verb)(job, ray=address)
print("returned", flush=True)
time.sleep(600)
"""


def begin(cluster: Autoscaled, verb: str, job: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    return subprocess.Popen([sys.executable, "-c", DRIVER, verb, str(file), cluster.address], cwd=ROOT,
                            env=cluster.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def until_empty(cluster: Autoscaled, child: subprocess.Popen[str], timeline: Timeline, title: str, done: Any) -> None:
    """To the last node, with the driver still there; then the driver goes."""
    assert child.stdout is not None
    assert "returned\n" in iter(child.stdout.readline, ""), child.communicate()[1][-2000:]  # behind other lines
    timeline.watch(cluster, title, done, lambda: not cluster.nodes())
    timeline.look(cluster, title, done)
    assert child.poll() is None
    child.kill()
    child.communicate()


def watched(cluster: Autoscaled, verb: str, job: dict[str, Any], folder: Path, title: str, done: Any,
            total: int) -> Timeline:
    child, timeline = begin(cluster, verb, job, folder), Timeline()
    timeline.watch(cluster, title, done, lambda: done() == total or child.poll() is not None)
    until_empty(cluster, child, timeline, title, done)
    return timeline


def job_of(config: RunConfig, method: str, **fields: Any) -> dict[str, Any]:
    return json.loads(json.dumps({**config.model_dump(mode="json", exclude={"method"}),
                                  "method": {"name": FAKES + method, **fields}}))


def test_expand(make_config: MakeConfig, tmp_path: Path) -> None:
    """Three actors are asked for at once, and are busy soon after their nodes are there; one node is killed in the
    middle; every sample is made once, with the same bytes."""
    reference = hashes(complete(make_config("Loading", ratio=15, seconds=0.0, load=0.0, shard_images=20,
                                            name="reference"))[0])
    with autoscaled(nodes=3) as cluster:
        config = make_config("Sleeping", ratio=15, seconds=0.0, shard_images=20, sections={
            "cluster": {"actors": 3, "gpus_per_actor": 1, "cpus_per_actor": 0}})
        folder, busy, killed = Path(config.folder), Timeline(), False
        child = begin(cluster, "expand", job_of(config, "Loading", ratio=15, seconds=0.3, load=LOAD_S), tmp_path)

        def shards() -> int:
            return len(list(folder.glob("data/*.parquet")))

        def actors() -> int:
            return running_here(open_files(str(folder))) if folder.exists() else 0

        while child.poll() is None and shards() < 15:
            busy.look(cluster, "MapWorker", shards)
            busy.rows[-1] = (*busy.rows[-1][:2], actors(), busy.rows[-1][3])
            if not killed and actors() == 3 and shards() >= 4:
                cluster.nodes()[-1].kill()
                killed = True
        until_empty(cluster, child, busy, "MapWorker", shards)
        busy.show("expand: 15 shards of 6 s, 3 actors that load for 3 s; one node killed")
        made = runs.open_run(str(folder))

    assert killed
    assert (busy.rows[0][1], busy.most(1) in FOUND, busy.rows[-1][1]) == (0, True, 0)
    assert hashes(made) == reference
    print("seconds from the last node to the last busy actor:", waited := busy.first(2, 3) - busy.first(1, 3))
    assert waited < BUSY_S


def test_train(tmp_path: Path) -> None:
    """Trials of a study at once: as many as `cluster.actors`, for which nodes are asked that are not there."""
    study = raw_study(tmp_path, arms=[{"name": "original"}, {"name": "faster", "recipe": {"lr": 0.02}}],
                      expansions={}, recipe={**SMALL, "updates": 1500},
                      training={"gpus_per_worker": 1, "device": "cpu"}, cluster={"actors": 3})
    with autoscaled(nodes=3) as cluster:
        timeline = watched(cluster, "train", study, tmp_path, "_train_alone",
                           lambda: len(list((tmp_path / "small/results").glob("*.json"))), total=4)
        timeline.show("train: 4 trials, 3 at once")

    assert (timeline.rows[0][1], timeline.most(1) in FOUND, timeline.rows[-1][1:]) == (0, True, (0, 0, 4))
    assert timeline.most(2) == 3
    for file in (tmp_path / "small/results").glob("*.json"):
        assert json.loads(file.read_text())["starts"] == [0]


def test_sweep(tmp_path: Path) -> None:
    """Trials of a sweep at once, and the best trained again."""
    sweep = raw_sweep(tmp_path, samples=5, gpus_per_trial=1, fresh_seeds=1, cluster={"actors": 3})
    sweep["study"] |= {"recipe": {"updates": 1200, "epochs": 4}, "training": {"device": "cpu"}}
    with autoscaled(nodes=3) as cluster:
        timeline = watched(cluster, "sweep", sweep, tmp_path, "ImplicitFunc",
                           lambda: len(list((tmp_path / "sweep/trials").glob("*.json"))), total=5)
        timeline.show("sweep: 5 trials, 3 at once; then the best again")

    assert (timeline.rows[0][1], timeline.most(1) in FOUND, timeline.rows[-1][1:]) == (0, True, (0, 0, 5))
    assert timeline.most(2) == 3
