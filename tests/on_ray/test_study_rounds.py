"""A study with rounds on Ray: its loops, what stands beside them and its trials are those of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayexpand import api
from rayexpand.contract.errors import EXIT_DONE
from rayexpand.storage.files import LocalFiles
from rayexpand.storage.tables import read_json
from rayexpand.studies.verify import verify_study
from tests.on_ray.conftest import ROOT, Head
from tests.studies.rounds.test_in_study import COUNTS
from tests.studies.test_study import SMALL, raw_study

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

METHOD = {"ratio": 3, "prompt": "a photo of a {name}", "strength": 0.5, "steps": 4, "guidance_scale": 2.0}
SAMPLER = {"batch": 20, "shard_images": 20}


def trained_on(folder: str) -> dict[str, str]:
    files = LocalFiles(folder)
    facts = read_json(files, "study.json")
    assert facts is not None
    return {name: (read_json(files, f"trials/{name}.json") or {})["list_sha256"] for name in facts["trials"]}


def test_loops_and_controls_are_those_of_one_process(head: Head, tmp_path: Path) -> None:
    raw: dict[str, Any] = raw_study(
        tmp_path / "ray", seeds=[0], subset=COUNTS, expansions={
            "hard": {"method": {"name": "img2img", **METHOD}, "sampler": SAMPLER, "rounds": {
                "count": 2, "rule": "margin", "share": 0.4, "scores": {"folds": 2, "recipe": SMALL}}},
            "guided": {"method": {"name": "practice", **METHOD, "omega": 16, "convention": "score", "every": 1},
                       "sampler": SAMPLER, "rounds": {"count": 2, "guided_from": 2, "guide": SMALL}}},
        arms=[{"name": "original"}, {"name": "hard", "use": "hard"}, {"name": "guided", "use": "guided"}])
    job = tmp_path / "study.yaml"
    job.write_text(yaml.safe_dump(raw))
    process = subprocess.run([sys.executable, "-m", "rayexpand", "train", str(job), "--set",
                              f"cluster.address={head.address}"], cwd=ROOT, env=head.env, capture_output=True)
    assert process.returncode == EXIT_DONE, process.stderr.decode()[-2000:]
    here = api.train(job, set={"out": str(tmp_path / "here")}, same_process=True)

    assert trained_on(str(tmp_path / "ray/small")) == trained_on(here.folder)
    assert "over-sampled-and-pruned-for-guided-s0" in trained_on(here.folder)
    assert not verify_study(str(tmp_path / "ray/small"), pixels=True).problems
