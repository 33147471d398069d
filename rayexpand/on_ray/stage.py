"""Model files on nodes: every process loads models whose content hash is the one the driver recorded.

A model that lies on a node under its own name, or in the node's cache, is used where its hash is right; else it is
copied once per node from the driver's, through the object store, and its hash is checked again.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import ray

from rayexpand.artifacts import KINDS
from rayexpand.contract.errors import EnvironmentFault
from rayexpand.models.folders import ModelFiles, staged_folder
from rayexpand.models.guides import guide_model
from rayexpand.models.prior import prior_model
from rayexpand.on_ray.pool import beside_driver
from rayexpand.runs.config import GuideConfig, RunConfig
from rayexpand.runs.inputs import artifact_folder

CHUNK = 64 << 20  # bytes of a model file in one object


@ray.remote(num_cpus=0, max_restarts=0)
class ModelServer:
    """Beside the driver: holds model files for nodes that lack them, and one object that all actors ask for."""

    def __init__(self, models: dict[str, dict[str, Path]], shared: Any = None) -> None:
        self._models, self._shared = models, shared  # content hash -> relative name -> file on this node
        self._files: dict[str, list[tuple[str, list[Any]]]] = {}

    def model(self, sha256: str) -> list[tuple[str, list[Any]]]:
        """(file name, chunk references) of a model; put into the object store when first asked for."""
        if sha256 not in self._files:
            self._files[sha256] = [(name, [ray.put(chunk) for chunk in _chunks(file)])
                                   for name, file in self._models[sha256].items()]
        return self._files[sha256]

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
            config = config.model_copy(update={"prior": config.prior.model_copy(update={"weights": folder})})
        elif part == "guide":
            config = config.model_copy(update={"guide": guide_at(config.guide, folder)})
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
        return prior_model(config.prior.weights)
    if part == "guide":
        return guide_model(config.guide.weights, config.guide.checkpoint)
    return artifact_model(artifact_folder(config, part), part)


def artifact_model(folder: Path, kind: str) -> ModelFiles:
    """An artifact that samplers load: prototypes, an adapter, class or image features."""
    return ModelFiles(lambda: {name: folder / name for name in KINDS[kind].files(folder)},
                      lambda: folder if folder.is_dir() else None, KINDS[kind].sha256)


def local(model: ModelFiles, sha256: str, server: Any) -> Path:
    """The folder of a model on this node (a shared path, or this node's cache), copied there if need be."""
    for candidate in (staged_folder(sha256), model.present()):
        if candidate is not None and model.lies_in(candidate, sha256):
            return candidate
    return _fetch(model, sha256, server)


def _fetch(model: ModelFiles, sha256: str, server: Any) -> Path:
    """Copies a model from the driver's node, once per node. Raises EnvironmentFault when the copy is not the model."""
    folder = staged_folder(sha256)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return folder
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
        for name, chunks in ray.get(server.model.remote(sha256)):
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            with open(partial / name, "wb") as file:
                for chunk in chunks:
                    file.write(ray.get(chunk))
        if not model.lies_in(partial, sha256):
            shutil.rmtree(partial)
            raise EnvironmentFault(f"the model copied to {socket.gethostname()} does not have the hash {sha256[:12]} "
                                   "of the run; its files changed while the run was on")
        os.rename(partial, folder)
    return folder


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk
