"""Fitting: what guided methods need and a dataset has not, a guide trained on it and prototypes of its classes.

fit_plan.py says what to fit. Everything becomes an artifact (artifacts.py), found again by what it was made from, so
the same command a second time makes nothing.
"""

# N images, B rows, K classes, D features

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayexpand.artifacts.store import point, publish
from rayexpand.contract.errors import ConfigError
from rayexpand.contract.protocols import Progress
from rayexpand.contract.schema import SeedIndex
from rayexpand.data import seeds
from rayexpand.data.batches import SeedBatches
from rayexpand.diffusion.prototypes import ClassPrototypes, fit_class, join, save_prototypes
from rayexpand.fitting import captions as captioning
from rayexpand.fitting import pretrain
from rayexpand.fitting import prompts as prompt_lists
from rayexpand.fitting.adapter.config import AdapterFit, word_problems
from rayexpand.fitting.adapter.fit import TUNE_HERE, Data, TuneEngine, fit_adapter
from rayexpand.fitting.artifacts import data_facts
from rayexpand.fitting.captions import CaptionBlock, Captioner, CaptionsFit
from rayexpand.fitting.class_features import (
    VERSION,
    ClassFeaturesFit,
    ImageFeaturesFit,
    drawn,
    make_class_features,
    make_image_features,
)
from rayexpand.fitting.config import (
    ARTIFACTS,
    FitConfig,
    GuideFit,
    PrototypesFit,
    fit_config,
    load_fit,
    parse_fit,
    preflight,
)
from rayexpand.fitting.features import Block, Intake, SeedFeatures, by_class, gathered
from rayexpand.fitting.guide import KIND, fit_guide, load_fit_guide
from rayexpand.fitting.pretrain import PretrainFit
from rayexpand.fitting.prompts import PromptsFit
from rayexpand.models.folders import folder_hash
from rayexpand.models.guides import guide_hash
from rayexpand.runs.config import GuideConfig, RunConfig
from rayexpand.runs.inputs import PROTOTYPES

__all__ = ["ARTIFACTS", "HERE", "Engine", "FitConfig", "GuideFit", "PrototypesFit", "fit", "fit_config", "fit_for",
           "load_fit", "parse_fit", "with_artifacts"]


@dataclass(frozen=True)
class Engine:
    """Where prototypes, features and captions are computed; the numbers do not depend on it.

    `blocks(config, guide hash, index, intake, costs)` gives the features of all images, in any order, and leaves
    device, CPU and GPU seconds of other processes in `costs`; `classes(features of each class, groups)` their
    prototypes in order; `captions(config, model hash, index, costs)` the captions that a model writes; `tuning` says
    where a generator is fine-tuned.
    """

    blocks: Callable[[FitConfig, str, SeedIndex, Intake, dict[str, Any]], Iterator[Block]]
    classes: Callable[[Iterable[np.ndarray], int], Iterator[ClassPrototypes]]
    captions: Callable[[FitConfig, str, SeedIndex, dict[str, Any]], Iterator[CaptionBlock]]
    tuning: TuneEngine


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
        update["artifacts"] = config.artifacts.model_copy(update=others)
    return config.model_copy(update=update)


def fit(config: FitConfig, progress: Progress, engine: Engine | None = None) -> dict[str, Path]:
    """Makes what `config` asks for, unless it is there already: folders by role, `guide` and `prototypes`.

    `engine` says where prototypes are computed; None: in this process. Raises ConfigError (all problems),
    SeedDataError, ModelError, StorageError, and UsageError for images or features that cannot be used.
    """
    index = _checked(config, engine)
    from rayexpand.contract.device import torch_threads

    with torch_threads(config.runtime.torch_threads):
        made: dict[str, Path] = {}
        if config.fit.pretrain is not None:
            made["prior"] = _fit_prior(config, config.fit.pretrain, index, progress)
            config = _with_prior(config, made["prior"])
        if config.fit.guide is not None:
            made["guide"] = fit_guide(config, config.fit.guide, index, progress)
            config = config.model_copy(update={"guide": GuideConfig(weights=str(made["guide"]))})
        if config.fit.prototypes is not None:
            made["prototypes"] = _fit_prototypes(config, config.fit.prototypes, index, progress, engine or HERE)
        if config.fit.prompts is not None:
            made["prompts"] = _fit_prompts(config, config.fit.prompts, index, progress)
        if config.fit.captions is not None:
            made["captions"] = _fit_captions(config, config.fit.captions, index, progress, engine or HERE)
        for role, features in (("class_features", config.fit.class_features),
                               ("image_features", config.fit.image_features)):
            if features is not None:
                made[role] = _fit_features(config, role, features, index, progress, engine or HERE)
        if config.fit.adapter is not None:
            role = "adapter" if config.fit.adapter.finetune.strategy != "full" else "generator"
            made[role] = _fit_adapter(config, config.fit.adapter, index, progress, engine or HERE, made)
    for role, folder in made.items():
        point(config.out, f"{config.name}-{role}", folder)
    return made


def _checked(config: FitConfig, engine: Engine | None) -> SeedIndex:
    """The images, listed. Raises ConfigError with everything that is wrong, also with classes that lack a word."""
    wanted = config.fit
    here = engine is None or bool(wanted.guide or wanted.prompts or wanted.pretrain
                                  or (wanted.adapter and not wanted.adapter.workers))
    problems = preflight(config, device_here=here, on_ray=engine is not None and engine.tuning.spreads)
    if wanted.adapter is None or seeds.check(config.data):
        if problems:
            raise ConfigError(config.name, problems)
        return seeds.build_index(config.data)
    index = seeds.build_index(config.data)
    if problems := problems + word_problems(wanted.adapter, index.classes):
        raise ConfigError(config.name, problems)
    return index


# ----------------------------------------------------------------------------------------------------------- prototypes


def _fit_prototypes(config: FitConfig, made: PrototypesFit, index: SeedIndex, progress: Progress,
                    engine: Engine) -> Path:
    guide = guide_hash(config.guide.weights, config.guide.checkpoint, progress)
    made_from = {"version": KIND, "data": data_facts(config, index), "guide_sha256": guide, **made.model_dump()}

    def make(folder: Path) -> dict[str, Any]:
        costs: dict[str, Any] = {}
        scratch = folder / "features.tmp"
        features_ND, sound_N, refused = gathered(engine.blocks(config, guide, index, made.intake, costs), len(index),
                                                 scratch, progress)
        classes = []
        for done, one in enumerate(engine.classes(by_class(features_ND, sound_N, index), made.groups), 1):
            classes.append(one)
            progress("grouping classes", done, len(index.classes))
        del features_ND
        scratch.unlink()
        save_prototypes(join(classes, guide, index.classes.key), folder / PROTOTYPES)
        return {**costs, "guide": config.guide.model_dump(mode="json"), "refused": len(refused),
                "refused_examples": dict(list(refused.items())[:20])}

    return publish(config.out, "prototypes", made_from, make)


def _fit_prior(config: FitConfig, made: PretrainFit, index: SeedIndex, progress: Progress) -> Path:
    job = pretrain.PretrainJob(made, config.seed, config.data, index, data_facts(config, index), config.out,
                               config.device,
                               config.runtime.torch_threads, config.runtime.io_threads)
    test = pretrain.open_test(job)
    folder = publish(config.out, pretrain.KIND, job.made_from(test),
                     lambda folder: pretrain.make_prior(job, test, folder, progress))
    shutil.rmtree(job.steps, ignore_errors=True)
    return folder


def _with_prior(config: FitConfig, folder: Path) -> FitConfig:
    """The other sections of a file that pretrains a generator use it and its guide."""
    return config.model_copy(update={
        "guide": GuideConfig(weights=str(folder / "guide")),
        "prior": config.prior.model_copy(update={"weights": str(folder / "pipeline")})})


def _fit_prompts(config: FitConfig, made: PromptsFit, index: SeedIndex, progress: Progress) -> Path:
    classes = index.classes
    made_from = {"version": prompt_lists.VERSION, "seed": config.seed, "classes": list(classes.key),
                 "names": [list(classes.name), list(classes.metaclass), list(classes.noun)],
                 "generator_sha256": folder_hash(Path(made.generator).expanduser()),
                 **made.model_dump(exclude={"generator"})}
    return publish(config.out, "prompts", made_from, lambda folder: prompt_lists.write_prompts(
        made, classes, config.seed, config.device, folder, progress))


# --------------------------------------------------------------------------------------------- captions and features


def _fit_captions(config: FitConfig, made: CaptionsFit, index: SeedIndex, progress: Progress, engine: Engine) -> Path:
    listed = captioning.listed_captions(made, config.data, index)
    of = captioning.made_from(made, listed)

    def make(folder: Path) -> dict[str, Any]:
        costs: dict[str, Any] = {}
        found = (engine.captions(config, of["model_sha256"], index, costs) if listed is None
                 else iter([CaptionBlock(np.arange(len(index)), listed, {})]))
        facts = captioning.make_captions(folder, found, index, progress)
        return {**costs, **facts, **made.model_dump(include={"column", "file", "model"}, exclude_none=True)}

    return publish(config.out, "captions", {"data": data_facts(config, index), **of}, make)


def _fit_features(config: FitConfig, role: str, made: ImageFeaturesFit, index: SeedIndex, progress: Progress,
                  engine: Engine) -> Path:
    guide = guide_hash(config.guide.weights, config.guide.checkpoint, progress)
    made_from = {"version": VERSION, "data": data_facts(config, index), "guide_sha256": guide, **made.model_dump()}
    if isinstance(made, ClassFeaturesFit):
        made_from["seed"] = None if made.images is None else config.seed
        index = drawn(index, made.images, config.seed)

    def make(folder: Path) -> dict[str, Any]:
        costs: dict[str, Any] = {}
        blocks = engine.blocks(config, guide, index, made.intake, costs)
        facts = (make_class_features(folder, blocks, index, made, guide, progress)
                 if isinstance(made, ClassFeaturesFit) else make_image_features(folder, blocks, index, guide, progress))
        return {**costs, **facts, "guide": config.guide.model_dump(mode="json")}

    return publish(config.out, role, made_from, make)


def _fit_adapter(config: FitConfig, made: AdapterFit, index: SeedIndex, progress: Progress, engine: Engine,
                 here: Mapping[str, Path]) -> Path:
    return fit_adapter(made, Data(config.data, index, data_facts(config, index)), out=config.out,
                       weights=config.prior.weights, seed=config.seed, device=config.device, runtime=config.runtime,
                       here=here, progress=progress, engine=engine.tuning)


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
    images = SeedBatches(index, config.data, config.fit.captions.batch, config.runtime.io_threads)
    try:
        for sound, found, refused in images(range(len(index))):
            yield CaptionBlock(sound, captioner(found), refused)
    finally:
        images.close()
        costs |= {"device": captioner.device.type,
                  "gpu_seconds": (time.perf_counter() - started) * (captioner.device.type == "cuda")}


HERE = Engine(blocks_here, classes_here, captions_here, TUNE_HERE)
