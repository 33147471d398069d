"""Steps per second of fine-tuning: Ray Train workers against plain torchrun processes, with the same step.

    python -m tests.benchmarks.finetune                       embedded default, two workers, three pairs

Both sides train the same job on the same cached latents by the same loop and step, one thread each, over gloo. Ray
Train workers get their batches from Ray Data loaders; torchrun processes make them in line. The sides take turns; each
run's clock starts with its tenth step, when everything is loaded. steps/s are those of the median ten steps; `best`, of
the best ten, is the steadier figure on a shared machine. CPU ms are those of the first worker, without its loader.
`load` is the machine's load average before and after. Run from the root of the repository with nothing else on the
machine. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from rayexpand.data import seeds
from rayexpand.data.seeds import DataConfig
from rayexpand.fitting.adapter.config import AdapterFit
from rayexpand.fitting.adapter.fit import TUNE_HERE, Data, TuneEngine, prepare_job
from rayexpand.fitting.adapter.loader import LatentRows
from rayexpand.fitting.adapter.train import TuneJob, Tuning, open_tuning, tune
from rayexpand.models.prior import inspect_prior
from rayexpand.runs.config import ClusterConfig, RuntimeConfig

RECIPE = {"preset": "tiny", "prompt": "a photo of a {token} shape"}


def make_job(out: str, workers: int, steps: int) -> TuneJob:
    """A fine-tuning of the embedded default on digits; its latents are made here, once."""
    data = DataConfig(source="digits", per_class=16)
    made = AdapterFit(recipe={**RECIPE, "steps": steps}, flips=False, workers=workers, checkpoint_every=steps,
                      sheet=None, tensorboard=False)
    engine = TuneEngine(TUNE_HERE.parts, TUNE_HERE.train, spreads=True)
    job, _, _ = prepare_job(made, Data(data, seeds.build_index(data), {}), out=out, weights="digits", seed=0,
                            device="cpu", runtime=RuntimeConfig(), here={}, progress=lambda *_: None, engine=engine)
    return job


def timed(tuning: Tuning, batches: Iterable[LatentRows], mean: Callable[[list[float]], list[float]], rank: int,
          result: str) -> None:
    """Trains to the end; rank 0 leaves steps per second, of the median and of the best ten steps, from the tenth on."""
    seen: list[tuple[float, float, float]] = []
    tune(tuning, batches, save=lambda: None, mean=mean,
         on_point=lambda point: seen.append((point["step"], time.perf_counter(), time.process_time())))
    steps, _, cpu = (last - first for first, last in zip(seen[0], seen[-1], strict=True))
    rates = [(one[0] - other[0]) / (one[1] - other[1]) for other, one in pairwise(seen)]
    if rank == 0:
        Path(result).write_text(json.dumps({"steps_per_second": median(rates), "best": max(rates),
                                            "cpu_ms_per_step": 1e3 * cpu / steps,
                                            "loss": tuning.curve.history[-1]["loss"]}))


def under_torchrun(out: str, workers: int, steps: int, result: str) -> None:
    """One of torchrun's processes."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from rayexpand.on_ray.pool import mean_over_workers

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, job = dist.get_rank(), make_job(out, workers, steps)
    tuning = open_tuning(job, device="cpu", wrap=DistributedDataParallel)
    timed(tuning, tuning.feed.batches(0, steps, rank, workers), lambda values: mean_over_workers(values, "cpu"), rank,
          result)
    dist.destroy_process_group()


def under_ray(config: dict[str, Any]) -> None:
    """One of Ray Train's workers."""
    from ray.train import get_context
    from ray.train.torch import prepare_model

    from rayexpand.on_ray.finetune import loaded_batches
    from rayexpand.on_ray.loaders import LoaderTime
    from rayexpand.on_ray.pool import mean_over_workers

    torch.set_num_threads(1)
    rank, job = get_context().get_world_rank(), config["job"]
    tuning = open_tuning(job, device="cpu", wrap=lambda module: prepare_model(module, move_to_device="cpu"))
    batches = loaded_batches(job, inspect_prior("digits").train_timesteps, 0, rank, LoaderTime())
    timed(tuning, batches, lambda values: mean_over_workers(values, "cpu"), rank, config["result"])


def run_torchrun(out: str, workers: int, steps: int) -> dict[str, float]:
    result = str(Path(out, "result.json"))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={workers}", "-m",
                    "tests.benchmarks.finetune", "--inside", out, "--workers", str(workers), "--steps", str(steps)],
                   check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return dict(json.loads(Path(result).read_text()))


def run_ray(job: TuneJob, out: str, name: str) -> dict[str, float]:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    result = str(Path(out, "result.json"))
    TorchTrainer(under_ray, train_loop_config={"job": job, "result": result},
                 scaling_config=ScalingConfig(num_workers=job.world, resources_per_worker={"CPU": 1}),
                 run_config=RunConfig(name=name, storage_path=str(Path(out, "ray")))).fit()
    return dict(json.loads(Path(result).read_text()))


def compare(workers: int, steps: int, pairs: int) -> dict[str, Any]:
    from rayexpand.on_ray.pool import connected

    load, found = [os.getloadavg()[0]], []
    with tempfile.TemporaryDirectory() as out:
        job = make_job(out, workers, steps)
        for number in range(pairs):
            def ray_side(number: int = number) -> dict[str, float]:
                with connected(ClusterConfig()):  # torchrun has the machine for itself
                    return run_ray(job, out, f"pair{number}")

            sides = {"ray": ray_side, "torchrun": lambda: run_torchrun(out, workers, steps)}
            one = {name: sides[name]() for name in sorted(sides, reverse=number % 2 == 1)}
            rates = {f"{name} {what}": round(side[field], 2) for name, side in one.items()
                     for what, field in (("steps/s", "steps_per_second"), ("best steps/s", "best"),
                                         ("CPU ms/step", "cpu_ms_per_step"))}
            ratio = one["ray"]["steps_per_second"] / one["torchrun"]["steps_per_second"]
            found.append({**rates, "ratio": round(ratio, 3),
                          "losses agree": abs(one["ray"]["loss"] - one["torchrun"]["loss"]) < 1e-6})
    load.append(os.getloadavg()[0])
    best = {name: max(one[f"{name} best steps/s"] for one in found) for name in ("ray", "torchrun")}
    return {"workers": workers, "steps": steps, "pairs": found, "ratio": median(one["ratio"] for one in found),
            "ratio of the best": round(best["ray"] / best["torchrun"], 3), "load": load}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        under_torchrun(given.inside, given.workers, given.steps, str(Path(given.inside, "result.json")))
        return
    print(json.dumps(compare(given.workers, given.steps, given.pairs), indent=1))


if __name__ == "__main__":
    main()
