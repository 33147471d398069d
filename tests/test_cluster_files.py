"""Every file of cluster/ against what reads it: Ray's launcher schema, the KubeRay API, `ray start`, this tree."""

from __future__ import annotations

import copy
import http.server
import os
import re
import shlex
import shutil
import subprocess
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from tests.commands import ROOT

CLUSTER = ROOT / "cluster"
LAUNCHER = ("local.yaml", "ray-up-aws.yaml", "ray-up-gcp.yaml")
KUBERAY = ("kuberay-raycluster.yaml", "kuberay-rayjob.yaml")
OTHER = ("Dockerfile", "README.md", "prometheus.yml", "grafana-dashboard.json")  # of these: api/test_endpoint.py

# Fields by type, as the API reference of ray.io/v1 lists them for KubeRay 1.6.2 (docs.ray.io, KubeRay CRD API
# reference) and, for pods, the Kubernetes API reference 1.28. A type in capitals is looked up here, [T] is a list of T,
# "map" holds strings by string, "any" is not looked into.
FIELDS: dict[str, dict[str, Any]] = {
    "RayCluster": {"apiVersion": "str", "kind": "str", "metadata": "ObjectMeta", "spec": "RayClusterSpec"},
    "RayJob": {"apiVersion": "str", "kind": "str", "metadata": "ObjectMeta", "spec": "RayJobSpec"},
    "RayJobSpec": {
        "activeDeadlineSeconds": "int", "backoffLimit": "int", "rayClusterSpec": "RayClusterSpec",
        "submitterPodTemplate": "PodTemplateSpec", "metadata": "map", "clusterSelector": "map",
        "submitterConfig": "SubmitterConfig", "managedBy": "str", "deletionStrategy": "DeletionStrategy",
        "entrypoint": "str", "runtimeEnvYAML": "str", "jobId": "str",
        "submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"}, "entrypointResources": "str",
        "entrypointNumCpus": "float", "entrypointNumGpus": "float", "ttlSecondsAfterFinished": "int",
        "preRunningDeadlineSeconds": "int", "shutdownAfterJobFinishes": "bool", "suspend": "bool"},
    "RayClusterSpec": {
        "upgradeStrategy": "RayClusterUpgradeStrategy", "authOptions": "AuthOptions", "suspend": "bool",
        "managedBy": "str", "autoscalerOptions": "AutoscalerOptions", "headServiceAnnotations": "map",
        "enableInTreeAutoscaling": "bool", "gcsFaultToleranceOptions": "GcsFaultToleranceOptions",
        "headGroupSpec": "HeadGroupSpec", "rayVersion": "str", "workerGroupSpecs": ["WorkerGroupSpec"]},
    "HeadGroupSpec": {
        "template": "PodTemplateSpec", "headService": "any", "enableIngress": "bool", "resources": "map",
        "labels": "map", "rayStartParams": "map", "serviceType": {"ClusterIP", "NodePort", "LoadBalancer"}},
    "WorkerGroupSpec": {
        "suspend": "bool", "groupName": "str", "replicas": "int", "minReplicas": "int", "maxReplicas": "int",
        "idleTimeoutSeconds": "int", "resources": "map", "labels": "map", "rayStartParams": "map",
        "template": "PodTemplateSpec", "scaleStrategy": "ScaleStrategy", "numOfHosts": "int"},
    "AutoscalerOptions": {
        "resources": "ResourceRequirements", "image": "str", "imagePullPolicy": "str",
        "securityContext": "SecurityContext", "idleTimeoutSeconds": "int",
        "upscalingMode": {"Default", "Aggressive", "Conservative"}, "version": {"v1", "v2"}, "env": ["EnvVar"],
        "envFrom": ["any"], "volumeMounts": ["VolumeMount"]},
    "AuthOptions": {"enableK8sTokenAuth": "bool", "secretName": "str", "mode": {"disabled", "token"}},
    "RayClusterUpgradeStrategy": {"type": {"Recreate", "None"}},
    "SubmitterConfig": {"backoffLimit": "int"},
    "ScaleStrategy": {"workersToDelete": ["str"]},
    "DeletionStrategy": {"onSuccess": "any", "onFailure": "any", "deletionRules": ["any"]},
    "GcsFaultToleranceOptions": {"redisUsername": "any", "redisPassword": "any", "externalStorageNamespace": "str",
                                 "redisAddress": "str"},
    "ObjectMeta": {"name": "str", "namespace": "str", "labels": "map", "annotations": "map", "generateName": "str",
                   "finalizers": ["str"]},
    "PodTemplateSpec": {"metadata": "ObjectMeta", "spec": "PodSpec"},
    "PodSpec": {
        "activeDeadlineSeconds": "int", "affinity": "Affinity", "automountServiceAccountToken": "bool",
        "containers": ["Container"], "dnsConfig": "any", "dnsPolicy": "str", "enableServiceLinks": "bool",
        "ephemeralContainers": ["any"], "hostAliases": ["any"], "hostIPC": "bool", "hostNetwork": "bool",
        "hostPID": "bool", "hostUsers": "bool", "hostname": "str", "imagePullSecrets": ["any"],
        "initContainers": ["Container"], "nodeName": "str", "nodeSelector": "map", "os": "any", "overhead": "map",
        "preemptionPolicy": "str", "priority": "int", "priorityClassName": "str", "readinessGates": ["any"],
        "resourceClaims": ["any"], "restartPolicy": "str", "runtimeClassName": "str", "schedulerName": "str",
        "schedulingGates": ["any"], "securityContext": "PodSecurityContext", "serviceAccount": "str",
        "serviceAccountName": "str", "setHostnameAsFQDN": "bool", "shareProcessNamespace": "bool", "subdomain": "str",
        "terminationGracePeriodSeconds": "int", "tolerations": ["Toleration"],
        "topologySpreadConstraints": ["any"], "volumes": ["any"]},
    "Container": {
        "args": ["str"], "command": ["str"], "env": ["EnvVar"], "envFrom": ["any"], "image": "str",
        "imagePullPolicy": "str", "lifecycle": "Lifecycle", "livenessProbe": "any", "name": "str",
        "ports": ["ContainerPort"], "readinessProbe": "any", "resizePolicy": ["any"],
        "resources": "ResourceRequirements", "restartPolicy": "str", "securityContext": "SecurityContext",
        "startupProbe": "any", "stdin": "bool", "stdinOnce": "bool", "terminationMessagePath": "str",
        "terminationMessagePolicy": "str", "tty": "bool", "volumeDevices": ["any"], "volumeMounts": ["VolumeMount"],
        "workingDir": "str"},
    "Lifecycle": {"postStart": "LifecycleHandler", "preStop": "LifecycleHandler"},
    "LifecycleHandler": {"exec": "ExecAction", "httpGet": "any", "sleep": "any", "tcpSocket": "any"},
    "ExecAction": {"command": ["str"]},
    "EnvVar": {"name": "str", "value": "str", "valueFrom": "EnvVarSource"},
    "EnvVarSource": {"configMapKeyRef": "any", "fieldRef": "any", "resourceFieldRef": "any",
                     "secretKeyRef": "SecretKeySelector"},
    "SecretKeySelector": {"key": "str", "name": "str", "optional": "bool"},
    "ContainerPort": {"containerPort": "int", "hostIP": "str", "hostPort": "int", "name": "str", "protocol": "str"},
    "ResourceRequirements": {"claims": ["any"], "limits": "map", "requests": "map"},
    "VolumeMount": {"mountPath": "str", "mountPropagation": "str", "name": "str", "readOnly": "bool", "subPath": "str",
                    "subPathExpr": "str"},
    "SecurityContext": {
        "allowPrivilegeEscalation": "bool", "capabilities": "Capabilities", "privileged": "bool", "procMount": "str",
        "readOnlyRootFilesystem": "bool", "runAsGroup": "int", "runAsNonRoot": "bool", "runAsUser": "int",
        "seLinuxOptions": "any", "seccompProfile": "SeccompProfile", "windowsOptions": "any"},
    "Capabilities": {"add": ["str"], "drop": ["str"]},
    "PodSecurityContext": {
        "fsGroup": "int", "fsGroupChangePolicy": "str", "runAsGroup": "int", "runAsNonRoot": "bool",
        "runAsUser": "int", "seLinuxOptions": "any", "seccompProfile": "SeccompProfile",
        "supplementalGroups": ["int"], "sysctls": ["any"], "windowsOptions": "any"},
    "SeccompProfile": {"localhostProfile": "str", "type": {"RuntimeDefault", "Localhost", "Unconfined"}},
    "Toleration": {"effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"}, "key": "str",
                   "operator": {"Exists", "Equal"}, "tolerationSeconds": "int", "value": "str"},
    "Affinity": {"nodeAffinity": "NodeAffinity", "podAffinity": "any", "podAntiAffinity": "any"},
    "NodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": ["any"],
                     "requiredDuringSchedulingIgnoredDuringExecution": "NodeSelector"},
    "NodeSelector": {"nodeSelectorTerms": ["NodeSelectorTerm"]},
    "NodeSelectorTerm": {"matchExpressions": ["NodeSelectorRequirement"], "matchFields": ["any"]},
    "NodeSelectorRequirement": {"key": "str", "operator": {"In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"},
                                "values": ["str"]},
}
REQUIRED = {"HeadGroupSpec": {"rayStartParams", "template"}, "RayClusterSpec": {"headGroupSpec"},
            "WorkerGroupSpec": {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"},
            "PodSpec": {"containers"}, "Container": {"name", "image"}, "EnvVar": {"name"}}
SCALARS = {"str": str, "int": int, "bool": bool, "float": (int, float)}


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def problems(value: Any, kind: Any, where: str = "") -> Iterator[str]:
    """Fields that the API does not know, lacks, or takes in another type."""
    if isinstance(kind, list):
        if not isinstance(value, list):
            yield f"{where}: not a list"
            return
        for i, one in enumerate(value):
            yield from problems(one, kind[0], f"{where}[{i}]")
    elif isinstance(kind, set):
        if value not in kind:
            yield f"{where}: {value!r} is none of {sorted(kind)}"
    elif kind == "map":
        if not isinstance(value, dict) or not all(isinstance(one, str) for one in (*value, *value.values())):
            yield f"{where}: not strings by string"
    elif kind in SCALARS:
        if not isinstance(value, SCALARS[kind]) or (kind == "int" and isinstance(value, bool)):
            yield f"{where}: {value!r} is not of type {kind}"
    elif kind != "any":
        if not isinstance(value, dict):
            yield f"{where}: not a {kind}"
            return
        yield from (f"{where}.{name}: missing" for name in REQUIRED.get(kind, set()) - value.keys())
        for name, inner in value.items():
            if name not in FIELDS[kind]:
                yield f"{where}.{name}: unknown field of {kind}"
            else:
                yield from problems(inner, FIELDS[kind][name], f"{where}.{name}")


def test_every_file_is_covered() -> None:
    assert {path.name for path in CLUSTER.iterdir()} == {*LAUNCHER, *KUBERAY, *OTHER}


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_files_follow_the_api(name: str) -> None:
    found = read(name)

    assert found["apiVersion"] == "ray.io/v1"
    assert list(problems(found, found["kind"], found["kind"])) == []


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(("change", "says"), [
    (lambda job: job["spec"].update(backOffLimit=3), "RayJob.spec.backOffLimit: unknown field of RayJobSpec"),
    (lambda job: job["spec"].update(ttlSecondsAfterFinished="600"), "is not of type int"),
    (lambda job: job["spec"].update(submissionMode="Kubernetes"), "is none of"),
    (lambda job: job["spec"]["rayClusterSpec"].update(enableInTreeAutoscaler=True), "enableInTreeAutoscaler"),
    (lambda job: job["spec"]["rayClusterSpec"]["autoscalerOptions"].update(idleTimeoutMinutes=10), "idleTimeoutMin"),
    (lambda job: job["spec"]["rayClusterSpec"]["autoscalerOptions"].update(version=2), "2 is none of"),
    (lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
     "rayStartParams: not strings by string"),
    (lambda job: job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].update(minWorkers=0), "minWorkers: unknown"),
    (lambda job: job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].pop("maxReplicas"), "maxReplicas: missing"),
    (lambda job: worker(job).update(lifeCycle={}), "lifeCycle: unknown field of Container"),
    (lambda job: worker(job)["env"][1]["valueFrom"].update(secretRef={}), "secretRef: unknown field of EnvVarSource"),
    (lambda job: worker(job)["resources"]["limits"].update({"nvidia.com/gpu": 1}), "limits: not strings by string")])
def test_a_mistake_in_a_kuberay_file_is_found(change: Change, says: str) -> None:
    broken = copy.deepcopy(read("kuberay-rayjob.yaml"))
    change(broken)

    assert any(says in problem for problem in problems(broken, "RayJob", "RayJob"))


def worker(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]


def cluster_spec(name: str) -> dict[str, Any]:
    spec = read(name)["spec"]
    return spec.get("rayClusterSpec", spec)


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_clusters_cost_nothing_when_idle_and_survive_spot(name: str) -> None:
    spec = cluster_spec(name)
    head, (group,) = spec["headGroupSpec"], spec["workerGroupSpecs"]
    pod = group["template"]["spec"]
    terms = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    spot = {(e["key"], e["values"][0]) for term in terms for e in term["matchExpressions"]}
    (never,) = head["template"]["spec"]["affinity"]["nodeAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]

    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["autoscalerOptions"]["idleTimeoutSeconds"] == group["idleTimeoutSeconds"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert (group["minReplicas"], group["replicas"]) == (0, 0)
    assert group["labels"] == {"ray.io/market-type": "spot"}
    said = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert re.search(r"^ray drain-node .*deadline-remaining-seconds 20 && sleep 20; ray stop$", said)
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {(e["key"], e["values"][0]) for e in never["matchExpressions"]} == spot
    assert {e["operator"] for e in never["matchExpressions"]} == {"NotIn"}
    tolerated = {toleration["key"] for toleration in pod["tolerations"]}
    assert tolerated == {"nvidia.com/gpu", "cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"}


def test_both_kuberay_files_describe_one_cluster() -> None:
    assert cluster_spec(KUBERAY[0]) == cluster_spec(KUBERAY[1])


def test_a_rayjob_ends_and_its_command_is_ours() -> None:
    spec = read("kuberay-rayjob.yaml")["spec"]
    python, flag, package, verb, file, *rest = shlex.split(spec["entrypoint"])

    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["backoffLimit"] >= 3
    assert (python, flag, package, verb) == ("python", "-m", "rayexpand", "expand")
    assert (ROOT / Path(file).relative_to("/home/ray/rayexpand")).is_file()
    from rayexpand.runs.config import load

    config = load(ROOT / Path(file).relative_to("/home/ray/rayexpand"), rest[1::2])
    assert set(rest[::2]) == {"--set"}
    assert config.out.startswith("s3://")


@pytest.mark.parametrize("name", KUBERAY)
def test_secrets_come_by_reference(name: str) -> None:
    spec = cluster_spec(name)
    pods = [spec["headGroupSpec"]["template"]["spec"], spec["workerGroupSpecs"][0]["template"]["spec"]]

    assert spec["authOptions"]["mode"] == "token"
    for pod in pods:
        (container,) = pod["containers"]
        shown = {one["name"]: one["value"] for one in container["env"] if "value" in one}
        assert shown == {"RAYEXPAND_NODE_GPUS": pods[1]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]}
        assert all("secretKeyRef" in one["valueFrom"] for one in container["env"] if one["name"] not in shown)
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True


def launcher_config(found: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(found))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_launcher_accepts_its_files(name: str) -> None:
    prepared = launcher_config(read(name))

    assert prepared["head_node_type"] in prepared["available_node_types"]


@pytest.mark.parametrize("change", [
    lambda found: found.update(idle_timeout=10),
    lambda found: found.update(max_workers="8"),
    lambda found: found["available_node_types"]["gpu-spot"].update(spot=True),
    lambda found: found["available_node_types"]["gpu-spot"]["resources"].update(GPU=0.5),
    lambda found: found["docker"].update(images=[]),
    lambda found: found.update(head_node_type="absent")])
def test_a_mistake_in_a_launcher_file_is_found(change: Change) -> None:
    broken = read("ray-up-aws.yaml")
    change(broken)
    with pytest.raises(Exception, match=r"is not valid|not of type|were unexpected|was unexpected|head_node_type"):
        launcher_config(broken)


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_start_knows_every_option(name: str) -> None:
    from ray.scripts.scripts import drain_node, start

    known = {option for parameter in [*start.params, *drain_node.params] for option in parameter.opts}
    found = read(name)
    head, workers = (" ".join(found[f"{node}_start_ray_commands"]) for node in ("head", "worker"))

    assert set(re.findall(r"--[a-z-]+", f"{head} {workers}")) <= known
    assert "--num-cpus=0" in head
    assert "--dashboard-host=127.0.0.1" in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "--address=$RAY_HEAD_IP:6379" in workers
    assert "auth_token" in str(found["file_mounts"])
    assert "RAY_AUTH_MODE=token" in str(found)


@pytest.mark.parametrize(("name", "spot"), [
    ("ray-up-aws.yaml", lambda node: node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"),
    ("ray-up-gcp.yaml", lambda node: node.get("scheduling", {}).get("provisioningModel") == "SPOT")])
def test_clouds_have_an_on_demand_head_and_spot_workers(name: str, spot: Callable[[dict[str, Any]], bool]) -> None:
    found = read(name)
    head, gpu = found["available_node_types"]["head"], found["available_node_types"]["gpu-spot"]

    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert not spot(head["node_config"])
    assert spot(gpu["node_config"])
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, found["max_workers"])
    assert gpu["resources"]["GPU"] == 1
    assert found["idle_timeout_minutes"] <= 15


def test_one_ray_version_inside_our_range() -> None:
    (wanted,) = [one for one in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
                 if one.startswith("ray[")]
    text = (CLUSTER / "Dockerfile").read_text()
    (base,) = re.findall(r"^FROM rayproject/ray:([0-9.]+)-py311$", text, re.MULTILINE)
    assert "-c constraints.txt" in text
    (pinned,) = re.findall(r"^ray==([0-9.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)

    assert {base, pinned, *(cluster_spec(name)["rayVersion"] for name in KUBERAY)} == {base}
    assert base in SpecifierSet(wanted.partition("]")[2])
    assert base in (CLUSTER / "README.md").read_text()


def test_one_image() -> None:
    from rayexpand import __version__

    images = [container["image"] for name in KUBERAY for group in
              (cluster_spec(name)["headGroupSpec"], *cluster_spec(name)["workerGroupSpecs"])
              for container in group["template"]["spec"]["containers"]]
    images += [read(name)["docker"]["image"] for name in LAUNCHER[1:]]

    assert set(images) == {f"registry.example.com/rayexpand:{__version__}"}
    assert images[0] in (CLUSTER / "Dockerfile").read_text()


def test_the_dockerfile_copies_what_is_there_and_is_not_root() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#")]
    sources = [source for step, rest in steps if step == "COPY" for source in rest.split()[1:-1]]

    assert {step for step, _ in steps} <= {"FROM", "ENV", "USER", "WORKDIR", "COPY", "RUN"}
    assert [rest for step, rest in steps if step == "USER"][-1] == "ray"
    assert {"pyproject.toml", "rayexpand", "jobs"} <= set(sources)
    assert all((ROOT / source).exists() for source in sources)


def test_the_readme_names_every_file_and_every_option() -> None:
    text = (CLUSTER / "README.md").read_text()

    assert all(f"[{name}]({name})" in text for name in (*LAUNCHER, *KUBERAY, "Dockerfile"))
    for name in (*LAUNCHER, *KUBERAY):
        comments = "\n".join(line for line in (CLUSTER / name).read_text().splitlines() if line.startswith("#"))
        assert "rayexpand submit" in comments or name == "kuberay-rayjob.yaml"
        assert f"cluster/{name}" in comments
        assert "# Change:" in comments


def test_no_file_holds_a_secret() -> None:
    secret = re.compile(r"AKIA[0-9A-Z]{16}|hf_\w{20}|-----BEGIN|(token|password|secret)\s*[:=]\s*[\"']\w", re.I)
    for path in CLUSTER.iterdir():
        assert not secret.search(path.read_text()), path.name


class Metadata(http.server.BaseHTTPRequestHandler):
    """What a spot machine of either cloud says about itself, once it will be taken away: at the third look."""

    looks = 0

    def do_PUT(self) -> None:
        self._say(b"token")

    def do_GET(self) -> None:
        type(self).looks += 1
        self._say(b"TRUE" if self.looks > 2 else None if "spot" in self.path else b"FALSE")

    def _say(self, content: bytes | None) -> None:
        self.send_response(200 if content is not None else 404)
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *_: object) -> None: ...


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
@pytest.mark.parametrize(("name", "seconds"), [("ray-up-aws.yaml", "110"), ("ray-up-gcp.yaml", "25")])
def test_a_spot_notice_of_the_cloud_reaches_ray(name: str, seconds: str, tmp_path: Path) -> None:
    """The loop of the file against metadata that change, with a `ray` and a `sleep` that write down what they hear."""
    (loop,) = [one for one in yaml.safe_load((CLUSTER / name).read_text())["worker_start_ray_commands"]
               if "METADATA" in one]
    for tool in ("ray", "sleep"):
        (tmp_path / tool).write_text(f'#!/bin/sh\necho {tool} "$@" >> {tmp_path}/heard\n')
        (tmp_path / tool).chmod(0o755)
    Metadata.looks = 0
    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        subprocess.run(["/bin/sh", "-c", loop.replace("~/spot-notice.log", f"{tmp_path}/log") + " wait"], check=True,
                       timeout=60, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}",
                                        "METADATA": f"http://127.0.0.1:{server.server_port}"})
        server.shutdown()
    *pauses, told = (tmp_path / "heard").read_text().splitlines()

    assert [one.split()[0] for one in pauses] == ["sleep"] * 2
    assert told == ("ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message spot notice "
                    f"--deadline-remaining-seconds {seconds}")
