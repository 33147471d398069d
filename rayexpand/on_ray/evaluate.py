"""Features of many images over a Ray Data actor pool: an Extract of rayexpand.evaluation.evaluate.

    driver    chunks (rows to read, no images) -> [read and decode] -> extract -> features, D floats per image
    ModelServer   one small actor beside the driver: the extractor's files, for nodes that lack them (stage.py)

On GPUs reading and decoding is a stage of its own on CPUs, so that GPUs do not wait for it; elsewhere each actor reads
what it extracts. Calls are cut the same way in both, and put in their order by the driver, so features do not depend
on the number of actors.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from rayexpand.contract.errors import packed, unpacked
from rayexpand.evaluation.evaluate import EvaluateConfig, Found, OnRows, Side
from rayexpand.evaluation.features import Extractor, ExtractorConfig, extractor_model, load_extractor, moved, stacked
from rayexpand.on_ray.pool import Pool, choose_pool, connected, enter, of_items, waves
from rayexpand.on_ray.stage import local, open_model_server

Row = dict[str, list[Any]]


def extract(config: EvaluateConfig, sha256: str, sides: Sequence[Side], on_rows: OnRows) -> list[Found]:
    """Features of each side, on the cluster of `config.cluster`. Raises EnvironmentFault or ModelError as soon as a
    chunk cannot be read or the extractor cannot be loaded."""
    with connected(config.cluster):
        chunks = [(side, number) for side in range(len(sides)) for number in range(len(sides[side].chunks))]
        pool = choose_pool(config.cluster, models=True)
        server = open_model_server({sha256: extractor_model(config.extractor)})
        parts: dict[tuple[int, int, int], np.ndarray] = {}
        refused, sizes = [0] * len(sides), [0] * len(sides)
        done = 0
        for _, wave in waves(chunks):
            for row in _dataset(config, sha256, sides, wave, pool, server).iter_rows():
                if row["fault"]:
                    raise unpacked(row["fault"])
                key = (int(row["side"]), int(row["chunk"]), int(row["call"]))
                rows, side = int(row["rows"]), key[0]
                if rows:
                    parts[key] = np.frombuffer(row["features"], np.float32).reshape(rows, -1)
                refused[side] += int(row["refused"])
                sizes[side] = int(row["size"])
                done += rows + int(row["refused"])
                on_rows("features", done, sum(map(len, sides)))
        return [Found(stacked([parts[key] for key in sorted(parts) if key[0] == side]), refused[side], sizes[side])
                for side in range(len(sides))]


class Reader:
    """Chunks -> one row for each call, with its images."""

    def __init__(self, config: EvaluateConfig, sides: Sequence[Side], size: int, cwd: str) -> None:
        enter(cwd)
        self._config, self._sides, self._size = config, sides, size

    def __call__(self, batch: dict[str, Any]) -> Iterator[Row]:
        (side,), (chunk,), (content,) = batch["side"], batch["chunk"], batch["rows"]
        try:
            table = pa.ipc.open_stream(content).read_all()
            for number, call in enumerate(self._sides[side].calls(table, self._size, self._config.batch)):
                yield {"side": [side], "chunk": [chunk], "call": [number], "rows": [call.rows],
                       "refused": [call.refused], "images": [call.x_BHWC.tobytes()], "fault": [""]}
        except Exception as error:
            yield {"side": [side], "chunk": [chunk], "call": [0], "rows": [0], "refused": [0], "images": [b""],
                   "fault": [_fault(error)]}


class ExtractActor:
    """One process of the pool: rows of `Reader`, or chunks where it reads for itself, -> features."""

    def __init__(self, config: EvaluateConfig, sha256: str, sides: Sequence[Side], server: Any, cwd: str) -> None:
        enter(cwd)
        self._config, self._sha256, self._sides, self._cwd, self._server = config, sha256, sides, cwd, server
        self._extractor: Extractor | None = None

    def __call__(self, batch: dict[str, Any]) -> Iterator[Row]:
        try:
            extractor = self._get()
        except Exception as error:
            yield _failed(_fault(error))
            return
        if "images" in batch:
            yield self._one(extractor, {name: values[0] for name, values in batch.items()})
            return
        for row in Reader(self._config, self._sides, extractor.size, self._cwd)(batch):
            yield self._one(extractor, {name: values[0] for name, values in row.items()})

    def _one(self, extractor: Extractor, call: dict[str, Any]) -> Row:
        if call["fault"]:
            return _failed(call["fault"])
        features = b""
        if rows := int(call["rows"]):
            shape = (self._config.batch, extractor.size, extractor.size, 3)
            try:
                features = extractor(np.frombuffer(call["images"], np.uint8).reshape(shape))[:rows].tobytes()
            except Exception as error:  # out of memory, a lost device: the driver says so
                return _failed(_fault(error))
        return {"side": [call["side"]], "chunk": [call["chunk"]], "call": [call["call"]], "rows": [rows],
                "refused": [call["refused"]], "features": [features], "size": [extractor.size], "fault": [""]}

    def _get(self) -> Extractor:
        if self._extractor is None:
            import torch

            torch.set_num_threads(self._config.runtime.torch_threads)
            self._extractor = load_extractor(here_or_staged(self._config.extractor, self._sha256, self._server))
        return self._extractor


def here_or_staged(config: ExtractorConfig, sha256: str, server: Any) -> ExtractorConfig:
    """The extractor where it already is on this node, if its content is right, else a copy of the driver's.

    Raises EnvironmentFault when the copy is not the model.
    """
    return moved(config, local(extractor_model(config), sha256, server))


def _dataset(config: EvaluateConfig, sha256: str, sides: Sequence[Side], wave: Sequence[tuple[int, int]], pool: Pool,
             server: Any) -> ray.data.Dataset:
    plain = [Side(side.name, [], side.read, side.min_side, side.max_pixels) for side in sides]
    data = of_items([{"side": side, "chunk": chunk, "rows": _content(sides[side].chunks[chunk])}
                     for side, chunk in wave])
    if readers := _readers(pool, len(wave)):
        size = load_extractor(config.extractor.model_copy(update={"device": "cpu"})).size
        on_cpus = Pool(readers, 1, 0.0, {}, {})
        data = on_cpus.map(data, Reader, {"config": config, "sides": plain, "size": size}, in_flight=1)
    pool = replace(pool, actors=min(pool.actors, len(wave)))
    return pool.map(data, ExtractActor, {"config": config, "sha256": sha256, "sides": plain, "server": server})


def _readers(pool: Pool, chunks: int) -> int:
    """Processes that read and decode for GPU actors: the CPUs those leave. 0: every actor reads for itself."""
    if not pool.gpus:
        return 0
    return max(0, min(math.floor(ray.cluster_resources().get("CPU", 0) - pool.actors * pool.cpus), chunks))


def _content(chunk: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, chunk.schema) as writer:
        writer.write_table(chunk)
    return sink.getvalue().to_pybytes()


def _failed(fault: str) -> Row:
    return {"side": [0], "chunk": [0], "call": [0], "rows": [0], "refused": [0], "features": [b""], "size": [0],
            "fault": [fault]}


def _fault(error: Exception) -> str:
    return packed(error, f"on {socket.gethostname()}")
