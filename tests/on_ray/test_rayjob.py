from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayexpand import api
from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.on_ray.job import JobOrder
from rayexpand.on_ray.rayjob import FOLDER, kubernetes_name, rayjob
from rayexpand.on_ray.rayjob_groups import gpus_of
from tests.commands import ROOT, rayexpand
from tests.test_cluster_files import problems

SHARED = "out=s3://bucket/runs"


@pytest.fixture
def job(tmp_path: Path) -> str:
    path = tmp_path / "birds.yaml"
    path.write_text("name: Birds_5x\n# vögel\ndata: {source: digits}\nmethod: {name: img2img, ratio: 5}\n"
                    "cluster: {actors: 12}\n")
    return str(path)


def objects(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    config_map, made = yaml.safe_load_all(text)
    return config_map, made


def test_a_rayjob_follows_the_api_and_brings_its_file(job: str) -> None:
    config_map, made = objects(rayjob(JobOrder("expand", job, [SHARED]), image="registry/rx:1", retries=2))
    cluster = made["spec"]["rayClusterSpec"]
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]
    pod = head["template"]["spec"]

    assert list(problems(made, "RayJob", "RayJob")) == []
    assert made["metadata"]["name"] == config_map["metadata"]["name"] == "birds-5x"
    assert shlex.split(made["spec"]["entrypoint"]) == ["python", "-m", "rayexpand", "expand", f"{FOLDER}/birds.yaml",
                                                       "--set", SHARED]
    assert config_map["data"]["birds.yaml"] == Path(job).read_text()
    assert pod["volumes"] == [{"name": "job", "configMap": {"name": "birds-5x"}}]
    assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == FOLDER
    assert (made["spec"]["backoffLimit"], workers["maxReplicas"], workers["minReplicas"]) == (2, 12, 0)
    assert {one["template"]["spec"]["containers"][0]["image"] for one in (head, workers)} == {"registry/rx:1"}


def test_the_environment_of_both_pods_names_secrets_and_shows_values(job: str) -> None:
    _, made = objects(rayjob(JobOrder("expand", job, [SHARED]), env=["HF_TOKEN", "AWS_REGION=eu-1"]))
    cluster = made["spec"]["rayClusterSpec"]
    for part in (cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]):
        env = {one.pop("name"): one for one in part["template"]["spec"]["containers"][0]["env"]}
        assert env == {"HF_TOKEN": {"valueFrom": {"secretKeyRef": {"name": "rayexpand-secrets", "key": "HF_TOKEN"}}},
                       "AWS_REGION": {"value": "eu-1"}, "RAYEXPAND_NODE_GPUS": {"value": "1"}}


def test_without_changes_it_is_the_file_of_the_cluster_folder(job: str) -> None:
    _, made = objects(rayjob(JobOrder("expand", job, [SHARED])))
    file = yaml.safe_load((ROOT / "cluster" / "kuberay-rayjob.yaml").read_text())
    ours, theirs = made["spec"]["rayClusterSpec"], file["spec"]["rayClusterSpec"]
    ours["headGroupSpec"]["template"]["spec"].pop("volumes")
    ours["headGroupSpec"]["template"]["spec"]["containers"][0].pop("volumeMounts")
    ours["workerGroupSpecs"][0]["maxReplicas"] = theirs["workerGroupSpecs"][0]["maxReplicas"]

    assert ours == theirs


MACHINE = {"cluster": {"actors": 8, "gpus_per_actor": 0.5, "resources": {"disk": 2}, "stages": {
    "fit": {"actors": 3, "gpus_per_actor": 2, "cpus_per_actor": 16,
            "label_selector": {"ray.io/market-type": "on-demand", "zone": "in(a, b)"}}}}}
VERBS = {
    "expand": {"method": {"name": "img2img", "ratio": 5}, "data": {"source": "digits"}},
    "fit": {"data": {"source": "digits"}, "fit": {"adapter": {"recipe": {"preset": "tiny", "steps": 1}, "workers": 4,
                                                              "cpus_per_worker": 2}}},
    "train": {"data": {"source": "digits"}, "test": {"source": "digits", "split": "test"}, "arms": [{"name": "a"}],
              "training": {"workers": 6}},
    "sweep": {"study": {"data": {"source": "digits"}, "test": {"source": "digits", "split": "test"},
                        "arms": [{"name": "a"}]}, "arm": "a", "space": {"recipe.lr": [0.1, 0.2]}, "gpus_per_trial": 0.5,
              "max_concurrent": 7},
    "select": {"run": "s3://bucket/runs/x", "rule": {"kind": "random", "n": 1}},
    "evaluate": {"run": "s3://bucket/runs/x", "reference": {"source": "digits"}},
    "audit": {"audit": {"run": "s3://bucket/runs/x"}}}
GROUPS = {  # labels, most pods, GPUs, custom resources of each
    "expand": [("spot", 4, 1, {"disk": "4"})], "select": [("spot", 4, 1, {"disk": "4"})],
    "evaluate": [("spot", 4, 1, {"disk": "4"})], "sweep": [("spot", 4, 1, {"disk": "4"})],
    "fit": [("on-demand", 3, 2, {"disk": "4"})],
    "train": [("on-demand", 3, 2, {"disk": "2"}), ("spot", 6, 1, {"disk": "4"})],
    "audit": [("on-demand", 3, 2, {"disk": "2"}), ("spot", 4, 1, {"disk": "4"})]}


@pytest.mark.parametrize("verb", VERBS)
def test_workers_have_what_the_stages_of_a_verb_ask_for(verb: str, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.yaml" for name in ("job", "machine")}
    for name, content in (("job", {"name": "one", **VERBS[verb]}), ("machine", MACHINE)):
        files[name].write_text(yaml.safe_dump(content))
    config_map, made = objects(api.rayjob(files["job"], verb=verb, machine=files["machine"], set=(
        [] if verb in ("select", "evaluate", "audit") else [SHARED])))
    cluster = made["spec"]["rayClusterSpec"]
    groups, head = cluster["workerGroupSpecs"], cluster["headGroupSpec"]

    assert list(problems(made, "RayJob", "RayJob")) == []
    assert [*config_map["data"]] == ["job.yaml", "machine-machine.yaml"]
    assert shlex.split(made["spec"]["entrypoint"])[3:7] == [
        verb, f"{FOLDER}/job.yaml", "--machine", f"{FOLDER}/machine-machine.yaml"]
    assert [(one["labels"]["ray.io/market-type"], one["maxReplicas"], gpus_of(one), one["resources"])
            for one in groups] == GROUPS[verb]
    assert len({one["groupName"] for one in groups}) == len(groups)
    for one in groups:
        pod = one["template"]["spec"]
        is_spot = one["labels"]["ray.io/market-type"] == "spot"
        assert (pod["affinity"] == head["template"]["spec"]["affinity"]) != is_spot
        assert one["labels"].get("zone") == (None if is_spot else "a")
        assert is_spot or pod["containers"][0]["resources"]["limits"]["cpu"] == "16"
        assert {"name": "RAYEXPAND_NODE_GPUS", "value": str(max(map(gpus_of, groups)))} in pod["containers"][0]["env"]


def test_a_loop_is_one_job_whose_workers_expand_and_train(tmp_path: Path) -> None:
    (tmp_path / "machine.yaml").write_text(yaml.safe_dump(MACHINE))
    (tmp_path / "loop.yaml").write_text(yaml.safe_dump({
        "kind": "loop", "run": {"name": "birds", **VERBS["expand"]}, "rounds": {"count": 2},
        "training": {"workers": 6}}))
    with pytest.raises(UsageError, match=r"run\.out: 'runs' is relative.*--set run\.out="):
        rayjob(JobOrder("expand", str(tmp_path / "loop.yaml")))
    config_map, made = objects(api.rayjob(tmp_path / "loop.yaml", machine=tmp_path / "machine.yaml",
                                          set=["run.out=s3://bucket/runs"]))
    groups = made["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert config_map["metadata"]["name"] == "birds"
    assert shlex.split(made["spec"]["entrypoint"])[3:5] == ["expand", f"{FOLDER}/loop.yaml"]
    assert [(one["labels"]["ray.io/market-type"], one["maxReplicas"], gpus_of(one), one["resources"])
            for one in groups] == [("spot", 6, 1, {"disk": "4"})]


def test_pods_without_gpus_for_what_needs_none(job: str) -> None:
    _, made = objects(rayjob(JobOrder("expand", job, [SHARED, "cluster.gpus_per_actor=0"])))
    (group,) = made["spec"]["rayClusterSpec"]["workerGroupSpecs"]

    assert [*group["template"]["spec"]["containers"][0]["resources"]["limits"]] == ["cpu", "memory"]
    assert group["maxReplicas"] == 2  # 12 actors, 8 CPUs a pod


def test_labels_that_are_forbidden_are_taken_off(job: str) -> None:
    for wanted, left in (("!spot", None), ("!in(spot, x)", None), ("!x", "spot"), ("in(x, spot)", "spot")):
        _, made = objects(rayjob(JobOrder("expand", job, [SHARED, "cluster.label_selector={ray.io/market-type: "
                                                                  f"'{wanted}'}}"])))
        assert made["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["labels"].get("ray.io/market-type") == left


def test_what_a_pod_would_not_find_is_refused(job: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        rayjob(JobOrder("expand", job, ["data={source: imagefolder, path: data/birds}"]))
    assert "out: 'runs' is relative" in str(refused.value)
    assert "data.path: 'data/birds' is not sent" in str(refused.value)
    Path(job).write_text(Path(job).read_text() + "#" * 1_000_001)
    with pytest.raises(UsageError, match="a ConfigMap holds 1,000,000"):
        rayjob(JobOrder("expand", job, [SHARED]))


def test_a_verb_of_a_run_needs_no_file() -> None:
    (made,) = yaml.safe_load_all(rayjob(JobOrder("retry", "s3://bucket/runs/birds")))

    assert shlex.split(made["spec"]["entrypoint"])[3:] == ["retry", "s3://bucket/runs/birds"]
    assert "volumes" not in made["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]


@pytest.mark.parametrize(("name", "says"), [
    ("Birds_5x", "birds-5x"), ("a" * 60, "a" * 47), ("..", "rayexpand"), ("x" * 46 + ".y", "x" * 46)])
def test_names_are_those_of_kubernetes(name: str, says: str) -> None:
    assert kubernetes_name(name) == says


def test_the_flag_prints_and_sends_nothing(job: str) -> None:
    ended = rayexpand("submit", "expand", job, "--set", SHARED, "--rayjob", "--address", "http://127.0.0.1:1")

    assert ended.returncode == 0, ended.stderr
    assert [one["kind"] for one in yaml.safe_load_all(ended.stdout)] == ["ConfigMap", "RayJob"]
