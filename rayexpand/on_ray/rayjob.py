"""A job as Kubernetes takes it: a ConfigMap with the job file, and a RayJob of KubeRay that runs it.

The RayJob is that of cluster/kuberay-rayjob.yaml, which brings its cluster and takes it away, with this job's name,
command, number of workers and environment. Nothing else travels: data, models and further files must be paths or URLs
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
from rayexpand.contract.secrets import secret_problems
from rayexpand.contract.settings import read
from rayexpand.on_ray.submit import FILE_VERBS, environment_of, run_name, unsent_problems

FOLDER = "/home/ray/job"  # where the job file is in the head's pod
SECRET = "rayexpand-secrets"  # noqa: S105  (the name of a secret, not one)
LARGEST = 1_000_000  # bytes: a ConfigMap holds a mebibyte


def rayjob(verb: str, target: str, overrides: Sequence[str] = (), *, image: str | None = None, retries: int = 5,
           env: Sequence[str] = (), trust: Sequence[str] = ()) -> str:
    """YAML of both objects, for `kubectl apply -f -`.

    `image`: of head and workers, with this package; null: that of the file. As many workers at most as
    `cluster.actors`. `env`: NAME is taken from the secret rayexpand-secrets, NAME=value is written in the open. Raises
    UsageError for what is no job, and ConfigError for files that a pod would not find.
    """
    in_file = verb in FILE_VERBS
    said = {"target": target, **(read(target, overrides) if in_file else {})}
    problems = secret_problems(said) or (unsent_problems(verb, target, overrides, set()) if in_file else [])
    if problems:
        raise ConfigError(target, problems)
    name = kubernetes_name(run_name(verb, target, overrides))
    references, settings = environment_of(env)
    made: dict[str, Any] = yaml.safe_load((files("rayexpand") / "cluster" / "kuberay-rayjob.yaml").read_text())
    made = deepcopy(made)  # of the anchors, each pod has its own
    made["metadata"]["name"] = name
    spec, cluster = made["spec"], made["spec"]["rayClusterSpec"]
    place = f"{FOLDER}/{Path(target).name}" if in_file else target
    spec["entrypoint"] = shlex.join(["python", "-m", "rayexpand", verb, place,
                                     *(part for one in overrides for part in ("--set", one)),
                                     *(part for one in trust for part in ("--trust", one))])
    spec["backoffLimit"] = retries
    (group,) = cluster["workerGroupSpecs"]
    group["maxReplicas"] = (said.get("cluster") or {}).get("actors") or group["maxReplicas"]
    for part in (cluster["headGroupSpec"], group):
        (container,) = part["template"]["spec"]["containers"]
        container["image"] = image or container["image"]
        container["env"] = _environment(container["env"], references, settings)
    objects = [made]
    if in_file:
        objects.insert(0, _with_file(cluster["headGroupSpec"]["template"]["spec"], name, Path(target)))
    return yaml.dump_all(objects, Dumper=_Plain, sort_keys=False, allow_unicode=True)


def kubernetes_name(name: str) -> str:
    """A name as Kubernetes takes it for pods of a job: at most 47 of a-z, 0-9 and -."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:47].rstrip("-") or "rayexpand"


def _with_file(pod: dict[str, Any], name: str, file: Path) -> dict[str, Any]:
    """The ConfigMap of the file, which the pod of the head mounts."""
    content = file.read_text()
    if len(content.encode()) > LARGEST:
        raise UsageError(f"{file} has {len(content.encode()):,} bytes, and a ConfigMap holds {LARGEST:,}; put it into "
                         "the image, or where every pod sees it")
    pod["volumes"] = [{"name": "job", "configMap": {"name": name}}]
    pod["containers"][0]["volumeMounts"] = [{"name": "job", "mountPath": FOLDER, "readOnly": True}]
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {file.name: content}}


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
