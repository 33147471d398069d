"""The worker groups of a RayJob: what the stages of a job ask of a node, as groups of pods that have it.

Stages that ask for the same labels share a group. A pod has the GPUs of the largest process among them, and custom
resources for as many processes as fit on its GPUs, or CPUs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from rayexpand.contract.errors import ConfigError
from rayexpand.contract.settings import mistakes
from rayexpand.on_ray.job import JobOrder
from rayexpand.runs.config import ClusterConfig, Stage

STAGES: dict[str, tuple[Stage, ...]] = {  # of each verb that works on workers
    "expand": ("expand",), "retry": ("expand",), "fit": ("fit",), "select": ("judge",), "evaluate": ("judge",),
    "audit": ("fit", "expand", "judge", "train"), "train": ("fit", "expand", "judge", "train"), "sweep": ("train",)}
MARKET, GPU = "ray.io/market-type", "nvidia.com/gpu"


@dataclass(frozen=True)
class StageNeed:
    """The processes of a stage: how many at most (None: not said), and what each has."""

    processes: int | None
    cpus: float
    gpus: float | None  # None: one, for the pods have one
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


def needs_of(asked: JobOrder) -> list[StageNeed]:
    """What each stage of a job asks for. Raises ConfigError."""
    raw = asked.raw
    try:
        cluster = ClusterConfig(**(asked.run.get("cluster") or {}))
    except ValidationError as error:
        raise ConfigError(asked.target, mistakes(error, ClusterConfig, "cluster.")) from error
    found = []
    stages: tuple[Stage, ...] = ("expand", "train") if asked.is_loop else STAGES.get(asked.verb, ())
    for stage in stages:
        at = cluster.at(stage)
        sizes = [(at.actors, at.cpus_per_actor, at.gpus_per_actor)] if stage != "train" else []
        if asked.verb == "sweep":
            sizes = [(raw.get("max_concurrent"), raw.get("cpus_per_trial", 1.0), raw.get("gpus_per_trial"))]
        elif stage == "train":
            sizes = [_workers(raw.get("training") or {})]
        elif asked.verb == "fit" and (adapter := raw["fit"].get("adapter") or {}).get("workers"):
            sizes.append(_workers(adapter))
        found += [StageNeed(*size, at.resources, at.label_selector) for size in sizes]
    return found


def _workers(section: Mapping[str, Any]) -> tuple[int | None, float, float | None]:
    return section.get("workers") or None, section.get("cpus_per_worker", 1.0), section.get("gpus_per_worker")


def worker_groups(group: Mapping[str, Any], head: Mapping[str, Any], needs: Sequence[StageNeed],
                  ) -> list[dict[str, Any]]:
    """Groups like `group` that have what `needs` ask for, the first with its name; `head`: pods that are never on nodes
    that can be taken away."""
    by_labels: dict[tuple[tuple[str, str], ...], list[StageNeed]] = {}
    for need in needs:
        by_labels.setdefault(tuple(sorted(_labels(group["labels"], need.labels).items())), []).append(need)
    return [_group(group, head, dict(labels), alike, number) for number, (labels, alike) in
            enumerate(by_labels.items() or [(tuple(group["labels"].items()), [])])]


def _labels(known: Mapping[str, str], selector: Mapping[str, str]) -> dict[str, str]:
    """Labels that satisfy a selector: `value`, `in(a, b)`, `!value` or `!in(a, b)`."""
    labels = dict(known)
    for name, wanted in selector.items():
        listed = re.fullmatch(r"!?in\((.*)\)", wanted)
        values = [one.strip() for one in listed[1].split(",")] if listed else [wanted.removeprefix("!")]
        if wanted.startswith("!"):
            if labels.get(name) in values:
                del labels[name]
        elif labels.get(name) not in values:
            labels[name] = values[0]
    return labels


def _group(group: Mapping[str, Any], head: Mapping[str, Any], labels: dict[str, str], needs: Sequence[StageNeed],
           number: int) -> dict[str, Any]:
    made = deepcopy(dict(group))
    pod = made["template"]["spec"]
    (container,) = pod["containers"]
    limits, requests = container["resources"]["limits"], container["resources"]["requests"]
    each = [1.0 if need.gpus is None else need.gpus for need in needs]
    gpus = math.ceil(max(each, default=float(limits[GPU])))
    cpus = max([float(limits["cpu"]), *(need.cpus for need in needs)])
    fit = [max(1, int(gpus / one if one else cpus / need.cpus if need.cpus else 1))
           for need, one in zip(needs, each, strict=True)]
    custom = {name: max(need.resources.get(name, 0.0) * count for need, count in zip(needs, fit, strict=True))
              for name in sorted({name for need in needs for name in need.resources})}
    pods = [math.ceil(need.processes / count) for need, count in zip(needs, fit, strict=True) if need.processes]
    made |= {"labels": labels, "maxReplicas": max(pods, default=made["maxReplicas"])}
    if custom:
        made["resources"] = {name: f"{amount:g}" for name, amount in custom.items()}
    for place in (limits, requests):
        place[GPU] = str(gpus)
        if not gpus:
            del place[GPU]
    if cpus > float(limits["cpu"]):
        limits["cpu"] = requests["cpu"] = f"{math.ceil(cpus)}"
    if labels.get(MARKET) != group["labels"].get(MARKET):
        pod["affinity"] = deepcopy(head["template"]["spec"]["affinity"])
    if number:
        made["groupName"] = "-".join(["workers", str(number + 1)])
    return made


def gpus_of(group: Mapping[str, Any]) -> int:
    """GPUs of a pod of a group."""
    return int(group["template"]["spec"]["containers"][0]["resources"]["limits"].get(GPU, 0))
