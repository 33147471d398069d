"""Fitting on Ray: which of its parts run where. The cluster is joined, or started, when there is something to make."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray

from rayexpand.contract.device import torch_threads
from rayexpand.contract.errors import EnvironmentFault
from rayexpand.contract.protocols import Progress
from rayexpand.contract.schema import SeedIndex
from rayexpand.fitting.captions import CaptionBlock
from rayexpand.fitting.config import FitConfig
from rayexpand.fitting.features import Block, Intake
from rayexpand.fitting.fit import fit as fit_with
from rayexpand.fitting.maker import Engine, Training
from rayexpand.on_ray.captions import caption_blocks
from rayexpand.on_ray.features import classes, feature_blocks
from rayexpand.on_ray.finetune import tuning_on
from rayexpand.on_ray.pool import address_of, connected, enter, error_of, gpus_each, place_of
from rayexpand.on_ray.preemption import lasting
from rayexpand.on_ray.train import train_trials
from rayexpand.storage.position import Position, read_position, write_position
from rayexpand.studies.cross_fit import score_artifact

TASK_RETRIES = 16  # deaths of a process that trains alone before the fit counts as failed; lost nodes do not count
LOOK_S = 1.0  # between two looks at how far it is


def fit(config: FitConfig, progress: Progress, *, on_workers: bool = False) -> dict[str, Path]:
    """As fitting.fit.fit, with prototypes, features and captions computed on a cluster; it is joined, or started, only
    if there are any to make. `on_workers`: also what trains in one process (a guide, a generator, an adapter without
    workers) is a task, as always on a cluster that is joined, where the driver may be on a head without GPU."""
    on_workers = on_workers or address_of(config.cluster) is not None
    with contextlib.ExitStack() as stack:

        def connect() -> None:
            stack.enter_context(connected(config.cluster))

        def blocks(config: FitConfig, sha256: str, index: SeedIndex, intake: Intake,
                   costs: dict[str, Any]) -> Iterator[Block]:
            connect()
            return feature_blocks(config, sha256, index, intake, costs)

        def captions(config: FitConfig, sha256: str, index: SeedIndex, costs: dict[str, Any]) -> Iterator[CaptionBlock]:
            connect()
            return caption_blocks(config, sha256, index, costs)

        def scores(*arguments: Any) -> tuple[bytes, dict[str, Any]]:
            connect()
            return score_artifact(train_trials, *arguments)

        engine = Engine(blocks, classes, captions, tuning_on(config, connect), scores=scores)
        if on_workers:
            def alone(function: Training, progress: Progress, folder: Path) -> dict[str, Any]:
                connect()
                progress("training on a worker", 0, 1)

                def told(said: dict[str, Any]) -> None:
                    progress(said["task"], said["step"], said["total"])
                    write_position(folder, said)

                facts, contents = one_task(config, told, "", _filled, function, config.runtime.torch_threads)
                Position(folder).remove()
                for name, content in contents.items():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(content)
                return facts

            engine = replace(engine, alone=alone, is_elsewhere=True,
                             tuning=tuning_on(config, connect, partial(one_task, config)))
        return fit_with(config, progress, engine)


def one_task(config: FitConfig, told: Callable[[dict[str, Any]], None], folder: str, function: Callable[..., Any],
             *arguments: Any) -> Any:
    """What `function(*arguments, folder)` returns in one process of the cluster, which has what the stage fit gives an
    actor; where no folder is named, it gets one on the disk of its node. `told` hears how far it is, as it says in that
    folder (storage/position.py). Raises its error, or EnvironmentFault where the process died too often."""
    cluster = config.cluster.at("fit")
    gpus = gpus_each(cluster.gpus_per_actor, config.device, "cluster.gpus_per_actor")
    task: Any = ray.remote(num_cpus=cluster.cpus_per_actor, num_gpus=gpus, max_retries=0, **place_of(cluster))(_watched)

    def attempt() -> Any:
        for one in task.remote(function, arguments, folder, os.getcwd()):
            found = ray.get(one)
            if "made" in found:
                return found["made"]
            told(found)
        raise EnvironmentFault("a task of fit ended without a result. The same command tries again")

    try:
        return lasting(attempt, TASK_RETRIES)
    except ray.exceptions.RayError as error:
        raise error_of(error, "a task of fit ended: {}. The same command tries again") from error


def _watched(function: Callable[..., Any], arguments: tuple[Any, ...], folder: str, cwd: str) -> Iterator[Any]:
    """How far the function is, whenever that has changed, and at last what it returned as `made`."""
    enter(cwd)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(1) as pool:
        work, last = pool.submit(function, *arguments, folder or scratch), None
        while not wait([work], LOOK_S).done:
            if (said := read_position(folder or scratch)) not in (None, last):
                yield said
                last = said
        yield {"made": work.result()}


def _filled(function: Training, threads: int, folder: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Facts and files of what a function makes in a folder that the driver need not see."""
    wall, cpu = time.perf_counter(), time.process_time()
    with torch_threads(threads):
        facts = function(lambda *_: None, Path(folder))
    contents = {str(file.relative_to(folder)): file.read_bytes() for file in sorted(Path(folder).rglob("*"))
                if file.is_file()}
    seconds = time.perf_counter() - wall
    return {"cpu_seconds": time.process_time() - cpu, "process_seconds": seconds,
            "gpu_seconds": seconds * (facts.get("device") == "cuda"), **facts}, contents
