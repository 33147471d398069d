"""Finished classifiers of shadows asked on a Ray cluster, one task each: an Ask of rayexpand.studies.attacks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray

from rayexpand.on_ray.pool import connected, enter, error_of, place_of
from rayexpand.on_ray.preemption import Deaths
from rayexpand.on_ray.train import TASK_RETRIES, sized
from rayexpand.storage.places import open_files
from rayexpand.studies.attacks import Question, phi_of
from rayexpand.studies.parts import Study, Trial


def ask(study: Study, trials: Sequence[Trial], question: Question) -> Iterator[tuple[Trial, np.ndarray]]:
    """Answers as they come in. Raises what a task raised, EnvironmentFault where its place was at fault."""
    with connected(study.config.cluster):
        training = sized(study.config.training)
        task = _ask.options(num_cpus=training.cpus_per_worker, num_gpus=training.gpus_per_worker or 0,
                            **place_of(study.config.cluster.at("train")))

        def submit(trial: Trial) -> Any:
            return task.remote(str(study.files.root), vars(trial), question, training.device, training.threads,
                               os.getcwd())

        running, deaths = {submit(trial): trial for trial in trials}, {one.name: Deaths(TASK_RETRIES) for one in trials}
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            trial = running.pop(done)
            try:
                answer = ray.get(done)
            except ray.exceptions.RayError as error:
                if deaths[trial.name].forgives(error):
                    running[submit(trial)] = trial
                    continue
                raise error_of(error, f"classifier {trial.name} could not be asked ({{}}); the same command asks it "
                                      "again") from error
            yield trial, answer


@ray.remote(max_retries=0)
def _ask(folder: str, trial: dict[str, Any], question: Question, device: str, threads: int, cwd: str) -> np.ndarray:
    enter(cwd)
    return phi_of(open_files(folder), Trial(**trial), question, device, threads)
