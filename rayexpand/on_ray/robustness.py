"""A pass over corrupted images on a Ray cluster: a Show of rayexpand.studies.robustness.

    driver    numbers of blocks -> [read and corrupt] -> all classifiers of the pass -> right or wrong, a bit each

On GPUs corrupting is a stage of its own on CPUs; elsewhere each actor corrupts what its classifiers are shown. Blocks
are the same in both, so answers do not depend on the number of actors.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray

from rayexpand.contract.errors import packed, unpacked
from rayexpand.loader.config import TrainingConfig
from rayexpand.on_ray.pool import Pool, choose_pool, connected, enter, of_items, waves
from rayexpand.storage.places import open_files
from rayexpand.studies.corrupted_sets import CorruptedImages
from rayexpand.studies.parts import Study
from rayexpand.studies.robustness import CorruptedPass, Shower, load_all

Row = dict[str, list[Any]]


def show(study: Study, one: CorruptedPass, blocks: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Shows blocks on the cluster of the study. Raises what an actor raised, with its class."""
    with connected(study.config.cluster):
        pool = choose_pool(study.config.cluster.at("judge"), study.config.training.device)
        cells = len(one.shown.cells)
        open_blocks: dict[int, dict[int, np.ndarray]] = {}
        for _, wave in waves(blocks):
            for row in _dataset(study, one, wave, pool).iter_rows():
                if row["fault"]:
                    raise unpacked(row["fault"])
                block, images = int(row["block"]), len(one.rows_of(int(row["block"])))
                bits = np.unpackbits(np.frombuffer(row["bits"], np.uint8), count=len(one.trials) * images)
                found = open_blocks.setdefault(block, {})
                found[int(row["cell"])] = bits.reshape(len(one.trials), images).astype(bool)
                if len(found) == cells:
                    yield block, np.stack([found[cell] for cell in range(cells)])
                    del open_blocks[block]


class CorruptActor:
    """Numbers of blocks -> one row for each cell, with its images."""

    def __init__(self, one: CorruptedPass, cwd: str) -> None:
        enter(cwd)
        self._one, self._images = one, CorruptedImages(one.shown, one.view)

    def __call__(self, batch: dict[str, Any]) -> Iterator[Row]:
        (block,) = batch["block"]
        try:
            for cell, x_BHWC in self._images.made(self._one.rows_of(int(block))):
                yield {"block": [block], "cell": [cell], "images": [x_BHWC.tobytes()], "side": [x_BHWC.shape[1]],
                       "fault": [""]}
        except Exception as error:
            yield {"block": [block], "cell": [0], "images": [b""], "side": [0], "fault": [_fault(error)]}


class ShowActor:
    """Rows of `CorruptActor`, or numbers of blocks where it corrupts for itself -> right or wrong."""

    def __init__(self, folder: str, one: CorruptedPass, training: dict[str, Any], cwd: str) -> None:
        enter(cwd)
        self._folder, self._one, self._training, self._cwd = folder, one, TrainingConfig(**training), cwd
        self._shower: Shower | None = None
        self._corrupt: CorruptActor | None = None

    def __call__(self, batch: dict[str, Any]) -> Iterator[Row]:
        rows: Any = [batch]
        if "images" not in batch:
            self._corrupt = self._corrupt or CorruptActor(self._one, self._cwd)
            rows = self._corrupt(batch)
        for row in rows:
            yield self._answered({name: values[0] for name, values in row.items()})

    def _answered(self, row: dict[str, Any]) -> Row:
        bits, fault = b"", str(row["fault"])
        if not fault:
            try:
                rows, side = self._one.rows_of(int(row["block"])), int(row["side"])
                x_BHWC = np.frombuffer(row["images"], np.uint8).reshape(len(rows), side, side, 3)
                bits = np.packbits(self._get().right(rows, x_BHWC)).tobytes()
            except Exception as error:  # weights that are gone, out of memory, a lost device: the driver says so
                fault = _fault(error)
        return {"block": [row["block"]], "cell": [row["cell"]], "bits": [bits], "fault": [fault]}

    def _get(self) -> Shower:
        if self._shower is None:
            import torch

            from rayexpand.contract.device import choose_device

            torch.set_num_threads(self._training.threads)
            device = str(choose_device(self._training.device))
            self._shower = Shower(self._one, load_all(open_files(self._folder), self._one, device))
        return self._shower


def _dataset(study: Study, one: CorruptedPass, wave: Sequence[int], pool: Pool) -> ray.data.Dataset:
    data = of_items([{"block": block} for block in wave])
    if actors := _corrupters(pool, len(wave)):
        data = Pool(actors, 1, 0.0, {}, {}).map(data, CorruptActor, {"one": one}, in_flight=1)
    pool = replace(pool, actors=min(pool.actors, len(wave)))
    return pool.map(data, ShowActor, {"folder": str(study.files.root), "one": one,
                                      "training": study.config.training.model_dump()})


def _corrupters(pool: Pool, blocks: int) -> int:
    """Actors that corrupt for those on GPUs: the CPUs these leave. 0: every actor corrupts for itself."""
    if not pool.gpus:
        return 0
    return max(0, min(int(ray.cluster_resources().get("CPU", 0) - pool.actors * pool.cpus), blocks))


def _fault(error: Exception) -> str:
    return packed(error, f"on {socket.gethostname()}")
