"""Scores by a guide over a Ray Data actor pool: a Score of rayexpand.evaluation.select_scores.

    driver    chunks (a file name, or a span of seeds) -> ScoreActor -> a few numbers for each image

Each actor opens the run, reads its images and decodes them ahead of the guide in threads. Chunks are cut into calls
the same way everywhere, so the numbers do not depend on the number of actors.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from rayexpand.contract.errors import packed, unpacked
from rayexpand.evaluation.select_scores import Chunk, ScoreJob, Scorer
from rayexpand.models.folders import ModelFiles
from rayexpand.models.guides import guide_model
from rayexpand.on_ray.pool import choose_pool, connected, ending, enter, waves
from rayexpand.on_ray.stage import guide_at, local, open_model_server
from rayexpand.runs.config import ClusterConfig

Row = dict[str, list[Any]]


def score(job: ScoreJob, chunks: Sequence[Chunk], cluster: ClusterConfig) -> Iterator[tuple[int, pa.Table]]:
    """Scores of chunks as they come in. Raises UsageError for a sample that cannot be decoded, ModelError or
    EnvironmentFault for a fault of a node."""
    with connected(cluster):
        pool = choose_pool(cluster.at("judge"), job.device)
        with ending(open_model_server({job.sha256: _model(job)})) as server:
            for start, wave in waves(chunks):
                items = [{"number": number, "chunk": list(map(str, chunk))} for number, chunk in enumerate(wave, start)]
                for row in pool.map(items, ScoreActor, {"job": job, "server": server}).iter_rows():
                    if row["fault"]:
                        raise unpacked(row["fault"])
                    yield int(row["number"]), pa.ipc.open_stream(row["table"]).read_all()


def _model(job: ScoreJob) -> ModelFiles:
    return guide_model(job.guide.weights, job.guide.checkpoint)


class ScoreActor:
    """One process of the pool. Loads its guide at the first chunk, so that a bad start is a fault, not a crash."""

    def __init__(self, job: ScoreJob, server: Any, cwd: str) -> None:
        enter(cwd)
        self._job, self._server = job, server
        self._scorer: Scorer | None = None

    def __call__(self, batch: dict[str, Any]) -> Row:
        (number,), ((key, file, start, stop),) = batch["number"], batch["chunk"]
        row = {"number": number, "table": b"", "fault": ""}
        try:
            row["table"] = _content(self._get()(Chunk(str(key), str(file), int(start), int(stop))))
        except Exception as error:
            row["fault"] = packed(error, f"on {socket.gethostname()}")
        return {name: [value] for name, value in row.items()}

    def _get(self) -> Scorer:
        if self._scorer is None:
            import torch

            torch.set_num_threads(self._job.torch_threads)
            folder = local(_model(self._job), self._job.sha256, self._server)
            self._scorer = Scorer(replace(self._job, guide=guide_at(self._job.guide, str(folder))))
        return self._scorer


def _content(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()
