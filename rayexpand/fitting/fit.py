"""Fitting: what guided methods need and a dataset has not, a guide trained on it and prototypes of its classes.

config.py says what to fit. Everything becomes an artifact, found again by what it was made from, so
the same command a second time makes nothing.
"""

# N images, B rows, K classes, D features

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rayexpand.artifacts.store import point
from rayexpand.contract.errors import ConfigError
from rayexpand.contract.protocols import Progress
from rayexpand.contract.schema import SeedIndex
from rayexpand.data import seeds
from rayexpand.data.batches import SeedBatches
from rayexpand.diffusion.prototypes import ClassPrototypes, fit_class
from rayexpand.fitting.adapter.config import AdapterFit
from rayexpand.fitting.adapter.fit import TUNE_HERE
from rayexpand.fitting.captions import CaptionBlock, Captioner
from rayexpand.fitting.config import MAKERS, FitConfig, fit_config, preflight
from rayexpand.fitting.features import Block, Intake, SeedFeatures
from rayexpand.fitting.guide import GuideFit, load_fit_guide
from rayexpand.fitting.maker import ARTIFACTS, Engine, World
from rayexpand.runs.config import GuideConfig, RunConfig


def fit_for(config: RunConfig, progress: Progress, guide: GuideFit | None = None, adapter: AdapterFit | None = None, *,
            groups: int = 3, out: str = ARTIFACTS) -> dict[str, Path]:
    """Makes what the method of a run needs, in this process, unless it is there: folders by role, `guide` (only where
    one was asked for) and `prototypes`. See `with_artifacts`."""
    wanted = fit_config(config, guide, adapter, groups=groups, out=out)
    return {} if wanted is None else fit(wanted, progress)


def with_artifacts(config: RunConfig, made: Mapping[str, Path]) -> RunConfig:
    """The run with the guide and the other artifacts that `fit_for` made."""
    update: dict[str, Any] = {}
    if "guide" in made:
        update["guide"] = GuideConfig(weights=str(made["guide"]))
    if "generator" in made:
        update["prior"] = config.prior.model_copy(update={"weights": str(made["generator"])})
    if others := {role: str(folder) for role, folder in made.items() if role not in ("guide", "generator")}:
        update["artifacts"] = {**config.artifacts, **others}
    return config.model_copy(update=update)


def fit(config: FitConfig, progress: Progress, engine: Engine | None = None) -> dict[str, Path]:
    """Makes what `config` asks for, unless it is there already: folders by role, `guide` and `prototypes`.

    `engine` says where prototypes are computed; None: in this process. Raises ConfigError (all problems),
    SeedDataError, ModelError, StorageError, and UsageError for images or features that cannot be used.
    """
    from rayexpand.contract.device import torch_threads

    engine = engine or HERE
    world = World(_checked(config, engine), progress, engine, {})
    wanted = config.fit
    sections = [(maker, section) for maker in MAKERS if (section := getattr(wanted, maker.kind)) is not None]
    with torch_threads(config.runtime.torch_threads):
        for done, (maker, section) in enumerate(sections):
            progress(f"fitting {maker.kind}", done, len(sections))
            folder = maker.make(section, config, world)
            world.made[maker.role(section)] = folder
            config = maker.applied(config, folder)
    for role, folder in world.made.items():
        point(config.out, f"{config.name}-{role}", folder)
    return dict(world.made)


def _checked(config: FitConfig, engine: Engine) -> SeedIndex:
    """The images, listed. Raises ConfigError with everything that is wrong, also with what their classes lack."""
    wanted = [(maker, section) for maker in MAKERS if (section := getattr(config.fit, maker.kind)) is not None]
    here = engine.is_here or (not engine.is_elsewhere and any(maker.is_here(section) for maker, section in wanted))
    problems = preflight(config, device_here=here, on_ray=engine.tuning.spreads)
    if seeds.check(config.data):
        raise ConfigError(config.name, problems)
    index = seeds.build_index(config.data)
    problems += [line for maker, section in wanted for line in maker.class_problems(section, index.classes)]
    if problems:
        raise ConfigError(config.name, problems)
    return index


# ------------------------------------------------------------------------------------------------------ in this process


def blocks_here(config: FitConfig, guide_sha256: str, index: SeedIndex, intake: Intake,
                costs: dict[str, Any]) -> Iterator[Block]:
    """Features of all images, computed in this process."""
    started = time.perf_counter()
    guide = load_fit_guide(config, index)
    features = SeedFeatures(index, config.data, guide, intake, config.runtime.io_threads)
    try:
        yield from features(range(len(index)))
    finally:
        features.close()
        costs |= {"device": guide.device.type,
                  "gpu_seconds": (time.perf_counter() - started) * (guide.device.type == "cuda")}


def classes_here(parts: Iterable[np.ndarray], groups: int) -> Iterator[ClassPrototypes]:
    """Prototypes of the features of each class, in this process."""
    return (fit_class(features_ND, groups) for features_ND in parts)


def captions_here(config: FitConfig, model_sha256: str, index: SeedIndex,
                  costs: dict[str, Any]) -> Iterator[CaptionBlock]:
    """Captions of all images, written in this process."""
    assert config.fit.captions is not None
    started = time.perf_counter()
    captioner = Captioner(config.fit.captions, config.device)
    images = SeedBatches(index, config.data, config.fit.captions.batch, config.runtime.io_threads,
                         lambda pixels, _: captioner.prepared(pixels))
    try:
        for sound, found, refused in images(range(len(index))):
            yield CaptionBlock(sound, captioner(found), refused)
    finally:
        images.close()
        costs |= {"device": captioner.device.type,
                  "gpu_seconds": (time.perf_counter() - started) * (captioner.device.type == "cuda")}


HERE = Engine(blocks_here, classes_here, captions_here, TUNE_HERE, is_here=True)
