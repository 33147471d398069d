"""Model files on nodes: every process loads models whose content hash is the one the driver recorded.

A model that lies on a node under its own name, or in the node's cache, is used where its hash is right; else it is
copied once per node from the driver's, through the object store, and its hash is checked again.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayexpand.contract.errors import EnvironmentFault, ModelError
from rayexpand.models.folders import folder_hash, loaded_files, staged_folder
from rayexpand.models.guide_files import checkpoint_file, guide_folder, present_guide
from rayexpand.models.guides import guide_hash
from rayexpand.models.prior import present, resolve
from rayexpand.runs.config import GuideConfig, RunConfig
from rayexpand.runs.inputs import artifact_files, artifact_folder, artifact_hash

CHUNK = 64 << 20  # bytes of a model file in one object


@dataclass(frozen=True, slots=True)
class Model:
    """One model or artifact of a configuration, as files in a folder. Nothing is looked up before it is asked for."""

    source: Callable[[], tuple[Path, list[str]]]  # on the driver: folder and relative file names
    present: Callable[[], Path | None]  # on a node: the folder under a name of its own
    hash: Callable[[Path], str]  # content hash of such a folder


@ray.remote(num_cpus=0, max_restarts=0)
class ModelServer:
    """Beside the driver: holds model files for nodes that lack them, and one object that all actors ask for."""

    def __init__(self, models: dict[str, tuple[str, list[str]]], shared: Any = None) -> None:
        self._models, self._shared = models, shared  # content hash -> folder on this node, relative file names
        self._files: dict[str, list[tuple[str, list[Any]]]] = {}

    def model(self, sha256: str) -> list[tuple[str, list[Any]]]:
        """(file name, chunk references) of a model; put into the object store when first asked for."""
        if sha256 not in self._files:
            folder, names = self._models[sha256]
            self._files[sha256] = [(name, [ray.put(chunk) for chunk in _chunks(Path(folder, name))])
                                   for name in names]
        return self._files[sha256]

    def shared(self) -> Any:
        return self._shared


def open_model_server(models: dict[str, Model], shared: Any = None) -> Any:
    """A Shelf on this node for models by content hash."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    found = {}
    for sha256, model in models.items():
        folder, names = model.source()
        found[sha256] = (str(folder.absolute()), names)
    return ModelServer.options(scheduling_strategy=here).remote(found, shared)  # type: ignore[attr-defined]


def run_models(config: RunConfig, hashes: dict[str, str]) -> dict[str, Model]:
    """The models of a run by content hash. `hashes` are those of run.json by part."""
    return {sha256: _part(config, part) for part, sha256 in hashes.items()}


def with_local_models(config: RunConfig, hashes: dict[str, str], shelf: Any) -> RunConfig:
    """`config` with every model at a place on this node where its content hash is right. Raises EnvironmentFault."""
    for part, sha256 in hashes.items():
        folder = str(local(_part(config, part), sha256, shelf))
        if part == "prior":
            config = config.model_copy(update={"prior": config.prior.model_copy(update={"weights": folder})})
        elif part == "guide":
            config = config.model_copy(update={"guide": guide_at(config.guide, folder)})
        else:
            config = config.model_copy(update={
                "artifacts": config.artifacts.model_copy(update={part: folder})})
    return config


def guide_at(guide: GuideConfig, folder: str) -> GuideConfig:
    """The guide when its files lie in `folder`."""
    if guide.checkpoint is None:
        return GuideConfig(weights=folder)
    return guide.model_copy(update={"checkpoint": str(Path(folder, Path(guide.checkpoint).name))})


def _part(config: RunConfig, part: str) -> Model:
    if part == "prior":
        return prior_model(config.prior.weights)
    if part == "guide":
        return guide_model(config.guide)
    return artifact_model(artifact_folder(config, part), part)


def prior_model(weights: str) -> Model:
    """A generator's pipeline folder."""
    def source() -> tuple[Path, list[str]]:
        folder = resolve(weights)
        return folder, loaded_files(folder)

    return Model(source, lambda: present(weights), folder_hash)


def artifact_model(folder: Path, kind: str) -> Model:
    """An artifact that samplers load: prototypes, an adapter, class or image features."""
    return Model(lambda: (folder, artifact_files(folder, kind)), lambda: folder if folder.is_dir() else None,
                 lambda copied: artifact_hash(copied, kind))


def guide_model(guide: GuideConfig) -> Model:
    """A guide's folder, or the folder of the checkpoint of an architecture (only these have one)."""
    named = guide.checkpoint is not None

    def source() -> tuple[Path, list[str]]:
        folder = guide_folder(guide.weights)
        if folder is not None:
            return folder, loaded_files(folder)
        file = checkpoint_file(guide.weights, guide.checkpoint)
        return file.parent, [file.name]

    def here() -> Path | None:
        if not named:
            return present_guide(guide.weights)
        file = Path(str(guide.checkpoint)).expanduser()
        return file.parent if file.is_file() else None

    def content(folder: Path) -> str:
        if not named:
            return folder_hash(folder)
        return guide_hash(guide.weights, str(folder / Path(str(guide.checkpoint)).name))

    return Model(source, here, content)


def local(model: Model, sha256: str, shelf: Any) -> Path:
    """The folder of a model on this node (a shared path, or this node's cache), copied there if need be."""
    for candidate in (staged_folder(sha256), model.present()):
        if candidate is not None and candidate.is_dir() and _is(model, candidate, sha256):
            return candidate
    return _fetch(model, sha256, shelf)


def _is(model: Model, folder: Path, sha256: str) -> bool:
    try:
        return model.hash(folder) == sha256
    except (ModelError, OSError):
        return False  # incomplete, or another thing under this name


def _fetch(model: Model, sha256: str, shelf: Any) -> Path:
    """Copies a model from the driver's node, once per node. Raises EnvironmentFault when the copy is not the model."""
    folder = staged_folder(sha256)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return folder
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
        for name, chunks in ray.get(shelf.model.remote(sha256)):
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            with open(partial / name, "wb") as file:
                for chunk in chunks:
                    file.write(ray.get(chunk))
        if not _is(model, partial, sha256):
            shutil.rmtree(partial)
            raise EnvironmentFault(f"the model copied to {socket.gethostname()} does not have the hash {sha256[:12]} "
                                   "of the run; its files changed while the run was on")
        os.rename(partial, folder)
    return folder


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk
