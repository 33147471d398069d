"""Scores by a guide over a Ray Data actor pool: a Score of rayexpand.evaluation.select_scores.

    driver    chunks (a file name, or a span of seeds) -> ScoreActor -> a few numbers for each image

Each actor opens the run, reads its images and decodes them ahead of the guide in threads. Chunks are cut into calls
the same way everywhere, so the numbers do not depend on the number of actors.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray
import ray.data

from rayexpand.contract.errors import EnvironmentFault, ModelError, RayexpandError, UsageError
from rayexpand.evaluation.select_scores import Chunk, ScoreJob, Scorer
from rayexpand.on_ray.expand import choose_pool, connected
from rayexpand.on_ray.stage import guide_at, guide_model, local, open_model_server
from rayexpand.runs.config import ClusterConfig

WAVE = 10_000  # chunks handed to Ray Data at once

Row = dict[str, list[Any]]
_FAULTS = {one.__name__: one for one in (ModelError, UsageError, EnvironmentFault)}  # the first that fits


def score(job: ScoreJob, chunks: Sequence[Chunk], cluster: ClusterConfig) -> Iterator[tuple[int, pa.Table]]:
    """Scores of chunks as they come in. Raises UsageError for a sample that cannot be decoded, ModelError or
    EnvironmentFault for a fault of a node."""
    with connected(cluster):
        pool = choose_pool(cluster, models=job.device != "cpu")
        shelf = open_model_server({job.sha256: guide_model(job.guide)})
        for start in range(0, len(chunks), WAVE):
            wave = [{"number": number, "chunk": list(map(str, chunk))}
                    for number, chunk in enumerate(chunks[start:start + WAVE], start)]
            rows = ray.data.from_items(wave, override_num_blocks=len(wave)).map_batches(
                ScoreActor, batch_size=1, num_cpus=pool.cpus, num_gpus=pool.gpus or None,
                resources=pool.resources or None, label_selector=pool.labels or None,
                compute=ray.data.ActorPoolStrategy(size=min(pool.actors, len(wave)), max_tasks_in_flight_per_actor=2),
                fn_constructor_kwargs={"job": job, "shelf": shelf, "cwd": os.getcwd()})
            for row in rows.iter_rows():
                if row["fault"]:
                    raise _FAULTS[row["kind"]](row["fault"])
                yield int(row["number"]), pa.ipc.open_stream(row["table"]).read_all()


class ScoreActor:
    """One process of the pool. Loads its guide at the first chunk, so that a bad start is a fault, not a crash."""

    def __init__(self, job: ScoreJob, shelf: Any, cwd: str) -> None:
        if os.path.isdir(cwd):
            os.chdir(cwd)  # relative paths of the configuration are relative to where the driver was started
        self._job, self._shelf = job, shelf
        self._scorer: Scorer | None = None

    def __call__(self, batch: dict[str, Any]) -> Row:
        (number,), ((key, file, start, stop),) = batch["number"], batch["chunk"]
        row = {"number": number, "table": b"", "fault": "", "kind": ""}
        try:
            row["table"] = _content(self._get()(Chunk(str(key), str(file), int(start), int(stop))))
        except Exception as error:
            what = "" if isinstance(error, RayexpandError) else f"{type(error).__name__}: "
            kinds = [name for name, one in _FAULTS.items() if isinstance(error, one)] or [EnvironmentFault.__name__]
            row |= {"fault": f"{what}{error} (on {socket.gethostname()})", "kind": kinds[0]}
        return {name: [value] for name, value in row.items()}

    def _get(self) -> Scorer:
        if self._scorer is None:
            import torch

            torch.set_num_threads(self._job.torch_threads)
            folder = local(guide_model(self._job.guide), self._job.sha256, self._shelf)
            self._scorer = Scorer(replace(self._job, guide=guide_at(self._job.guide, str(folder))))
        return self._scorer


def _content(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()
