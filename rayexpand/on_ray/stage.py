"""Model files on nodes: every process loads models whose content hash is the one the driver recorded.

A model that lies on a node under its own name, or in the node's cache, is used where its hash is right; else it is
copied once per node from the driver's, through the object store, and its hash is checked again. The store holds AHEAD
chunks for each node that is copying, however large the model is, and none of them longer than it takes to write them.
Every copy leaves the driver's node, so for many nodes and tens of gigabytes a path that all of them see is better.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections import deque
from itertools import islice
from pathlib import Path
from typing import Any

import filelock
import ray

from rayexpand.artifacts import KINDS
from rayexpand.contract.errors import EnvironmentFault
from rayexpand.models.folders import ModelFiles, staged_folder
from rayexpand.models.guides import guide_model
from rayexpand.models.prior import prior_model, staged_prior
from rayexpand.on_ray.pool import beside_driver
from rayexpand.runs.amounts import human_bytes
from rayexpand.runs.config import GuideConfig, RunConfig
from rayexpand.runs.inputs import artifact_folder

CHUNK = 16 << 20  # bytes of a model file in one object
AHEAD = 2  # chunks asked for before the first of them is written


@ray.remote(num_cpus=0, max_restarts=0)
class ModelServer:
    """Beside the driver: holds model files for nodes that lack them, and one object that all actors ask for."""

    def __init__(self, models: dict[str, dict[str, Path]], shared: Any = None) -> None:
        self._models, self._shared = models, shared  # content hash -> relative name -> file on this node

    def files(self, sha256: str) -> dict[str, int]:
        """Bytes of the files of a model, by relative name."""
        return {name: file.stat().st_size for name, file in self._models[sha256].items()}

    def chunk(self, sha256: str, name: str, start: int) -> bytes:
        """CHUNK bytes of a file. They are in the object store until who asked for them has them."""
        with open(self._models[sha256][name], "rb") as file:
            file.seek(start)
            return file.read(CHUNK)

    def shared(self) -> Any:
        return self._shared


def open_model_server(models: dict[str, ModelFiles], shared: Any = None) -> Any:
    """A ModelServer on this node for models by content hash."""
    found = {sha256: {name: file.absolute() for name, file in model.find().items()} for sha256, model in models.items()}
    return beside_driver(ModelServer, found, shared)


def run_models(config: RunConfig, hashes: dict[str, str]) -> dict[str, ModelFiles]:
    """The models of a run by content hash. `hashes` are those of run.json by part."""
    return {sha256: _part(config, part) for part, sha256 in hashes.items()}


def with_local_models(config: RunConfig, hashes: dict[str, str], server: Any) -> RunConfig:
    """`config` with every model at a place on this node where its content hash is right. Raises EnvironmentFault."""
    for part, sha256 in hashes.items():
        folder = str(local(_part(config, part), sha256, server))
        if part == "prior":
            config = config.model_copy(update={"prior": staged_prior(config.prior, Path(folder))})
        elif part == "guide":
            config = config.model_copy(update={"guide": guide_at(config.guide, folder)})
        elif part == "judge" and config.accept is not None:
            own = config.accept.model_copy(update={"guide": guide_at(config.accept.guide, folder)})
            config = config.model_copy(update={"accept": own})
        else:
            config = config.model_copy(update={"artifacts": {**config.artifacts, part: folder}})
    return config


def guide_at(guide: GuideConfig, folder: str) -> GuideConfig:
    """The guide when its files lie in `folder`."""
    if guide.checkpoint is None:
        return GuideConfig(weights=folder)
    return guide.model_copy(update={"checkpoint": str(Path(folder, Path(guide.checkpoint).name))})


def _part(config: RunConfig, part: str) -> ModelFiles:
    if part == "prior":
        return prior_model(config.prior)
    if part == "guide":
        return guide_model(config.guide.weights, config.guide.checkpoint)
    if part == "judge" and config.accept is not None:
        return guide_model(config.accept.guide.weights, config.accept.guide.checkpoint)
    return artifact_model(artifact_folder(config, part), part)


def artifact_model(folder: Path, kind: str) -> ModelFiles:
    """An artifact that samplers load: prototypes, an adapter, class or image features, thresholds."""
    return ModelFiles(lambda: {name: folder / name for name in KINDS[kind].files(folder)},
                      lambda: folder if folder.is_dir() else None, KINDS[kind].sha256)


def local(model: ModelFiles, sha256: str, server: Any) -> Path:
    """The folder of a model on this node (a shared path, or this node's cache), copied there if need be."""
    for candidate in (staged_folder(sha256), model.present()):
        if candidate is not None and model.lies_in(candidate, sha256):
            return candidate
    return _fetch(model, sha256, server)


def _fetch(model: ModelFiles, sha256: str, server: Any) -> Path:
    """Copies a model from the driver's node, once per node. Raises EnvironmentFault when it does not fit on the disk,
    or when the copy is not the model."""
    folder = staged_folder(sha256)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        if model.lies_in(folder, sha256):  # another process made it while this one waited
            return folder
        for stale in [folder, *folder.parent.glob(f"{folder.name}.partial-*")]:  # damaged; of killed processes
            shutil.rmtree(stale, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
        try:
            _copy_all(server, sha256, partial)
            if not model.lies_in(partial, sha256):
                raise EnvironmentFault(f"the model copied to {socket.gethostname()} does not have the hash "
                                       f"{sha256[:12]} of the run; its files changed while the run was on")
            os.rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _copy_all(server: Any, sha256: str, folder: Path) -> None:
    """The files of a model from the driver's node. Raises EnvironmentFault."""
    sizes = ray.get(server.files.remote(sha256))
    where = f"model {sha256[:12]} ({human_bytes(sum(sizes.values()))}) cannot be copied to {folder.parent} on " \
            f"{socket.gethostname()}"
    if (free := shutil.disk_usage(folder).free) < sum(sizes.values()):
        raise EnvironmentFault(f"{where}, where {human_bytes(free)} are free. {_ELSEWHERE}")
    try:
        for name, size in sizes.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _copy(server, sha256, name, size, folder / name)
    except OSError as error:
        raise EnvironmentFault(f"{where} ({error}). {_ELSEWHERE}") from error


_ELSEWHERE = ("Give that node room (RAYEXPAND_CACHE names the folder), or name the model by a path that all nodes see, "
              "or that each of them has: it is used wherever its content is the same")


def _copy(server: Any, sha256: str, name: str, size: int, target: Path) -> None:
    """One file, chunk by chunk; each is dropped when it is written."""
    starts = iter(range(0, size, CHUNK))
    coming = deque(server.chunk.remote(sha256, name, start) for start in islice(starts, AHEAD))
    with open(target, "wb") as file:
        while coming:
            file.write(ray.get(coming.popleft()))
            coming.extend(server.chunk.remote(sha256, name, start) for start in islice(starts, 1))
