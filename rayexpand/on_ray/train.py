"""Trials of a study on a Ray cluster: many at once as tasks, or each spread over Ray Train workers.

Small trials (training.workers 0) are one task each, so a study of sixty takes what its CPUs or GPUs allow. Larger ones
are a TorchTrainer each, and Ray Data loads their rows: worker r of W reads, decodes and augments its slice of every
step in loader processes beside it. The slices follow from the training set alone, so the images of a step, and their
order, are the same for any W.

A checkpoint is one file that rank 0 replaces whole; Ray restarts dead workers, who read it again. Ray's own reported
checkpoints are not used, because a worker that dies can take the last one with it. What a notice and the loss of a node
do is told in preemption.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
import ray.data

from rayexpand.classifier.accuracy import Answers
from rayexpand.contract.errors import Interrupted, packed, unpacked
from rayexpand.contract.metrics import record_start
from rayexpand.loader.config import TrainingConfig
from rayexpand.on_ray.loaders import SPAN_IMAGES, Columns, LoaderTime, loaded_steps, spans_of, timed_steps
from rayexpand.on_ray.pool import at_driver, cause_of, connected, enter, gpus_each, place_of, room_for
from rayexpand.on_ray.preemption import Deaths, Leaving
from rayexpand.on_ray.workers import Notices, mean_over_workers, train_on_workers
from rayexpand.runs.config import ClusterConfig
from rayexpand.storage.files import Files
from rayexpand.storage.places import open_files
from rayexpand.studies.parts import Trial, TrialFolder
from rayexpand.studies.trial import (
    TrainingCurve,
    TrialWork,
    also_answers,
    answers_of,
    checkpoint,
    fit,
    kept,
    make_classifier,
    open_work,
    restore,
    write_result,
)
from rayexpand.studies.trial import run_trial as run_here

if TYPE_CHECKING:
    from rayexpand.classifier.classifier import Classifier, TrainBatch

TASK_RETRIES = 16  # deaths of a trial's process before it counts as failed; nodes taken away do not count
WORKER_FAILURES = 4  # the same of Ray Train workers


def train_trials(folder: TrialFolder, trials: Sequence[Trial], *,
                 on_start: Callable[[int], None] = lambda running: None,
                 on_done: Callable[[int, str], None] = lambda running, problem: None) -> list[str]:
    """Trains `trials` at once as far as the cluster has room; returns one line for each that failed, with its name.
    `on_start` and `on_done` hear how many are under way, `on_done` also why one failed, "" where it did not.

    Raises UsageError when workers cannot share the batches, or the cluster is too small for one trial.
    """
    with connected(folder.cluster):
        training = sized(folder.training)
        if training.workers:
            _check_workers(folder.files, trials, training)
        room = _room(training, folder.cluster.at("train"))
        failed, waiting = [], list(trials)
        deaths = {trial.name: Deaths(TASK_RETRIES) for trial in trials}
        running: dict[Any, Trial] = {}
        fault: Interrupted | None = None
        while waiting or running:
            while waiting and len(running) < room:
                trial = waiting.pop(0)
                running[_submit(folder, trial, training)] = trial
                on_start(len(running))
            done, _ = ray.wait(list(running), num_returns=1)
            trial, problem = running.pop(done[0]), ""
            try:
                ray.get(done[0])
            except ray.exceptions.RayError as error:
                if deaths[trial.name].forgives(error):
                    waiting.insert(0, trial)
                    continue
                if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, Interrupted):
                    fault, problem = error.cause, str(error.cause)  # the place is at fault, not the trial
                else:
                    problem = cause_of(error)
                    failed.append(f"{trial.name}: {problem}")
            on_done(len(running), problem)
        if fault is not None:
            raise fault
        return failed


def _submit(folder: TrialFolder, trial: Trial, training: TrainingConfig) -> Any:
    arguments = (str(folder.files.root), vars(trial), training.model_dump(), os.getcwd())
    where = place_of(folder.cluster.at("train"))
    if training.workers and trial.is_trained:
        return _train_spread.options(scheduling_strategy=at_driver()).remote(*arguments, where)
    return _train_alone.options(num_cpus=training.cpus_per_worker, num_gpus=training.gpus_per_worker or 0,
                                **where).remote(*arguments)


@ray.remote(max_retries=0, max_calls=0)
def _train_alone(folder: str, trial: dict[str, Any], training: dict[str, Any], cwd: str) -> None:
    enter(cwd)
    config = TrainingConfig(**training)
    run_here(open_files(folder), Trial(**trial), config, gpus=config.gpus_per_worker or 0.0, leaving=Leaving())


@ray.remote(max_retries=0, num_cpus=0)
def _train_spread(folder: str, trial: dict[str, Any], training: dict[str, Any], cwd: str,
                  where: dict[str, Any]) -> None:
    """Drives the Ray Train run of one trial; in a task, so that several run side by side. It is beside the driver,
    where it keeps no node of workers from leaving."""
    enter(cwd)
    config, files = TrainingConfig(**training), open_files(folder)
    files.delete(_refusal(trial["name"]))  # of an attempt whose driver died
    place = str(files.at("checkpoints"))
    try:
        train_on_workers(
            _work_on, {"folder": folder, "trial": trial, "training": training, "cwd": cwd}, workers=config.workers,
            cpus=config.cpus_per_worker, gpus=config.gpus_per_worker or 0.0, where=where, most=WORKER_FAILURES,
            name=f"{trial['name']}-{Trial(**trial).digest[:8]}",
            place=place if "://" in place else os.path.abspath(place),
            is_refused=lambda: files.read(_refusal(trial["name"])) is not None)
    except Exception as error:
        if (problem := files.read(_refusal(trial["name"]))) is None:
            raise
        files.delete(_refusal(trial["name"]))
        raise unpacked(problem) from error


def _work_on(config: dict[str, Any]) -> None:
    """What each Ray Train worker does. What no new attempt can mend is written down."""
    enter(config["cwd"])
    trial, files = Trial(**config["trial"]), open_files(config["folder"])
    try:
        _train(trial, files, config)
    except Exception as error:
        if not isinstance(unpacked(said := packed(error)), Interrupted):
            files.replace(_refusal(trial.name), said.encode())
        raise


def _train(trial: Trial, files: Files, config: dict[str, Any]) -> None:
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device, prepare_model

    training = TrainingConfig(**config["training"])
    torch.set_num_threads(training.threads)
    rank, world = get_context().get_world_rank(), get_context().get_world_size()
    work, device = open_work(files, trial, training), get_device()
    classifier, curve = make_classifier(
        work, str(device), _wrapped(prepare_model, device), rank, world, _mean), TrainingCurve()
    name = f"checkpoints/{trial.name}.pt"
    if (saved := files.read(name)) is not None:
        curve = restore(saved, trial, classifier) or curve
    curve.starts.append(classifier.step)
    if rank == 0:
        record_start(classifier.step)
    loaders = LoaderTime()
    answers = fit(work, classifier, curve, loaded_batches(work, config, classifier.step, rank, world, loaders),
                  evaluate=lambda: _evaluated(answers_of, work, classifier, rank, world),
                  save=lambda: _save(files, name, trial, classifier, curve, rank), every=training.checkpoint_steps,
                  warned=Notices(device), mean=lambda value: mean_over_workers([value], device)[0])
    also = {name: _evaluated(partial(also_answers, name=name), work, classifier, rank, world) for name in work.also}
    cpu_seconds = world * mean_over_workers([curve.cpu_seconds + loaders.seconds], device)[0]
    if rank == 0:
        write_result(files, work, curve, answers, also, device=str(device.type), workers=world,
                     gpus=training.gpus_per_worker or 0.0, cpu_seconds=cpu_seconds,
                     weights=kept(files, trial, training, classifier))
        files.delete(name)


def _refusal(trial: str) -> str:
    return f"checkpoints/{trial}.refused"


def loaded_batches(work: TrialWork, config: dict[str, Any], start: int, rank: int, world: int,
                   time_spent: LoaderTime | None = None) -> Iterator[TrainBatch]:
    """This worker's slices of steps `start` to the last, made by loader processes, in order."""
    from rayexpand.classifier.classifier import TrainBatch

    rows = work.feed.batch // world
    spans = spans_of(start, work.feed.total_steps, max(1, SPAN_IMAGES // rows))
    for batch in loaded_steps(TrainingLoaderActor, {"config": config, "rank": rank, "world": world}, spans,
                              processes=config["training"]["loaders"], rows=rows, spent=time_spent or LoaderTime()):
        yield TrainBatch(batch["x"], batch["y"], int(batch["step"][0]), batch.get("views"), batch.get("mix"))


class TrainingLoaderActor:
    """Makes one worker's slices of a span of steps."""

    def __init__(self, config: dict[str, Any], rank: int, world: int) -> None:
        import torch

        torch.set_num_threads(1)
        enter(config["cwd"])
        self._rank, self._world = rank, world
        self._feed = open_work(open_files(config["folder"]), Trial(**config["trial"]),
                               TrainingConfig(**config["training"])).feed

    def __call__(self, batch: dict[str, Any]) -> Iterator[Columns]:
        return timed_steps(batch, self._made)

    def _made(self, first: int, stop: int) -> Iterator[tuple[int, Columns]]:
        for made in self._feed.batches(first, stop, self._rank, self._world):
            more = {"views": made.views_BVHWC, "mix": made.mix_B5}
            yield made.step, {"x": made.x_BHWC, "y": made.y_BK, **{k: v for k, v in more.items() if v is not None}}


def _mean(value: Any) -> Any:
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value


def _wrapped(prepare_model: Any, device: Any) -> Callable[[Any], Any]:
    return lambda model: prepare_model(model, move_to_device=device)


def _save(files: Files, name: str, trial: Trial, classifier: Any, curve: TrainingCurve, rank: int) -> None:
    if rank == 0:
        files.replace(name, checkpoint(trial, classifier, curve))


def _evaluated(answers: Callable[..., Answers], work: TrialWork, classifier: Classifier, rank: int,
               world: int) -> Answers:
    """Answers of all workers, of one model: DDP leaves each worker running statistics of its own after a step, and the
    first worker's are those that are kept."""
    import torch.distributed as dist

    if world == 1:
        return answers(work, classifier)
    for buffer in classifier.module.buffers():
        dist.broadcast(buffer, src=0)
    found: list[Any] = [None] * world
    dist.all_gather_object(found, answers(work, classifier, rank=rank, world=world))
    return Answers.concatenate(found)


def sized(training: TrainingConfig) -> TrainingConfig:
    gpus = gpus_each(training.gpus_per_worker, training.device, "training.gpus_per_worker")
    return training.model_copy(update={"gpus_per_worker": gpus})


def _room(training: TrainingConfig, cluster: ClusterConfig) -> int:
    """Trials at once: those that `cluster.actors` processes are, for which an autoscaler is asked, else what the
    cluster holds. Raises UsageError where it cannot hold one."""
    workers = max(1, training.workers)
    wants = {"CPU": workers * training.cpus_per_worker, "GPU": workers * (training.gpus_per_worker or 0.0),
             **{name: workers * amount for name, amount in cluster.resources.items()}}
    return room_for(wants, cluster.actors and max(1, cluster.actors // workers), "training.workers",
                    "Lower training.workers, training.cpus_per_worker or training.gpus_per_worker")


def _check_workers(files: Files, trials: Sequence[Trial], training: TrainingConfig) -> None:
    for trial in trials:
        open_work(files, trial, training).feed.check_world(training.workers)
