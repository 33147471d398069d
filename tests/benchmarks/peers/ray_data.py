"""Ray Data with its own checkpoint: read -> map_batches on two actors -> write_parquet, as its documentation has it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.peers.loops import sampled
from tests.benchmarks.peers.task import Seed, Task, load_pipeline


class Sampler:
    """Rows of a plan to rows with images; as many for each as it has copies."""

    def __init__(self, task: Task) -> None:
        self.task, self.pipe = task, load_pipeline(task)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        import io

        import torch

        rows = [(int(number), Seed(int(seed), str(label), str(path)), int(copy))
                for number, seed, label, path, first, stop in zip(
                    *(batch[name] for name in ("id", "seed", "label", "path", "first", "stop")), strict=True)
                for copy in range(first, stop)]
        generators = [torch.Generator().manual_seed(self.task.copies * seed.number + copy) for _, seed, copy in rows]
        images = sampled(self.pipe, self.task, [(seed, copy) for _, seed, copy in rows], generators)
        made: dict[str, list[Any]] = {"id": [], "slot": [], "image": []}
        for (number, seed, copy), image in zip(rows, images, strict=True):
            image.save(encoded := io.BytesIO(), "PNG")
            made["id"].append(number)
            made["slot"].append(f"{seed.label}/{Path(seed.path).stem}/{copy}")
            made["image"].append(encoded.getvalue())
        return made


def a_row_for_each_seed(task: Task, out: Path) -> None:
    """The id that a checkpoint keeps is that of the seed, and a row becomes several."""
    run(task, out, [(seed.number, seed, 0, task.copies) for seed in task.listed()], task.batch // task.copies)


def a_row_for_each_copy(task: Task, out: Path) -> None:
    """The id is that of the sample: one row in, one row out."""
    run(task, out, [(number, seed, copy, copy + 1) for number, (seed, copy) in enumerate(task.rows())], task.batch)


def run(task: Task, out: Path, rows: list[tuple[int, Seed, int, int]], batch: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    plan = out.parent / "plan"
    plan.mkdir(exist_ok=True)
    pq.write_table(pa.table({
        "id": [number for number, *_ in rows], "seed": [seed.number for _, seed, *_ in rows],
        "label": [seed.label for _, seed, *_ in rows], "path": [seed.path for _, seed, *_ in rows],
        "first": [first for *_, first, _ in rows], "stop": [stop for *_, stop in rows]}), plan / "plan.parquet")
    os.environ["RAY_AUTH_MODE"] = "token"
    import ray
    from ray.data.checkpoint import CheckpointConfig

    # Logical CPUs: a resume adds filter actors, and with 6 CPUs its read waited for them without end.
    ray.init(address="local", num_cpus=16, include_dashboard=False, log_to_driver=False,
             object_store_memory=200 << 20, _temp_dir=os.environ["PEERS_RAY"])
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.checkpoint_config = CheckpointConfig(id_column="id", checkpoint_path=str(out / "checkpoint"))
    (ray.data.read_parquet(str(plan)).repartition(target_num_rows_per_block=batch)
     .map_batches(Sampler, fn_constructor_args=(task,), compute=ray.data.ActorPoolStrategy(size=task.processes),
                  num_cpus=1, batch_size=batch)
     .write_parquet(str(out / "data")))
    ray.shutdown()
