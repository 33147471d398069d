"""Images compared with seeds over a Ray Data actor pool: a Work of rayexpand.evaluation.copy_search.

    driver    chunks (a file name, positions of seeds, rows of an index) -> FindActor -> nearest seeds of each image
              features of the seeds, once in the object store, which holds one copy for each node

Each actor reads, decodes and extracts its images and searches by itself. Chunks are cut into calls the same way
everywhere and the search is exact, so ids do not depend on the number of actors.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray

from rayexpand.contract.errors import packed, unpacked
from rayexpand.evaluation.copy_extractor import files_of, moved
from rayexpand.evaluation.copy_search import CompareChunk, ComparedSeeds, CopyFinder, CopyJob
from rayexpand.on_ray.pool import at_driver, choose_pool, connected, ending, enter, waves
from rayexpand.on_ray.stage import local, open_model_server, run_models, with_local_models
from rayexpand.runs.config import ClusterConfig
from rayexpand.runs.joined import open_samples
from rayexpand.runs.run import Run

Row = dict[str, list[Any]]


def find(job: CopyJob, chunks: Sequence[CompareChunk], found: ComparedSeeds | None,
         cluster: ClusterConfig) -> Iterator[tuple[int, pa.Table]]:
    """Tables of chunks as they come in. Raises UsageError for a sample that cannot be decoded, ModelError or
    EnvironmentFault for a fault of a node."""
    with connected(cluster):
        pool = choose_pool(cluster.at("judge"), job.config.extractor.device)
        run = open_samples(job.run)
        prior = {part: sha256 for part, sha256 in run.facts["models"].items() if part in _DRAWN_BY}
        models = {job.extractor_sha256: files_of(job.config.extractor), **run_models(run.config, prior)}
        shared, all_chunks = _shared(found), ray.put(list(chunks))
        with ending(open_model_server(models)) as server:
            for start, wave in waves(range(len(chunks))):
                items = [{"number": number} for number in range(start, start + len(wave))]
                arguments = {"job": job, "chunks": [all_chunks], "found": [shared], "prior": prior, "server": server}
                for row in pool.map(items, FindActor, arguments).iter_rows():
                    if row["fault"]:
                        raise unpacked(row["fault"])
                    yield int(row["number"]), pa.ipc.open_stream(row["table"]).read_all()


_DRAWN_BY = ("prior", "adapter")  # models of the run that make known copies


def _shared(found: ComparedSeeds | None) -> ray.ObjectRef:
    """The seeds in the object store. A process beside the driver puts them there, so that the driver holds none."""
    return ray.put(None) if found is None else _loaded.options(scheduling_strategy=at_driver()).remote(found)


@ray.remote(num_cpus=0)
def _loaded(found: ComparedSeeds) -> ComparedSeeds:
    return found.loaded()


class FindActor:
    """One process of the pool. Loads its models at the first chunk, so that a bad start is a fault, not a crash."""

    def __init__(self, job: CopyJob, chunks: list[Any], found: list[Any], prior: dict[str, str], server: Any,
                 cwd: str) -> None:
        enter(cwd)
        self._job, self._prior, self._server = job, prior, server
        self._chunks, self._found = chunks[0], found[0]  # in a list, an object stays a reference
        self._finder: CopyFinder | None = None

    def __call__(self, batch: dict[str, Any]) -> Row:
        (number,) = batch["number"]
        row = {"number": number, "table": b"", "fault": ""}
        try:
            row["table"] = _content(self._get()(self._chunk(int(number))))
        except Exception as error:
            row["fault"] = packed(error, f"on {socket.gethostname()}")
        return {name: [value] for name, value in row.items()}

    def _chunk(self, number: int) -> CompareChunk:
        if isinstance(self._chunks, ray.ObjectRef):
            self._chunks = ray.get(self._chunks)
        return self._chunks[number]

    def _get(self) -> CopyFinder:
        if self._finder is None:
            import torch

            torch.set_num_threads(self._job.runtime.torch_threads)
            extractor = self._job.config.extractor
            there = local(files_of(extractor), self._job.extractor_sha256, self._server)
            config = self._job.config.model_copy(update={"extractor": moved(extractor, there)})
            self._finder = CopyFinder(replace(self._job, config=config), self._staged(), ray.get(self._found))
        return self._finder

    def _staged(self) -> Run:
        run = open_samples(self._job.run)
        return replace(run, config=with_local_models(run.config, self._prior, self._server))


def _content(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()
