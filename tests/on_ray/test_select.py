"""Scores for a decision on Ray: those of one process, for any number of actors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
import yaml

from rayexpand.contract.errors import EnvironmentFault, UsageError
from rayexpand.evaluation.select import parse, select
from rayexpand.evaluation.select_scores import ScoreJob, sample_chunks
from rayexpand.on_ray import select as on_ray
from rayexpand.on_ray.job import JobOrder, checked
from rayexpand.runs.config import ClusterConfig
from rayexpand.runs.config import parse as parse_run
from rayexpand.runs.run import open_run
from rayexpand.storage.files import LocalFiles
from rayexpand.storage.tables import read_table
from tests.conftest import complete
from tests.on_ray.conftest import ROOT, Head
from tests.tiny import tiny_clip

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def original(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Sixty samples in eight data files; calls of seven."""
    folder = tmp_path_factory.mktemp("job")
    run, _ = complete(parse_run({
        "name": "run", "out": str(folder), "data": {"source": "imagefolder", "path": str(image_folder)},
        "method": {"name": "classical", "ratio": 3}, "sampler": {"batch": 8, "shard_images": 8}}))
    return {"name": "one", "run": str(run.folder), "batch": 7, "device": "cpu", "rule": {"kind": "selective", "n": 2},
            "guide": {"weights": str(tiny_clip(folder / "clip"))}}


def decided(job: dict[str, Any], folder: Path, head: Head, actors: int) -> bytes:
    """What the command decides on a copy of the run."""
    run = shutil.copytree(job["run"], folder / "run")
    file = folder / "select.yaml"
    file.write_text(yaml.safe_dump({**job, "run": str(run), "cluster": {"address": head.address, "actors": actors}}))
    done = subprocess.run([sys.executable, "-m", "rayexpand", "select", str(file), "--json"], cwd=ROOT, env=head.env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return _lines(json.loads(done.stdout)["file"])


def _lines(file: str) -> bytes:
    return str(pq.read_table(file).to_pylist()).encode()


def test_the_same_decision_with_any_number_of_actors(head: Head, original: dict[str, Any], tmp_path: Path) -> None:
    found = {}
    for actors in (1, 2):
        folder = tmp_path / str(actors)
        folder.mkdir()
        found[actors] = decided(original, folder, head, actors)
    here = shutil.copytree(original["run"], tmp_path / "here")

    assert found[1] == found[2] == _lines(select(parse({**original, "run": str(here)}))["file"])


def test_it_runs_as_a_job(tmp_path: Path) -> None:
    file = tmp_path / "select.yaml"
    file.write_text("name: one\nrun: /shared/runs/x\nrule: {kind: random, n: 1}\n")

    assert checked(JobOrder("select", str(file), ["name=two"])).name_and_folder()[0] == "two"


@pytest.fixture(scope="module")
def cluster(head: Head) -> Iterator[ClusterConfig]:
    ray.init(address=head.address, log_to_driver=False)
    try:
        yield ClusterConfig(actors=1)
    finally:
        ray.shutdown()


def test_an_actor_that_cannot_go_on_says_why(cluster: ClusterConfig, original: dict[str, Any], tmp_path: Path) -> None:
    folder = shutil.copytree(original["run"], tmp_path / "run")
    config, run = parse({**original, "run": str(folder)}), open_run(str(folder))
    jobs: list[ScoreJob] = []

    def taken(job: ScoreJob, chunks: Any) -> Any:
        jobs.append(job)
        raise EnvironmentFault("enough")

    with pytest.raises(EnvironmentFault, match="enough"):
        select(config, taken)
    chunk = sample_chunks(run.store.receipts())[0]
    file = folder / "data" / chunk.file
    table = read_table(LocalFiles(folder), f"data/{chunk.file}")
    column = [{"bytes": b"broken", "path": "x.png"}, *table["image"].to_pylist()[1:]]
    pq.write_table(table.set_column(0, table.schema.field(0), [column]), file)
    with closing(on_ray.score(jobs[0], [chunk], cluster)) as scores, pytest.raises(UsageError, match="verify --pixels"):
        next(scores)
    file.unlink()
    with closing(on_ray.score(jobs[0], [chunk], cluster)) as scores, pytest.raises(EnvironmentFault, match="No such"):
        next(scores)
