"""Features of many images over a Ray Data actor pool: an Extract of rayexpand.evaluation.evaluate.

    driver    spans (rows to read, no images) -> extract -> sums over all images, rows of those that are kept
    ModelServer   one small actor beside the driver: the extractor's files, for nodes that lack them (stage.py)

An actor works on one span at a time and returns it as one row, so the driver never holds the features of all images.
On GPUs, tasks on the CPUs that are left over read and decode ahead of each actor; elsewhere each actor reads what it
extracts, in a thread ahead. Calls are cut the same way in both, and the driver puts spans together by their numbers, so
the numbers do not depend on how many actors there are.
"""

from __future__ import annotations

import io
import math
import os
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from rayexpand.contract.errors import packed, unpacked
from rayexpand.evaluation.evaluate import EvaluateConfig, sums_wanted
from rayexpand.evaluation.extraction import CALLS_AHEAD, Found, Gathered, OnRows, SpanPart, Sums, ahead, part_of
from rayexpand.evaluation.features import Extractor, ExtractorConfig, ImageBatch, extractor_model, load_extractor, moved
from rayexpand.evaluation.intake import IntakeConfig
from rayexpand.evaluation.moments import Moments
from rayexpand.evaluation.sides import Side
from rayexpand.on_ray.pool import Pool, choose_pool, connected, ending, enter, waves
from rayexpand.on_ray.stage import local, open_model_server

Row = dict[str, list[Any]]


def extract(config: EvaluateConfig, sha256: str, sides: Sequence[Side], on_rows: OnRows) -> list[Found]:
    """What is found of each side, on the cluster of `config.cluster`. Raises EnvironmentFault or ModelError as soon as
    a chunk cannot be read or the extractor cannot be loaded."""
    with connected(config.cluster):
        spans = [(side, number) for side in range(len(sides)) for number in range(len(sides[side].spans))]
        pool = choose_pool(config.cluster.at("judge"), config.extractor.device)
        pool = replace(pool, actors=min(pool.actors, max(1, len(spans))))
        settings = {"config": config, "sha256": sha256, "sides": [side.alone() for side in sides],
                    "readers": _readers(pool)}
        gathered = [Gathered(side) for side in sides]
        done = 0
        with ending(open_model_server({sha256: extractor_model(config.extractor)})) as server:
            for _, wave in waves(spans):
                for row in pool.map([_item(sides, *one) for one in wave], ExtractActor, {**settings, "server": server},
                                    in_flight=1).iter_rows():
                    if row["fault"]:
                        raise unpacked(row["fault"])
                    part = _unpacked_part(row)
                    gathered[int(row["side"])].size = int(row["size"])
                    gathered[int(row["side"])].add(int(row["span"]), part)
                    done += part.rows + part.refused
                    on_rows("features", done, sum(map(len, sides)))
        return [one.found() for one in gathered]


class ExtractActor:
    """One process of the pool. Loads its extractor at the first span, so that a bad start is a fault, not a crash."""

    def __init__(self, config: EvaluateConfig, sha256: str, sides: Sequence[Side], server: Any, readers: int,
                 cwd: str) -> None:
        enter(cwd)
        self._config, self._sha256, self._sides, self._server = config, sha256, sides, server
        self._readers = readers
        self._extractor: Extractor | None = None

    def __call__(self, batch: dict[str, Any]) -> Row:
        (side,), (span,), (contents,) = batch["side"], batch["span"], batch["chunks"]
        row = {"side": [side], "span": [span], "size": [0], "fault": [""], **_packed_part(NOTHING)}
        try:
            extractor = self._get()
            chunks = [pa.ipc.open_stream(content).read_all() for content in contents]
            part = part_of(zip(chunks, self._calls(self._sides[side], chunks, extractor), strict=True), extractor,
                           sums=sums_wanted(self._config))
            row |= {"size": [extractor.size], **_packed_part(part)}
        except Exception as error:  # out of memory, a lost device, a file that is gone: the driver says so
            row["fault"] = [packed(error, f"on {socket.gethostname()}")]
        return row

    def _calls(self, side: Side, chunks: Sequence[pa.Table], extractor: Extractor) -> Iterator[Iterator[ImageBatch]]:
        """The calls of each chunk, those of the next `readers` chunks being made ahead by tasks."""
        shape = (extractor.size, self._config.batch, extractor.intake)
        if not self._readers:
            yield from (ahead(side.calls(chunk, *shape)) for chunk in chunks)
            return
        task = read_calls.options(num_returns="streaming", _generator_backpressure_num_objects=CALLS_AHEAD)
        waiting: deque[Any] = deque()
        for chunk in chunks:
            waiting.append(task.remote(side, chunk, *shape, os.getcwd()))
            if len(waiting) == self._readers:
                yield map(ray.get, waiting.popleft())
        while waiting:
            yield map(ray.get, waiting.popleft())

    def _get(self) -> Extractor:
        if self._extractor is None:
            import torch

            torch.set_num_threads(self._config.runtime.torch_threads)
            self._extractor = load_extractor(here_or_staged(self._config.extractor, self._sha256, self._server))
        return self._extractor


@ray.remote(num_cpus=1)
def read_calls(side: Side, chunk: pa.Table, size: int, batch: int, intake: IntakeConfig, cwd: str
               ) -> Iterator[ImageBatch]:
    """Calls of a chunk, read and decoded on a CPU."""
    enter(cwd)
    yield from side.calls(chunk, size, batch, intake)


def here_or_staged(config: ExtractorConfig, sha256: str, server: Any) -> ExtractorConfig:
    """The extractor where it already is on this node, if its content is right, else a copy of the driver's.

    Raises EnvironmentFault when the copy is not the model.
    """
    return moved(config, local(extractor_model(config), sha256, server))


def _readers(pool: Pool) -> int:
    """Tasks that read and decode for each GPU actor: its share of the CPUs that actors leave. 0: it reads itself."""
    if not pool.gpus:
        return 0
    return max(0, math.floor((ray.cluster_resources().get("CPU", 0) - pool.actors * pool.cpus) / pool.actors))


def _item(sides: Sequence[Side], side: int, span: int) -> dict[str, Any]:
    return {"side": side, "span": span, "chunks": [_content(sides[side].chunks[i]) for i in sides[side].spans[span]]}


def _content(chunk: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, chunk.schema) as writer:
        writer.write_table(chunk)
    return sink.getvalue().to_pybytes()


NOTHING = SpanPart(np.empty((0, 0), np.float32), np.empty(0, np.int64), np.empty(0, np.int8), None, 0, 0)


def _packed_part(part: SpanPart) -> Row:
    arrays = [*part[:3], *(np.asarray(one) for moments in part.sums or () for one in moments)]
    sink = io.BytesIO()
    for array in arrays:
        np.save(sink, array, allow_pickle=False)
    return {"arrays": [sink.getvalue()], "rows": [part.rows], "refused": [part.refused],
            "summed": [part.sums is not None]}


def _unpacked_part(row: dict[str, Any]) -> SpanPart:
    stream = io.BytesIO(row["arrays"])
    h_ND, labels_N, half_N = (np.load(stream) for _ in range(3))
    sums = None
    if row["summed"]:
        sums = Sums(*(Moments(int(np.load(stream)), np.load(stream), np.load(stream)) for _ in Sums._fields))
    return SpanPart(h_ND, labels_N, half_N, sums, int(row["rows"]), int(row["refused"]))
