"""A study as one job on a head without CPUs, whose workers, driver and head are killed on the way: the numbers are
those of a study that nobody disturbed, and nothing that was committed is made again."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from rayexpand import api
from rayexpand.on_ray import submit
from rayexpand.on_ray.job import JobOrder
from rayexpand.runs.run import open_run
from rayexpand.storage.places import open_files
from rayexpand.studies.parts import read_result
from tests.conftest import hashes
from tests.on_ray.conftest import ROOT, Head, add_node, processes_of, start_head, stop_head

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3600)]  # five minutes on two quiet cores

RUNS = ("guided-0", "plain-0")
SAMPLED = {"steps": 4, "guidance_scale": 2.0}
STUDY: dict[str, Any] = {
    "data": {"source": "digits"}, "subset": {"kind": "per_class", "n": 2}, "seeds": [0],
    "test": {"source": "digits", "split": "test", "per_class": 10},
    "recipe": {"preset": "digits", "updates": 200}, "training": {"checkpoint_steps": 20, "cpus_per_worker": 1},
    "expansions": {
        "guided": {"config": {"method": {"name": "distdiff", "ratio": 1, "guide_step": 2, **SAMPLED},
                              "sampler": {"batch": 5, "shard_images": 5}},
                   "fit": {"guide": {"recipe": {"updates": 20}}}},
        "plain": {"config": {"method": {"name": "img2img", "ratio": 1, "prompt": "a photo of a {name}", **SAMPLED},
                             "sampler": {"batch": 5, "shard_images": 5}}}},
    "selections": {"sure": {"rule": {"kind": "clip_confidence", "threshold": 0.05}}},
    "arms": [{"name": "original"}, {"name": "guided", "use": "guided"},
             {"name": "plain", "use": "plain", "selection": "sure"}]}


class Cluster:
    """A head that runs nothing, with one worker node; and another one at its place when it is gone."""

    def __init__(self) -> None:
        self.head: Head = start_head(cpus=0)

    def join(self) -> None:
        add_node(self.head, cpus=2, gpus=2)

    def replace(self) -> None:
        ports = self.head.ports
        stop_head(self.head)
        self.head = start_head(cpus=0, ports=ports)
        self.join()

    def kill(self, *words: str) -> int:
        """SIGKILL to a process of the cluster whose command line has all these words; waits for one."""
        while True:
            for one in processes_of(self.head.folder):
                with contextlib.suppress(psutil.Error):
                    if all(word in " ".join(one.cmdline()) for word in words):
                        one.kill()
                        return one.pid
            time.sleep(0.1)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")  # whatever else this machine does
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(ROOT)
    made = Cluster()
    try:
        made.join()
        yield made
    finally:
        stop_head(made.head)


def committed(study: Path) -> dict[str, tuple[int, int]]:
    """Artifacts, data files, selections and results that are there, with inode and time of change."""
    patterns = ("artifacts/*-????????/artifact.json", "runs/*/data/*.parquet", "runs/*/selections/*.parquet",
                "results/*.json")
    found = {}
    for file in (one for pattern in patterns for one in study.glob(pattern)):
        about = file.stat()
        found[str(file.relative_to(study))] = about.st_ino, about.st_mtime_ns
    return found


def numbers(study: str) -> dict[str, Any]:
    files, found = open_files(study), {}
    for name in sorted(files.list("results")):
        result = read_result(files, name.removesuffix(".json")) or {}
        found[name] = {key: result[key] for key in ("rows", "updates", "history", "last", "best", "list_sha256")}
    return found


def test_a_study_survives_the_loss_of_workers_driver_and_head(cluster: Cluster, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({"name": "one", "out": str(tmp_path / "job"), **STUDY}))
    here = api.train(file, set={"out": str(tmp_path / "here")}, same_process=True)
    study, known, killed = tmp_path / "job" / "one", dict[str, tuple[int, int]](), list[str]()

    def wait_for(pattern: str, count: int = 1) -> None:
        while len([*study.glob(pattern)]) < count:
            time.sleep(0.05)
        known.update(committed(study))

    def disturb() -> None:
        steps: list[tuple[str, int, str, Callable[[], Any]]] = [
            ("runs/guided-0/data/*", 1, "sampler", lambda: cluster.kill("ray::", "ExpandActor")),
            ("runs/guided-0/data/*", 2, "driver", lambda: cluster.kill("-m rayexpand train", "study.yaml")),
            ("runs/plain-0/data/*", 1, "head", cluster.replace),
            ("checkpoints/*.pt", 1, "trial", lambda: cluster.kill("ray::_train_alone"))]
        for pattern, count, what, kill in steps:
            wait_for(pattern, count)
            kill()
            killed.append(what)

    killer = threading.Thread(target=disturb, daemon=True)
    killer.start()
    end = submit.submit(JobOrder("train", str(file)), address=cluster.head.dashboard, backoff_s=1.0,
                        on_log=lambda text: print(text, end=""), say=print)
    after = committed(study)

    assert killed == ["sampler", "driver", "head", "trial"]
    assert (end.exit_code, end.status, end.attempts) == (0, "SUCCEEDED", 3)
    assert len([one for one in known if "/data/" in one]) >= 4
    assert [one for one in known if one.startswith("artifacts/classifier-")]
    assert {name: after.get(name) for name in known} == known, "what was committed is made again"
    assert numbers(str(study)) == numbers(here.folder)
    for name in RUNS:
        assert hashes(open_run(f"{study}/runs/{name}")) == hashes(open_run(f"{here.folder}/runs/{name}"))
        assert len([*study.glob(f"runs/{name}/data/*")]) == 4
    assert (study / "report.html").is_file(), "the job writes its page"
    (job,) = {one["folder"] for one in submit.jobs(address=cluster.head.dashboard)}
    assert job == str(study)
