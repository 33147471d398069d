"""The section `copies` of an audit, and what is wrong with it before anything is loaded."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rayexpand.contract.settings import Section
from rayexpand.data import seeds
from rayexpand.data.seeds import DataConfig
from rayexpand.evaluation import copy_extractor as extractors
from rayexpand.evaluation.copy_extractor import CopyExtractorConfig
from rayexpand.evaluation.copy_statistics import LEAST_NULL
from rayexpand.evaluation.features import is_folder
from rayexpand.runs.config import guide_of_run
from rayexpand.runs.run import Run

Scope = Literal["class", "all"]


class CopiesConfig(Section):
    """How samples are compared with seeds, and by what that is calibrated."""

    extractor: CopyExtractorConfig = Field(CopyExtractorConfig(), description="whose features are compared; without "
                                           "one the guide of the run")
    held_out: DataConfig = Field(description="real images that are no seeds, 1000 or more: what similarity is usual")
    held_out_images: int = Field(10_000, ge=LEAST_NULL, description="take so many of them at most, chosen by "
                                 "a key")
    within: Scope = Field("all", description="seeds that are looked through: all, or those of the sample's class")
    top: int = Field(5, ge=1, le=10, description="nearest seeds that are kept for each sample")
    centre: bool = Field(False, description="take the mean feature of the seeds away before comparing")
    known: int = Field(200, ge=20, description="seeds of which known copies are made, chosen by a key")
    batch: int = Field(64, ge=1, description="images per call of the extractor")
    seed: int = Field(0, ge=0, description="keys these choices")


def check(config: CopiesConfig, run: Run | None) -> list[str]:
    """What is wrong, without loading a model: `field: what, why, next step`."""
    problems = [f"held_out.{line.removeprefix('data.')}" for line in seeds.check(config.held_out)]
    if run is None:
        return problems
    chosen = chosen_extractor(config, run)
    own = guide_of_run("extractor.guide", run.config) if chosen is not config.extractor else []
    return problems + (own or extractors.check(chosen))


def chosen_extractor(config: CopiesConfig, run: Run) -> CopyExtractorConfig:
    """The extractor, the guide of the run where none is named."""
    said, guide = config.extractor, run.config.guide
    if said.is_named:
        return said
    checkpoint = None if is_folder(guide.weights) else guide.checkpoint
    return said.model_copy(update={"guide": guide.weights, "checkpoint": said.checkpoint or checkpoint})
