"""A job as Kubernetes takes it: a ConfigMap with the job file, and a RayJob of KubeRay that runs it.

The RayJob is that of cluster/kuberay-rayjob.yaml, which brings its cluster and takes it away, with this job's name,
command, workers and environment. Nothing else travels: data, models and further files must be paths or URLs
that every pod sees.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.on_ray.job import JobOrder, checked, environment_of, unsent_problems
from rayexpand.on_ray.pool import NODE_GPUS
from rayexpand.on_ray.rayjob_groups import gpus_of, needs_of, worker_groups

FOLDER = "/home/ray/job"  # where the job file is in the head's pod
SECRET = "rayexpand-secrets"  # noqa: S105  (the name of a secret, not one)
LARGEST = 1_000_000  # bytes: a ConfigMap holds a mebibyte


def rayjob(job: JobOrder, *, image: str | None = None, retries: int = 5, env: Sequence[str] = ()) -> str:
    """YAML of both objects, for `kubectl apply -f -`.

    `image`: of head and workers, with this package; null: that of the file. What is said of the cluster
    decides the groups of workers (rayjob_groups.py). `env`: NAME is taken from the secret rayexpand-secrets,
    NAME=value is written in the open. Raises UsageError for what is no job, and ConfigError for files that a pod would
    not find.
    """
    asked = checked(job)
    target, machine = asked.target, asked.machine or ""
    name = kubernetes_name(asked.name_and_folder()[0])
    if problems := unsent_problems(asked, set()):
        raise ConfigError(target, problems)
    references, settings = environment_of(env)
    made: dict[str, Any] = yaml.safe_load((files("rayexpand") / "cluster" / "kuberay-rayjob.yaml").read_text())
    made = deepcopy(made)  # of the anchors, each pod has its own
    made["metadata"]["name"] = name
    spec, cluster = made["spec"], made["spec"]["rayClusterSpec"]
    brought = {file: Path(file).name if file == target else f"machine-{Path(file).name}" for file in asked.files}
    inside = {file: f"{FOLDER}/{key}" for file, key in brought.items()}
    spec["entrypoint"] = shlex.join(["python", "-m", "rayexpand", *asked.arguments(
        inside.get(target, target), inside.get(machine))])
    spec["backoffLimit"] = retries
    head, (group,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    cluster["workerGroupSpecs"] = worker_groups(group, head, needs_of(asked))
    settings[NODE_GPUS] = str(max(gpus_of(one) for one in cluster["workerGroupSpecs"]))
    for part in (head, *cluster["workerGroupSpecs"]):
        (container,) = part["template"]["spec"]["containers"]
        container["image"] = image or container["image"]
        container["env"] = _environment(container["env"], references, settings)
    objects = [made] if not brought else [_with_files(head["template"]["spec"], name, brought), made]
    return yaml.dump_all(objects, Dumper=_Plain, sort_keys=False, allow_unicode=True)


def kubernetes_name(name: str) -> str:
    """A name as Kubernetes takes it for pods of a job: at most 47 of a-z, 0-9 and -."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:47].rstrip("-") or "rayexpand"


def _with_files(pod: dict[str, Any], name: str, files: Mapping[str, str]) -> dict[str, Any]:
    """The ConfigMap of the files, which the pod of the head mounts."""
    content = {key: Path(file).read_text() for file, key in files.items()}
    if (size := sum(len(one.encode()) for one in content.values())) > LARGEST:
        raise UsageError(f"{', '.join(files)}: {size:,} bytes, and a ConfigMap holds {LARGEST:,}; put what is "
                         "large into the image, or where every pod sees it")
    pod["volumes"] = [{"name": "job", "configMap": {"name": name}}]
    pod["containers"][0]["volumeMounts"] = [{"name": "job", "mountPath": FOLDER, "readOnly": True}]
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": content}


def _environment(known: Sequence[Mapping[str, Any]], references: Sequence[str],
                 settings: Mapping[str, str]) -> list[dict[str, Any]]:
    """Those of the file, names from the secret that must be there, and values."""
    found = {one["name"]: dict(one) for one in known}
    for name in references:
        found[name] = {"name": name, "valueFrom": {"secretKeyRef": {"name": SECRET, "key": name}}}
    for name, value in settings.items():
        found[name] = {"name": name, "value": value}
    return list(found.values())


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Plain.add_representer(str, _text)
