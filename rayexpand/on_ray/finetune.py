"""Fine-tuning on Ray: latents by an actor pool, training by Ray Train workers with Ray Data loaders beside each.

Worker r of W trains on rows r B / W .. (r + 1) B / W - 1 of every batch, made by loader processes on its own node from
the cached latents. Base model, latents, captions and features are used where they lie, or staged to a node under their
content hash. The folder of the unfinished work (checkpoints, sheets, curves, result) must be one that all nodes see.

A checkpoint is one file that rank 0 replaces whole; Ray restarts dead workers, which read it again, and a new driver
goes on from it. What a notice and the loss of a node do is told in preemption.py. Ray's own reported checkpoints are
not used, because a worker that dies can take the last one with it.
The number of workers is fixed: a batch is cut into as many equal slices, the sums of an update depend on the cut, and
so a fine-tuning resized while it runs (Ray's elastic workers) would have no content that could be named.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import ray
import ray.data

from rayexpand.artifacts.store import read_facts
from rayexpand.contract.errors import EnvironmentFault, Interrupted, RayexpandError, UsageError, packed, unpacked
from rayexpand.contract.protocols import Progress
from rayexpand.contract.schema import SeedIndex
from rayexpand.fitting.adapter.fit import LatentTask, TuneEngine, open_maker
from rayexpand.fitting.adapter.latents import LatentMaker, LatentPart
from rayexpand.fitting.adapter.loader import LatentLoader, LatentRows, Sources
from rayexpand.fitting.adapter.train import RunLogger, TuneJob, open_tuning, train_here, tune
from rayexpand.fitting.config import FitConfig
from rayexpand.models.folders import ModelFiles
from rayexpand.models.prior import inspect_prior, prior_model
from rayexpand.on_ray.loaders import SPAN_IMAGES, Columns, LoaderTime, loaded_steps, spans_of, timed_steps
from rayexpand.on_ray.pool import at_driver, cause_of, check_shared, ending, enter, gpus_each, place_of
from rayexpand.on_ray.preemption import Deaths, Leaving
from rayexpand.on_ray.spans import SpanActor, over_spans
from rayexpand.on_ray.stage import artifact_model, local, open_model_server
from rayexpand.on_ray.workers import Notices, mean_over_workers, train_on_workers
from rayexpand.runs.config import ClusterConfig
from rayexpand.storage.position import read_position

SPAN_BYTES = 64 << 20  # of the images one loader task makes, at most
WORKER_FAILURES = 4  # failures of workers before the fine-tuning counts as failed; nodes taken away do not count
DRIVER_RETRIES = 16  # deaths of the process that watches the workers
REFUSED = "refused"  # a file in the folder of a job


def tuning_on(config: FitConfig, connect: Callable[[], Any], task: Callable[..., Any] | None = None) -> TuneEngine:
    """Where a fine-tuning of this configuration runs; `connect` joins the cluster when there is something to do. One
    without workers is trained in this process, or by `task(told, folder, function, *arguments)` on a worker."""
    def parts(task: LatentTask, index: SeedIndex, wanted: list[range], costs: dict[str, Any]) -> Iterator[LatentPart]:
        connect()
        return latent_parts(config, task, index, wanted, costs)

    def train(job: TuneJob, progress: Progress) -> float:
        if not job.made.workers and task is None:
            return train_here(job, progress)
        connect()
        if not job.made.workers and task is not None:
            progress("fine-tuning on a worker", 0, job.made.finetune.steps)
            with ending(open_model_server(dict(_parts(job).values()))) as server:
                task(lambda said: progress(said["task"], said["step"], said["total"]), job.folder, _train_alone, job,
                     server)
            return 0.0
        train_spread(job, progress, config.cluster.at("fit"))
        return 0.0

    return TuneEngine(parts, train, spreads=True)


def _train_alone(job: TuneJob, server: Any, folder: str) -> None:
    """A fine-tuning without workers, in a task; what stops is continued from its last checkpoint by the next one."""
    check_shared(folder)
    train_here(_local_job(job, server), lambda *_: None, Leaving())


# -------------------------------------------------------------------------------------------------------------- latents


def latent_parts(config: FitConfig, task: LatentTask, index: SeedIndex, wanted: list[range],
                 costs: dict[str, Any]) -> Iterator[LatentPart]:
    """Latents of the wanted spans, in any order. Raises ModelError or EnvironmentFault for a fault of the nodes."""
    models = {task.base.sha256: prior_model(task.base.weights)}
    for row in over_spans(LatentActor, {"task": task}, config, models, index, task.views.batch, costs, spans=wanted):
        shape = (-1, *json.loads(row["shape"]))
        mean, std = (np.frombuffer(row[name], task.views.dtype).reshape(shape) for name in ("mean", "std"))
        told = np.frombuffer(row["embedding"], np.float32)
        yield LatentPart(row["first"], np.frombuffer(row["rows"], np.int64), mean, std, json.loads(row["refused"]),
                         told.reshape(*mean.shape[:2], -1) if len(told) else None)


class LatentActor(SpanActor):
    nothing: ClassVar[dict[str, Any]] = {"rows": b"", "mean": b"", "std": b"", "embedding": b"", "shape": "[]",
                                         "first": 0, "refused": "{}"}

    def __init__(self, task: LatentTask, server: Any, cwd: str) -> None:
        super().__init__(server, cwd)
        self._task = task
        self._maker: LatentMaker | None = None

    def _made(self, rows: range) -> dict[str, Any]:
        part = self._get()(rows)
        told = b"" if part.embedding is None else part.embedding.tobytes()
        return {"rows": part.rows.tobytes(), "mean": part.mean.tobytes(), "std": part.std.tobytes(), "embedding": told,
                "shape": json.dumps(part.mean.shape[1:]), "first": part.first, "refused": json.dumps(part.refused)}

    def _get(self) -> LatentMaker:
        if self._maker is None:
            import torch

            base = self._task.base
            torch.set_num_threads(base.threads)
            index = ray.get(self._server.shared.remote())
            folder = local(prior_model(base.weights), base.sha256, self._server)
            self._maker = open_maker(replace(self._task, base=replace(base, weights=str(folder))), index)
            self._device = self._maker.device
        return self._maker


# ------------------------------------------------------------------------------------------------------------- training


def train_spread(job: TuneJob, progress: Progress, cluster: ClusterConfig) -> None:
    """Trains on Ray Train workers to the end and leaves `result/` in the folder of the job.

    Raises UsageError where the cluster has no room or not the device; what a worker refused for good, as it did;
    EnvironmentFault for everything else, for then the same command goes on from the last checkpoint.
    """
    gpus = _gpus(job)
    _check_device(job, gpus)
    if not cluster.actors:
        _check_room(job, gpus)
    folder = Path(job.folder)
    (folder / REFUSED).unlink(missing_ok=True)  # of an attempt whose driver died
    deaths = Deaths(DRIVER_RETRIES)
    with ending(open_model_server(dict(_parts(job).values()))) as server:
        arguments = (job, server, gpus, place_of(cluster))
        failure = _followed(job, progress, arguments)
        while failure is not None and deaths.forgives(failure):
            failure = _followed(job, progress, arguments)
    if (file := folder / REFUSED).is_file():
        problem = unpacked(file.read_text())
        file.unlink()
        raise problem from failure
    if failure is not None:
        if (said := _said_by_worker(failure)) is not None:
            raise said from failure
        raise EnvironmentFault(f"fine-tuning stopped: {cause_of(failure)}. The same command goes on from the last "
                               f"checkpoint in {folder}") from failure


def _followed(job: TuneJob, progress: Progress, arguments: tuple[Any, ...]) -> ray.exceptions.RayError | None:
    """One drive to its end; what ended it, None where it was done."""
    drive: Any = _drive
    under_way = drive.options(scheduling_strategy=at_driver()).remote(*arguments, os.getcwd())
    while not ray.wait([under_way], timeout=1.0)[0]:
        step = (read_position(Path(job.folder)) or {"step": 0})["step"]
        progress("fine-tuning", step, job.made.finetune.steps)
    try:
        ray.get(under_way)
    except ray.exceptions.RayError as error:
        return error
    return None


@ray.remote(max_retries=0, num_cpus=0)
def _drive(job: TuneJob, server: Any, gpus: float, where: dict[str, Any], cwd: str) -> None:
    """Drives the Ray Train run, in a task, so that the caller can look at how far it is."""
    folder = Path(job.folder)
    train_on_workers(_work_on, {"job": job, "server": server, "gpus": gpus, "cwd": cwd}, workers=job.made.workers,
                     cpus=job.made.cpus_per_worker, gpus=gpus, where=where, name=f"finetune-{job.digest[:8]}",
                     place=str((folder / "ray").absolute()), most=WORKER_FAILURES,
                     is_refused=lambda: (folder / REFUSED).is_file())


def _work_on(config: dict[str, Any]) -> None:
    """What each worker does. What no new attempt can mend is written down."""
    job, folder = config["job"], Path(config["job"].folder)
    enter(config["cwd"])
    check_shared(folder)
    if (folder / "result").is_dir():
        return
    try:
        _train(job, config["server"], config["gpus"])
    except Exception as error:
        if not isinstance(unpacked(said := packed(error)), Interrupted):
            _replace(folder / REFUSED, said)
        raise


def _train(job: TuneJob, server: Any, gpus: float) -> None:
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device, prepare_model

    torch.set_num_threads(job.base.threads)
    rank, device = get_context().get_world_rank(), get_device()
    job = _local_job(job, server)
    timesteps = inspect_prior(job.base.weights).train_timesteps
    tuning = open_tuning(job, device=str(device), wrap=lambda module: prepare_model(module, move_to_device=device))
    check_step(tuning.tuner.step, device)
    loaders, warned = LoaderTime(), Notices(device)
    batches = loaded_batches(job, timesteps, tuning.tuner.step, rank, loaders)

    def mean(values: list[float]) -> list[float]:
        return mean_over_workers(values, device)

    if rank:
        tune(tuning, batches, save=lambda: None, mean=mean, elsewhere=lambda: loaders.seconds, warned=warned)
        mean_over_workers([tuning.curve.cpu_seconds], device)
        return
    with RunLogger(tuning) as notebook:
        tune(tuning, batches, save=notebook.save, mean=mean, on_point=notebook.log, elsewhere=lambda: loaders.seconds,
             warned=warned)
        (spent,) = mean_over_workers([tuning.curve.cpu_seconds], device)
        notebook.finish(gpus=gpus, workers=job.world, cpu_seconds=spent * job.world)


def loaded_batches(job: TuneJob, timesteps: int, start: int, rank: int, spent: LoaderTime) -> Iterator[LatentRows]:
    """This worker's rows of steps `start` to the last, made by loader processes, in order."""
    recipe = job.made.finetune
    rows = recipe.batch // job.world
    row_bytes = 8 * int(np.prod(LatentLoader.latent_shape(job.sources)))
    spans = spans_of(start, recipe.steps, max(1, min(SPAN_IMAGES, SPAN_BYTES // row_bytes) // rows))
    for batch in loaded_steps(LatentLoaderActor, {"job": job, "timesteps": timesteps, "rank": rank}, spans,
                              processes=job.made.loaders, rows=rows, spent=spent):
        yield LatentRows(batch["z0"], batch["noise"], batch["t"], batch["dropped"], [str(one) for one in batch["text"]],
                         batch.get("visual"), int(batch["step"][0]))


class LatentLoaderActor:
    """Makes one worker's rows of a span of steps. Its folders are those of the worker, on the same node."""

    def __init__(self, job: TuneJob, timesteps: int, rank: int) -> None:
        self._rank, self._world = rank, job.world
        self._feed = LatentLoader(job.sources, job.made.finetune, job.classes, job.seed, timesteps)

    def __call__(self, batch: dict[str, Any]) -> Iterator[Columns]:
        return timed_steps(batch, self._made)

    def _made(self, first: int, stop: int) -> Iterator[tuple[int, Columns]]:
        for made in self._feed.batches(first, stop, self._rank, self._world):
            found = {"z0": made.z0_BCHW, "noise": made.noise_BCHW, "t": made.t_B, "dropped": made.dropped_B,
                     "text": np.array(made.texts, object)}
            yield made.step, found if made.visual_BD is None else {**found, "visual": made.visual_BD}


# ---------------------------------------------------------------------------------------------------------------- nodes


def _parts(job: TuneJob) -> dict[str, tuple[str, ModelFiles]]:
    """What a node needs: (content hash, files) of base model, latents, captions and features."""
    sources, found = job.sources, {"base": (job.base.sha256, prior_model(job.base.weights))}
    found["latents"] = (job.sources_sha256["latents"], latents_model(Path(sources.latents)))
    for field, kind in (("captions", job.made.captions_kind), ("features", job.made.features_kind)):
        if kind is not None:
            found[field] = (job.sources_sha256[field], artifact_model(Path(getattr(sources, field)), kind))
    return found


def latents_model(folder: Path) -> ModelFiles:
    """A folder of latents; it goes by the digest of what it was made from, for hashing it would take longer than
    reading it."""
    def find() -> dict[str, Path]:
        return {one.name: one for one in folder.iterdir()}

    return ModelFiles(find, lambda: folder if folder.is_dir() else None,
                 lambda copied: str(read_facts(copied).get("digest")))


def _local_job(job: TuneJob, server: Any) -> TuneJob:
    """The job with every folder at a place on this node where its content is right. Raises EnvironmentFault."""
    at = {name: str(local(model, sha256, server)) for name, (sha256, model) in _parts(job).items()}
    return replace(job, base=replace(job.base, weights=at["base"]),
                   sources=Sources(at["latents"], at.get("captions"), at.get("features")))


def _gpus(job: TuneJob) -> float:
    if job.base.device.startswith("cuda") and not ray.cluster_resources().get("GPU", 0):
        return job.made.gpus_per_worker or 0.0  # which is refused
    return gpus_each(job.made.gpus_per_worker, job.base.device, "fit.adapter.gpus_per_worker")


def _check_device(job: TuneJob, gpus: float) -> None:
    """Raises UsageError where workers would train on something else than `device` says."""
    device, field = job.base.device, "fit.adapter.gpus_per_worker"
    if device.startswith("cuda") and not gpus:
        there = ray.cluster_resources().get("GPU", 0)
        remedy = f"set {field} to 1 or leave it out" if there else "join a cluster with GPUs, or set device: auto"
        raise UsageError(f"device: {device} asked for, but each worker would get no GPU ({field} "
                         f"{job.made.gpus_per_worker}, {there:g} GPUs in the cluster); {remedy}")
    if device == "cpu" and gpus:
        raise UsageError(f"device: cpu asked for, but {field} {gpus:g} reserves GPUs, and workers would train on them; "
                         f"set {field}: 0, or device: auto")


def _check_room(job: TuneJob, gpus: float) -> None:
    """Raises UsageError when the cluster cannot hold all workers at once."""
    total, workers = ray.cluster_resources(), job.made.workers
    wants = {"CPU": workers * job.made.cpus_per_worker, "GPU": workers * gpus}
    if short := [name for name, amount in wants.items() if amount > total.get(name, 0)]:
        raise UsageError(f"fit.adapter.workers: {workers} workers want {wants}, and the cluster has "
                         f"{ {name: total.get(name, 0) for name in wants} } ({', '.join(short)} too few). Lower "
                         "fit.adapter.workers, cpus_per_worker or gpus_per_worker, join a larger cluster, or set "
                         "cluster.actors where an autoscaler brings nodes.")


def check_step(step: int, device: Any) -> None:
    """Raises Interrupted on every worker unless all go on from the same step. DDP would not notice; a shared folder
    that shows one node an older checkpoint, or none yet, shows the same one a moment later."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    least_most = torch.tensor([step, -step], device=device)
    dist.all_reduce(least_most, dist.ReduceOp.MIN)
    least, most = int(least_most[0]), -int(least_most[1])
    if least != most:
        raise Interrupted(f"workers see checkpoints of steps {least} and {most}; the folder of the work must show all "
                          "nodes the same files")


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")  # all workers may refuse at once
    partial.write_text(text)
    os.replace(partial, path)


def _said_by_worker(error: Exception) -> RayexpandError | None:
    """What a worker refused for good and could not write down, where it did."""
    failures = getattr(getattr(error, "cause", None), "worker_failures", {}).values()
    return next((one for one in failures if isinstance(one, RayexpandError) and not isinstance(one, Interrupted)), None)
