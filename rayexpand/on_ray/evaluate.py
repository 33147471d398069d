"""Features of many images over a Ray Data actor pool: an Extract of rayexpand.evaluation.evaluate.

    driver    chunks (rows to read, no images) -> [read and decode] -> extract -> features, D floats per image
    Stock     one small actor beside the driver: the extractor's files, for nodes that lack them

On GPUs reading and decoding is a stage of its own on CPUs, so that GPUs do not wait for it; elsewhere each actor reads
what it extracts. Calls are cut the same way in both, and put in their order by the driver, so features do not depend
on the number of actors.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayexpand.contract.errors import EnvironmentFault, ModelError, RayexpandError
from rayexpand.evaluation.evaluate import EvaluateConfig, Found, OnRows, Side
from rayexpand.evaluation.features import (
    Extractor,
    ExtractorConfig,
    extractor_hash,
    load_extractor,
    model_files,
    moved,
    stacked,
)
from rayexpand.models.folders import DIGITS, staged_folder
from rayexpand.models.guide_files import present_guide
from rayexpand.on_ray.expand import Pool, choose_pool, connected
from rayexpand.on_ray.stage import CHUNK

WAVE = 10_000  # chunks handed to Ray Data at once

Row = dict[str, list[Any]]


def extract(config: EvaluateConfig, sha256: str, sides: Sequence[Side], on_rows: OnRows) -> list[Found]:
    """Features of each side, on the cluster of `config.cluster`. Raises EnvironmentFault or ModelError as soon as a
    chunk cannot be read or the extractor cannot be loaded."""
    with connected(config.cluster):
        chunks = [(side, number) for side in range(len(sides)) for number in range(len(sides[side].chunks))]
        pool = choose_pool(config.cluster, models=True)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        files = {name: str(path) for name, path in model_files(config.extractor).items()}
        stock = Stock.options(scheduling_strategy=here).remote(files)  # type: ignore[attr-defined]
        parts: dict[tuple[int, int, int], np.ndarray] = {}
        refused, sizes = [0] * len(sides), [0] * len(sides)
        done = 0
        for start in range(0, len(chunks), WAVE):
            wave = chunks[start:start + WAVE]
            for row in _dataset(config, sha256, sides, wave, pool, stock).iter_rows():
                if row["fault"]:
                    raise (ModelError if row["model"] else EnvironmentFault)(row["fault"])
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


@ray.remote(num_cpus=0, max_restarts=0)
class Stock:
    """Beside the driver: the files of a model, put into the object store when a node first asks."""

    def __init__(self, files: dict[str, str]) -> None:
        self._files = files
        self._chunks: dict[str, list[Any]] = {}

    def chunks(self) -> dict[str, list[Any]]:
        """File name -> references of its pieces."""
        if not self._chunks:
            self._chunks = {name: [ray.put(piece) for piece in _pieces(path)] for name, path in self._files.items()}
        return self._chunks


class Reader:
    """Chunks -> one row for each call, with its images."""

    def __init__(self, config: EvaluateConfig, sides: Sequence[Side], cwd: str, size: int) -> None:
        if os.path.isdir(cwd):
            os.chdir(cwd)  # relative paths of the configuration are relative to where the driver was started
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

    def __init__(self, config: EvaluateConfig, sha256: str, sides: Sequence[Side], cwd: str, stock: Any) -> None:
        if os.path.isdir(cwd):
            os.chdir(cwd)
        self._config, self._sha256, self._sides, self._cwd, self._stock = config, sha256, sides, cwd, stock
        self._extractor: Extractor | None = None

    def __call__(self, batch: dict[str, Any]) -> Iterator[Row]:
        try:
            extractor = self._get()
        except Exception as error:
            yield _failed(_fault(error), model=isinstance(error, ModelError))
            return
        if "images" in batch:
            yield self._one(extractor, {name: values[0] for name, values in batch.items()})
            return
        for row in Reader(self._config, self._sides, self._cwd, extractor.size)(batch):
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
                "refused": [call["refused"]], "features": [features], "size": [extractor.size], "fault": [""],
                "model": [False]}

    def _get(self) -> Extractor:
        if self._extractor is None:
            import torch

            torch.set_num_threads(self._config.runtime.torch_threads)
            self._extractor = load_extractor(here_or_staged(self._config.extractor, self._sha256, self._stock))
        return self._extractor


def here_or_staged(config: ExtractorConfig, sha256: str, stock: Any) -> ExtractorConfig:
    """The extractor where it already is on this node, if its content is right, else a copy of the driver's.

    Raises EnvironmentFault when the copy is not the model.
    """
    if config.checkpoint or present_guide(config.guide or DIGITS):
        try:
            if extractor_hash(config) == sha256:
                return config
        except (ModelError, OSError):
            pass  # not on this node
    staged = staged_folder(sha256)
    staged.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{staged}.lock"):
        if not staged.is_dir():
            partial = Path(tempfile.mkdtemp(prefix=f"{staged.name}.partial-", dir=staged.parent))
            for name, chunks in ray.get(stock.chunks.remote()).items():
                with open(partial / name, "wb") as file:
                    for chunk in chunks:
                        file.write(ray.get(chunk))
            if extractor_hash(moved(config, partial)) != sha256:
                shutil.rmtree(partial)
                raise EnvironmentFault(f"the extractor copied to {socket.gethostname()} does not have the hash "
                                       f"{sha256[:12]} of the driver's; its files changed meanwhile")
            os.rename(partial, staged)
    return moved(config, staged)


def _dataset(config: EvaluateConfig, sha256: str, sides: Sequence[Side], wave: Sequence[tuple[int, int]], pool: Pool,
             stock: Any) -> ray.data.Dataset:
    rows = [{"side": side, "chunk": chunk, "rows": _content(sides[side].chunks[chunk])} for side, chunk in wave]
    plain = [Side(side.name, [], side.read, side.min_side, side.max_pixels) for side in sides]
    data: ray.data.Dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    if readers := _readers(pool, len(wave)):
        size = load_extractor(config.extractor.model_copy(update={"device": "cpu"})).size
        data = data.map_batches(
            Reader, batch_size=1, num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=readers, max_tasks_in_flight_per_actor=1),
            fn_constructor_kwargs={"config": config, "sides": plain, "cwd": os.getcwd(), "size": size})
    return data.map_batches(
        ExtractActor, batch_size=1, num_cpus=pool.cpus, num_gpus=pool.gpus or None, resources=pool.resources or None,
        label_selector=pool.labels or None,
        compute=ray.data.ActorPoolStrategy(size=min(pool.actors, len(wave)), max_tasks_in_flight_per_actor=2),
        fn_constructor_kwargs={"config": config, "sha256": sha256, "sides": plain, "cwd": os.getcwd(), "stock": stock})


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


def _failed(fault: str, *, model: bool = False) -> Row:
    return {"side": [0], "chunk": [0], "call": [0], "rows": [0], "refused": [0], "features": [b""], "size": [0],
            "fault": [fault], "model": [model]}


def _fault(error: Exception) -> str:
    kind = "" if isinstance(error, RayexpandError) else f"{type(error).__name__}: "
    return f"{kind}{error} (on {socket.gethostname()})"


def _pieces(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(CHUNK):
            yield piece
