"""The audit `membership` on Ray: the same answers as in one process, and what goes wrong in a task keeps its class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import yaml

from rayexpand import api
from rayexpand.contract.errors import DamagedFile
from rayexpand.on_ray.job import JobOrder, checked, unsent_problems
from rayexpand.on_ray.membership import ask
from rayexpand.runs.config import ClusterConfig
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import read_json
from rayexpand.studies.attacks import Question, ask_here
from rayexpand.studies.config import parse_study
from rayexpand.studies.kept import read_trial
from rayexpand.studies.membership import STUDY
from rayexpand.studies.parts import Study
from tests.on_ray.conftest import Head
from tests.studies.test_membership import section
from tests.studies.test_study import SMALL

pytestmark = pytest.mark.cluster


def raw(out: Path) -> dict[str, Any]:
    config = section(recipe=SMALL, training={"device": "cpu"})
    return {"name": "small", "out": str(out), "device": "cpu",
            "audit": {"membership": config.model_dump(mode="json")}}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("here")
    api.audit(raw(out), same_process=True)
    return out / "small"


@pytest.fixture
def cluster(head: Head) -> Iterator[ClusterConfig]:
    ray.init(address=head.address, log_to_driver=False)
    try:
        yield ClusterConfig()
    finally:
        ray.shutdown()


def test_an_audit_on_ray_finds_what_one_process_finds(here: Path, head: Head, tmp_path: Path) -> None:
    found = api.audit(raw(tmp_path), ray=head.address).facts["membership"]

    expected = (read_json(open_files(here), "result.json") or {})["membership"]
    assert found["lines"] == expected["lines"]


def test_a_job_writes_where_every_node_sees_it(tmp_path: Path) -> None:
    file = tmp_path / "audit.yaml"
    file.write_text(yaml.safe_dump(raw(Path("runs"))))
    (problem,) = unsent_problems(checked(JobOrder("audit", str(file))), set())

    assert problem.startswith("out: 'runs' is relative")
    assert unsent_problems(checked(JobOrder("audit", str(file), ["out=/shared/runs"])), set()) == []


def test_a_task_answers_as_this_process_does_and_keeps_the_class_of_an_error(here: Path,
                                                                             cluster: ClusterConfig) -> None:
    files = open_files(here / "membership" / STUDY)
    study = Study(parse_study((read_json(files, "study.json") or {})["config"]), files, {}, {})
    trials = [read_trial(files, f"{arm}-s1") for arm in ("classifier", "private")]
    question = Question(study.config.data, ("identity", "flip"))
    answers = {trial.name: phi for trial, phi in ask(study, trials, question)}

    for trial, phi_NQ in ask_here(study, trials, question):
        assert phi_NQ.shape == (40, 2)
        assert np.array_equal(answers[trial.name], phi_NQ)
    weights = here / f"membership/{STUDY}/weights/private-s1.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(DamagedFile, match=r"private-s1\.safetensors"):
        list(ask(study, trials[1:], question))
