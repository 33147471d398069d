"""A loop on Ray, one cluster for its trainings and its samplers: the decisions and samples are those of one process,
whoever is killed, and nothing that was committed is made again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayexpand import api
from rayexpand.contract.errors import EXIT_DONE, EXIT_RESUMABLE
from rayexpand.studies.rounds.config import resolved_loop
from rayexpand.studies.rounds.verify import verify_loop
from tests.chaos.test_loops import Ended, ended, loop_config, undisturbed  # noqa: F401  (a fixture)
from tests.on_ray.conftest import ROOT, Head
from tests.on_ray.test_study_job import Cluster, cluster  # noqa: F401  (a fixture)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

GUIDED: dict[str, Any] = {
    "run": {"name": "loop", "data": {"source": "digits", "per_class": 2},
            "method": {"name": "practice", "ratio": 3, "prompt": "a photo of a {name}", "strength": 0.9, "steps": 10,
                       "guidance_scale": 2.0, "omega": 16, "convention": "score", "every": 1},
            "sampler": {"batch": 5, "shard_images": 5}},
    "rounds": {"count": 3, "rule": "loss", "guided_from": 2,
               "scores": {"folds": 2, "recipe": {"preset": "digits", "updates": 200}}},
    "training": {"checkpoint_steps": 20}}


def expand(job: Path, head: Head, *options: str, **env: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "rayexpand", "expand", str(job), "--set",
                             f"run.cluster.address={head.address}", *options], cwd=ROOT, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, env={**head.env, **env})


def test_a_loop_whose_driver_is_killed_between_rounds(head: Head, undisturbed: Ended, tmp_path: Path) -> None:  # noqa: F811
    config = loop_config(tmp_path)
    job = tmp_path / "loop.yaml"
    job.write_text(yaml.safe_dump(resolved_loop(config)))
    trust = ("--trust", config.run.method.name)
    for point in ("after_scores_link@shard=2", "after_dealt@shard=2", "after_decision_link@shard=2",
                  "before_guide@shard=3"):
        process = expand(job, head, *trust, RAYEXPAND_FAILPOINT=f"{point}:kill")
        _, said = process.communicate()
        assert process.returncode == -signal.SIGKILL, said.decode()[-2000:]
    process = expand(job, head, *trust)
    _, said = process.communicate()

    assert process.returncode == EXIT_DONE, said.decode()[-2000:]
    assert ended(config.folder) == undisturbed
    assert verify_loop(config.folder, pixels=True).problems == []


def committed(folder: Path) -> dict[str, tuple[int, int]]:
    """Decisions, scores, artifacts and data files that are there, with inode and time of change."""
    patterns = ("decisions/*.json", "scores/*.parquet", "artifacts/classifier-????????/artifact.json",
                "rounds/*/data/*.parquet")
    return {str(file.relative_to(folder)): (file.stat().st_ino, file.stat().st_mtime_ns)
            for pattern in patterns for file in folder.glob(pattern)}


def test_a_guided_loop_survives_the_loss_of_a_trial_the_driver_the_head_and_a_sampler(
        cluster: Cluster, tmp_path: Path) -> None:  # noqa: F811
    job, folder = tmp_path / "loop.yaml", tmp_path / "job/loop"
    job.write_text(yaml.safe_dump({**GUIDED, "run": {**GUIDED["run"], "out": str(folder.parent)}}))
    here = api.expand(job, set={"run.out": str(tmp_path / "here")}, same_process=True)
    known, killed, processes = dict[str, tuple[int, int]](), list[str](), list[subprocess.Popen[bytes]]()

    def disturb() -> None:
        steps: list[tuple[str, str, Callable[[], Any]]] = [
            ("checkpoints/r0002-fold*.pt", "trial", lambda: cluster.kill("ray::_train_alone")),
            ("decisions/0002.json", "driver", lambda: processes[-1].kill()),
            ("rounds/0002/data/*", "head", cluster.replace),
            ("rounds/0003/data/*", "sampler", lambda: cluster.kill("ray::", "ExpandActor"))]
        for pattern, what, kill in steps:
            while not [*folder.glob(pattern)]:
                time.sleep(0.02)
            known.update(committed(folder))
            killed.append(what)
            with replacing:
                kill()

    replacing = threading.Lock()
    killer, codes = threading.Thread(target=disturb, daemon=True), list[int]()
    killer.start()
    while EXIT_DONE not in codes:
        with replacing:  # a head that is gone is back
            processes.append(expand(job, cluster.head))
        _, said = processes[-1].communicate()
        codes.append(processes[-1].returncode)
        with replacing:  # so that no head is left where this fails
            lost_head = codes[-1] == 1 and killed[-1] == "head"  # Ray ends a driver whose head is gone
        assert lost_head or codes[-1] in (EXIT_DONE, EXIT_RESUMABLE, -signal.SIGKILL), (codes, said.decode()[-2000:])
        assert len(codes) < 6
    after = committed(folder)

    assert killed == ["trial", "driver", "head", "sampler"]
    assert [one for one in known if one.startswith("artifacts/classifier-")]
    assert {name: after.get(name) for name in known} == known, "what was committed is made again"
    assert ended(str(folder)) == ended(here.folder)
    assert verify_loop(str(folder), pixels=True).problems == []
    assert len(os.listdir(folder / "rounds")) == 3
