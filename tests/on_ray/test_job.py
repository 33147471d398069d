"""What is sent with a job, what would be missing where it starts, and what to give instead."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayexpand import api
from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.on_ray import job
from rayexpand.on_ray.job import JobOrder, checked, unsent_problems
from rayexpand.on_ray.submit import submit

NOBODY = "http://127.0.0.1:9"  # no cluster is there, so what gets so far has passed every check


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with small lists, data, weights, and a folder beside it."""
    root = tmp_path / "work"
    for name in ("lists/ids.txt", "lists/map.csv", "data/birds/ant/1.png", "models/sd/model_index.json",
                 "runs/old/run.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    (tmp_path / "beside.csv").write_text("x")
    (root / "large.csv").write_bytes(bytes(job.LARGE_BYTES + 1))
    (root / ".gitignore").write_text("models/\n")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    monkeypatch.chdir(root)
    return root


def write(name: str, content: dict[str, Any]) -> str:
    Path(name).write_text(yaml.safe_dump(content))
    return name


BIRDS = {"name": "birds", "method": {"name": "img2img"}, "prior": {"weights": "models/sd"}}


def test_everything_is_named_at_once_with_what_to_give(tree: Path) -> None:
    file = write("birds.yaml", {**BIRDS, "data": {
        "source": "imagefolder", "path": "data/birds", "ids": "large.csv", "classes": "../beside.csv"}})
    with pytest.raises(ConfigError) as refused:
        submit(JobOrder("expand", file), address=NOBODY)

    said = {line.partition(":")[0]: line for line in refused.value.problems}
    assert [*said] == ["out", "data.classes", "data.ids", "data.path", "prior.weights"]
    assert said["out"].endswith(f"--set out={tree}/runs")
    assert said["data.path"].endswith(f"--set data.path={tree}/data/birds")
    assert "outside of --working-dir" in said["data.classes"]
    assert "files above 5 MB stay here" in said["data.ids"]
    assert "what git ignores stay here" in said["prior.weights"]
    sets = [line.rpartition("--set ")[2] for line in refused.value.problems]
    with pytest.raises(UsageError, match="no Ray cluster answers"):
        submit(JobOrder("expand", file, sets), address=NOBODY)


def test_small_files_of_the_working_directory_are_sent(tree: Path) -> None:
    file = write("birds.yaml", {**BIRDS, "out": "/runs", "prior": {}, "data": {
        "source": "imagefolder", "path": "s3://bucket/birds", "ids": "lists/ids.txt"}})
    with pytest.raises(UsageError, match="no Ray cluster answers"):
        submit(JobOrder("expand", file), address=NOBODY)


@pytest.mark.parametrize(("verb", "content", "fields"), [
    ("train", {"name": "s", "out": "/runs", "data": {"source": "digits"}, "arms": [{"name": "a", "use": "x"}],
               "test": {"source": "digits", "split": "test"},
               "expansions": {"x": {"config": {"method": {"name": "img2img"}, "artifacts": {"adapter": "models/sd"},
                                               "prior": {"embeddings": [{"file": "models/sd", "token": "<a>"}]}}}},
               "extra_tests": {"y": {"source": "digits", "class_map": "../beside.csv"}}},
     ["expansions.x.config.artifacts.adapter", "expansions.x.config.prior.embeddings.0.file",
      "extra_tests.y.class_map"]),
    ("fit", {"name": "f", "out": "/runs", "data": {"source": "digits"}, "fit": {"scores": {
        "group": "birds.csv", "runs": ["runs/old"]}}}, ["fit.scores.group", "fit.scores.runs.0"]),
    ("expand", {"name": "r", "out": "/runs", "data": {"source": "digits"}, "allocate": {
        "rule": "loss", "scores": "birds.csv"}}, ["allocate.scores"]),
    ("report", {"out": "pages", "sources": {"a": ["runs/old", "/shared/runs/b"]}}, ["out", "sources.a.0"])])
def test_files_are_found_wherever_a_job_names_them(tree: Path, verb: str, content: dict[str, Any],
                                                   fields: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = write("job.yaml", content)
    (tree / "birds.csv").touch()
    monkeypatch.setattr(JobOrder, "name_and_folder", lambda order: ("s", f"{order.raw['out']}/s"))
    found = unsent_problems(checked(JobOrder(verb, file)), set(), tree)

    assert [line.partition(":")[0] for line in found] == fields
    assert [line for line in found if ".0" in line.partition(":")[0] and "--set" in line] == []  # a list has no fields


def test_a_study_file_that_a_sweep_names_travels_or_is_named(tree: Path) -> None:
    study = {"data": {"source": "digits"}, "arms": [{"name": "a"}]}
    sweep = {"name": "s", "out": "/runs", "space": {}, "study": write("study.yaml", study)}
    order = checked(JobOrder("sweep", write("sweep.yaml", sweep)))

    assert unsent_problems(order, {"study.yaml"}, tree) == []
    assert [line.partition(":")[0] for line in unsent_problems(order, set(), tree)] == ["study (a file)"]


def test_a_folder_is_asked_for_by_its_path_everywhere(tree: Path) -> None:
    for verb in job.RUN_VERBS:
        with pytest.raises(UsageError, match=f"{tree}/runs/old"):
            submit(JobOrder(verb, "runs/old"), address=NOBODY)
        with pytest.raises(UsageError, match="no Ray cluster answers"):
            submit(JobOrder(verb, str(tree / "runs/old")), address=NOBODY)


def test_a_machine_file_counts_and_is_named_where_the_job_finds_it(tree: Path) -> None:
    file = write("birds.yaml", {**BIRDS, "data": {"source": "digits"}})
    machine = write("../gpus.yaml", {"cluster": {"actors": 3}, "device": "cuda"})
    order = api.cluster._asked(file, "", ["cluster.actors=4"], machine, ())

    assert (order.verb, order.raw["cluster"], order.raw["prior"]["device"]) == ("expand", {"actors": 4}, "cuda")
    assert order.arguments("birds.yaml", "job/1/gpus.yaml") == [
        "expand", "birds.yaml", "--machine", "job/1/gpus.yaml", "--set", "cluster.actors=4"]
    with pytest.raises(ConfigError, match="a machine file has only"):
        api.submit(file, NOBODY, machine=write("bad.yaml", {"method": {}}))
    with pytest.raises(UsageError, match="works on a folder"):
        api.submit("/runs/x", NOBODY, verb="retry", machine=machine)


def test_a_file_of_another_verb_is_not_sent(tree: Path) -> None:
    file = write("birds.yaml", {**BIRDS, "data": {"source": "digits"}})
    with pytest.raises(ConfigError, match="this is a file for `rayexpand expand`"):
        api.submit(file, NOBODY, verb="train")
    with pytest.raises(UsageError, match="does not run as a job"):
        api.submit(file, NOBODY, verb="status")


def test_tables_over_studies_are_made_as_their_file_says() -> None:
    assert JobOrder("report", "figures.yaml").arguments("job/0/figures.yaml", None) == [
        "report", "--pivot", "job/0/figures.yaml"]
    assert JobOrder("report", "/runs/birds").arguments("/runs/birds", None) == ["report", "/runs/birds"]
