"""What a fit file costs, before anything is made: a stage for each artifact, by its maker."""

from __future__ import annotations

from rayexpand.contract.errors import SeedDataError
from rayexpand.data import seeds
from rayexpand.data.subsets import sound_rows
from rayexpand.fitting.config import MAKERS, FitConfig
from rayexpand.fitting.costs import made_before
from rayexpand.runs.stages import PlanStage, Sizes, Stages, timed


def plan_fit(config: FitConfig) -> Stages:
    """Stages of a fit file on the fleet of its section `estimate`. Raises SeedDataError where the data can neither be
    listed nor is told by estimate.seeds and estimate.classes."""
    return timed(fit_stages(config, sizes_of(config)), config.estimate)


def fit_stages(config: FitConfig, sizes: Sizes) -> list[PlanStage]:
    """In the order in which artifacts are made."""
    found = []
    for maker in MAKERS:
        if (section := getattr(config.fit, maker.kind)) is not None:
            found += made_before(config, maker.role(section), maker.stages(section, config, sizes))
    return found


def sizes_of(config: FitConfig) -> Sizes:
    """Of the listed data, else as `estimate` says."""
    told = config.estimate
    try:
        index = seeds.build_index(config.data)
    except SeedDataError:
        if told.seeds is None or told.classes is None:
            raise
        return Sizes(told.seeds, told.classes)
    return Sizes(len(sound_rows(index)), len(index.classes))
