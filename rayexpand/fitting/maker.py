"""The other half of an artifact kind: its section in `fit:`, what it is made from, and how it is made.

A maker is a class in the module of its kind, with its entry in MAKERS (config.py), in the order in which they run.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import BaseModel, Field

from rayexpand.contract.errors import UsageError
from rayexpand.contract.protocols import Progress
from rayexpand.contract.schema import ClassTable, SeedIndex
from rayexpand.contract.settings import Device, Later, Section
from rayexpand.data.seeds import DataConfig
from rayexpand.diffusion.prototypes import ClassPrototypes
from rayexpand.fitting.adapter.config import BaseConfig
from rayexpand.runs.config import ClusterConfig, EstimateConfig, GuideConfig, RunConfig, RuntimeConfig
from rayexpand.runs.stages import PlanStage, Sizes, unknown

ARTIFACTS = "artifacts"

Training = Callable[[Progress, Path], dict[str, Any]]  # fills a folder and returns facts


class FitBase(Section):
    """A fit file, but for what it makes."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="<out>/<name>-guide and -prototypes become "
                      "links to what was made last under this name")
    out: str = Field(ARTIFACTS, min_length=1, description="folder that holds artifacts")
    seed: int = Field(0, ge=0, description="keys initial weights and the order of training")
    data: DataConfig = Field(description="the training images; never test images")
    guide: GuideConfig = GuideConfig()
    prior: BaseConfig = BaseConfig()
    fit: Any
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")
    runtime: RuntimeConfig = RuntimeConfig()
    cluster: ClusterConfig = ClusterConfig()
    estimate: Annotated[EstimateConfig, Later(EstimateConfig())] = EstimateConfig()


def _no_scores(*_: Any) -> tuple[bytes, dict[str, Any]]:
    raise UsageError("fit.scores: folds are trained as trials of a study are, which this function knows nothing of; "
                     "make scores with `rayexpand fit` or rayexpand.fit")


@dataclass(frozen=True)
class Engine:
    """Where prototypes, features and captions are computed; the numbers do not depend on it.

    `blocks(config, guide hash, index, intake, costs)` gives the features of all images, in any order, and leaves
    device, CPU and GPU seconds of other processes in `costs`; `classes(features of each class, groups)` their
    prototypes in order; `captions(config, model hash, index, costs)` the captions that a model writes; `tuning` says
    where a generator is fine-tuned; `alone(function, progress, folder)` calls a function that trains in one process
    and fills that folder, here or on a worker; `scores(section, config, index, folder, progress)` trains folds in a
    folder, and gives the file of their scores with facts of the making.
    """

    blocks: Callable[[Any, str, SeedIndex, Any, dict[str, Any]], Iterator[Any]]
    classes: Callable[[Iterable[np.ndarray], int], Iterator[ClassPrototypes]]
    captions: Callable[[Any, str, SeedIndex, dict[str, Any]], Iterator[Any]]
    tuning: Any
    alone: Callable[[Training, Progress, Path], dict[str, Any]] = lambda function, progress, folder: function(
        progress, folder)
    scores: Callable[[Any, Any, SeedIndex, str, Progress], tuple[bytes, dict[str, Any]]] = _no_scores
    is_elsewhere: bool = False  # `alone` is on a worker
    is_here: bool = False  # everything is in this process


@dataclass(frozen=True)
class World:
    """What makers share: the images, where to compute, and what this file has made so far, by role."""

    index: SeedIndex
    progress: Progress
    engine: Engine
    made: dict[str, Path]


class Maker(ABC):
    """Makes artifacts of one kind. `section` is its part of `fit:`; `text` says what that is for."""

    kind: ClassVar[str]
    text: ClassVar[str]
    section: ClassVar[type[BaseModel]]
    by_guide: ClassVar[bool] = False  # whether it asks a guide for features: that of its section, or of the file

    @abstractmethod
    def make(self, section: Any, config: Any, world: World) -> Path:
        """The folder of what follows from these, made where it is not there yet."""

    def problems(self, section: Any, config: Any, *, on_ray: bool) -> list[str]:
        """What is wrong with the section as far as files on this machine say, one line each, fields from `fit.` on."""
        return []

    def class_problems(self, section: Any, classes: ClassTable) -> list[str]:
        """The same, where the dataset has been listed."""
        return []

    def is_here(self, section: Any) -> bool:
        """Whether it computes in this process also where there is a cluster, so that its device must be here."""
        return False

    def for_run(self, config: RunConfig) -> Any:
        """The section for a run that needs this kind; None where a run does not say enough."""
        return None

    def stages(self, section: Any, config: Any, sizes: Sizes) -> list[PlanStage]:
        """What making it costs, as far as that is known before."""
        return [unknown(f"fit {self.kind}", "", "how long it takes is not counted; a first fit says it")]

    def role(self, section: Any) -> str:
        """What it is for, in the name of its link."""
        return self.kind

    def applied(self, config: Any, folder: Path) -> Any:
        """The file as later makers see it."""
        return config


def with_guide(config: FitBase, guide: GuideConfig | None) -> FitBase:
    """The file as a maker sees it whose section names a guide of its own."""
    return config if guide is None else config.model_copy(update={"guide": guide})


def data_facts(config: FitBase, index: SeedIndex) -> dict[str, Any]:
    """What of the dataset an artifact depends on."""
    hasher = hashlib.sha256()
    for seed_id, label, fault in zip(*(index.table[name].to_pylist() for name in ("seed_id", "label", "fault")),
                                     strict=True):
        hasher.update(json.dumps([seed_id, label, fault]).encode())
    return {"config": config.data.model_dump(mode="json"), "ids_sha256": hasher.hexdigest(), "images": len(index),
            "classes": list(index.classes.key), "names": list(index.classes.name)}
