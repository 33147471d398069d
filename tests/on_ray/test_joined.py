"""Workers that read the samples of a loop: all its rounds, as one process does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from rayexpand import api
from tests.on_ray.conftest import ROOT, Head

pytestmark = pytest.mark.cluster

LOOP: dict[str, Any] = {
    "run": {"name": "loop", "data": {"source": "digits", "per_class": 3}, "sampler": {"batch": 10, "shard_images": 10},
            "method": {"name": "classical", "policy": "randaugment", "ratio": 4}}, "rounds": {"count": 2}}
JOBS: dict[str, dict[str, Any]] = {
    "select": {"name": "some", "rule": {"kind": "quantile", "score": "clip_confidence", "drop": 0.3}},
    "evaluate": {"name": "some", "reference": {"source": "digits", "split": "test", "per_class": 12}, "copies": 3,
                 "metrics": ["fd", "density_coverage"]}}


def test_decisions_and_distances_of_a_loop_are_those_of_one_process(head: Head, tmp_path: Path) -> None:
    api.expand(LOOP, set={"run.out": str(tmp_path)}, same_process=True)
    shutil.copytree(tmp_path / "loop", tmp_path / "other")
    for verb, job in JOBS.items():
        getattr(api, verb)({**job, "run": str(tmp_path / "loop")})
        file = tmp_path / f"{verb}.yaml"
        file.write_text(yaml.safe_dump({**job, "run": str(tmp_path / "other"), "cluster": {"address": head.address}}))
        done = subprocess.run([sys.executable, "-m", "rayexpand", verb, str(file)], cwd=ROOT, env=head.env,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    decided = [pq.read_table(tmp_path / name / "selections/some.parquet").to_pylist() for name in ("loop", "other")]
    assert decided[0] == decided[1]
    assert len(decided[0]) == 120
    scores = [json.loads((tmp_path / name / "scores/some.json").read_text()) for name in ("loop", "other")]
    assert scores[0]["n_samples"] == scores[1]["n_samples"] == 90
    values = [{name: line["value"] for name, line in one["scores"].items()} for one in scores]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
