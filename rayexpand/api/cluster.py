"""The same files as jobs on a Ray cluster: sent, printed for Kubernetes, followed, stopped, listed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from rayexpand.api.files import KINDS, Set, as_overrides, parsed, read_job
from rayexpand.api.results import ClusterJob
from rayexpand.contract.errors import UsageError

if TYPE_CHECKING:
    from rayexpand.on_ray.job import JobOrder


def submit(job: str | os.PathLike[str], address: str | None = None, *, verb: str = "", set: Set = (),
           machine: str | os.PathLike[str] | None = None, trust: Sequence[str] = (),
           on_log: Callable[[str], None] = lambda text: None, say: Callable[[str], None] = lambda line: None,
           **options: Any) -> ClusterJob:
    """Runs a file (by the verb of its kind) or a folder (with `verb`) as a job on a cluster, and follows it.

    `options`: working_dir, wait, retries, env, num_cpus, python; see on_ray.submit.submit.
    """
    from rayexpand.on_ray import submit as on_cluster

    asked = _asked(job, verb, set, machine, trust)
    ended = on_cluster.submit(asked, address=address, on_log=on_log, say=say, **options)
    return ClusterJob(**asdict(ended))


def rayjob(job: str | os.PathLike[str], *, verb: str = "", set: Set = (),
           machine: str | os.PathLike[str] | None = None, trust: Sequence[str] = (), **options: Any) -> str:
    """YAML of the same job for Kubernetes; nothing is sent. `options`: image, retries, env; see on_ray.rayjob."""
    from rayexpand.on_ray import rayjob as on_kubernetes

    return on_kubernetes.rayjob(_asked(job, verb, set, machine, trust), **options)


def _asked(job: str | os.PathLike[str], verb: str, set: Set, machine: str | os.PathLike[str] | None,
           trust: Sequence[str]) -> JobOrder:
    """A job as `submit` and `rayjob` take it. Raises ConfigError for a file of another verb."""
    from rayexpand.on_ray.job import JobOrder

    target, at = os.fspath(job), None if machine is None else os.fspath(machine)
    wanted = JobOrder(verb, target, as_overrides(set), at, tuple(trust))
    if verb and not wanted.takes_file:
        if at is not None:
            raise UsageError(f"--machine {at}: `{verb}` works on a folder, which has its own; take it out")
        return wanted
    kind, raw, where = read_job(job, set, machine)
    verb = verb or KINDS[kind][1]
    taken = [one for one, (_, by) in KINDS.items() if by == verb]
    if taken and kind not in taken and (verb, kind) != ("fit", "run"):
        parsed(kind, raw, where, taken[0])  # which refuses it
    return replace(wanted, verb=verb, raw=raw)


def follow(submission_id: str, address: str | None = None, *, on_log: Callable[[str], None]) -> ClusterJob:
    """Follows the log of a job to its end."""
    from rayexpand.on_ray import submit as on_cluster

    return ClusterJob(**asdict(on_cluster.logs(submission_id, address=address, on_log=on_log)))


def stop(submission_id: str, address: str | None = None) -> ClusterJob:
    """Ends a job; the same command continues it."""
    from rayexpand.on_ray import submit as on_cluster

    return ClusterJob(**asdict(on_cluster.stop(submission_id, address=address)))


def cluster_jobs(address: str | None = None) -> list[dict[str, Any]]:
    """The jobs of this package on a cluster."""
    from rayexpand.on_ray import submit as on_cluster

    return on_cluster.jobs(address=address)
