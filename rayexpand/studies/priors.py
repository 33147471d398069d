"""Generators that a study trains itself, so that its arms may differ in what samples them.

    expansions:
      small:
        method: {name: text2img, ratio: 10}
        fit:
          pretrain: {data: {source: digits, split: pool}, unet: {channels: [16, 32]}}

Arms and repetitions with the same section share one artifact, which is trained once.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from rayexpand.data.seeds import DataConfig
from rayexpand.fitting.config import FitConfig
from rayexpand.fitting.config import preflight as fit_preflight
from rayexpand.fitting.maker import ARTIFACTS
from rayexpand.fitting.pretrain import PretrainFit
from rayexpand.runs.config import RunConfig


class PriorFit(PretrainFit):
    data: DataConfig = Field(description="the images it is trained on; test images among them are refused")
    seed: int | None = Field(0, ge=0, description="keys its initial weights and the order of its training; null: the "
                             "seed of the repetition, so that each trains a generator of its own")


def prior_task(made: RunConfig, wanted: PriorFit, out: str = ARTIFACTS) -> FitConfig:
    """What `rayexpand fit` would be asked for."""
    section = wanted.model_dump(exclude={"data", "seed"})
    return FitConfig(name=made.name, out=out, seed=made.seed if wanted.seed is None else wanted.seed, data=wanted.data,
                     fit={"pretrain": section}, device=made.prior.device, runtime=made.runtime, cluster=made.cluster)


def prior_problems(made: RunConfig, wanted: PriorFit) -> list[str]:
    """What is wrong with the section as far as files on this machine say, one line each."""
    lines = fit_preflight(prior_task(made, wanted), device_here=False, on_ray=False)
    return [line if line.startswith("fit.") else f"fit.pretrain.{line}" for line in lines]


def with_prior(made: RunConfig, folder: Path) -> RunConfig:
    """The run with the generator of an artifact; its guide stays the one that the run names."""
    return made.model_copy(update={"prior": made.prior.model_copy(update={"weights": str(folder / "pipeline")})})
