"""Copies of seeds looked for on Ray: the ids, similarities and thresholds of one process, for any number of actors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayexpand import api
from rayexpand.evaluation.audit_files import copy_rows
from rayexpand.on_ray.job import FILE_VERBS
from rayexpand.runs.config import parse as parse_run
from rayexpand.storage.files import LocalFiles
from tests.conftest import complete
from tests.on_ray.conftest import ROOT, Head
from tests.tiny import tiny_clip, tiny_pipeline

pytestmark = pytest.mark.cluster

COLUMNS = ["sample_id", "own", "class", "class_id", "all", "all_id", "top_id", "top"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Forty samples in five data files, made by a generator that also makes the known copies."""
    folder = tmp_path_factory.mktemp("job")
    run, _ = complete(parse_run({
        "name": "run", "out": str(folder), "data": {"source": "digits", "per_class": 2},
        "prior": {"weights": str(tiny_pipeline(folder / "sd"))}, "sampler": {"batch": 8, "shard_images": 8},
        "method": {"name": "img2img", "ratio": 2, "steps": 10, "guidance_scale": 1.0}}))
    return {"name": "one", "audit": {"run": str(run.folder), "copies": {
        "extractor": {"guide": str(tiny_clip(folder / "clip")), "device": "cpu"}, "known": 20, "batch": 16,
        "held_out": {"source": "digits", "split": "pool"}}}}


def found(run: Path, result: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = copy_rows(LocalFiles(run), "one", COLUMNS).sort_by("sample_id").to_pylist()
    names = ("tau", "tau_copy", "known_copies", "sees_copies", "held_out")
    return rows, {name: result["copies"][name] for name in names}


def on(job: dict[str, Any], run: Path) -> dict[str, Any]:
    shutil.copytree(job["audit"]["run"], run)
    return {**job, "audit": {**job["audit"], "run": str(run)}}


def test_the_same_copies_with_any_number_of_actors(head: Head, job: dict[str, Any], tmp_path: Path) -> None:
    here = on(job, tmp_path / "here")
    wanted = found(tmp_path / "here", api.audit(here).facts)
    for actors in (1, 2):
        run, file = tmp_path / str(actors), tmp_path / f"{actors}.yaml"
        file.write_text(yaml.safe_dump({**on(job, run), "cluster": {"address": head.address, "actors": actors}}))
        done = subprocess.run([sys.executable, "-m", "rayexpand", "audit", str(file), "--json"], cwd=ROOT, env=head.env,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert found(run, json.loads(done.stdout)) == wanted


def test_it_runs_as_a_job() -> None:
    assert "audit" in FILE_VERBS
