"""Fitting: what guided methods need and a dataset has not, a guide trained on it and prototypes of its classes.

fit_plan.py says what to fit. Everything becomes an artifact (artifacts.py), found again by what it was made from, so
the same command a second time makes nothing.
"""

# N images, B rows, K classes, D features

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayexpand import captions as captioning
from rayexpand import pretrain, prompt_lists, seeds
from rayexpand.artifacts import PROTOTYPES, point, publish
from rayexpand.captions import CaptionBlock, Captioner, CaptionsFit
from rayexpand.class_features import (
    VERSION,
    ClassFeaturesFit,
    ImageFeaturesFit,
    drawn,
    make_class_features,
    make_image_features,
)
from rayexpand.config import GuideConfig, RunConfig
from rayexpand.core.prototypes import ClassPrototypes, fit_class, join, save_prototypes
from rayexpand.core.recipe import Recipe, make_recipe
from rayexpand.errors import ConfigError, UsageError
from rayexpand.finetuning.artifact import TUNE_HERE, Data, TuneEngine, fit_adapter
from rayexpand.finetuning.plan import AdapterFit, word_problems
from rayexpand.fit_plan import (
    ARTIFACTS,
    FitConfig,
    GuideFit,
    PrototypesFit,
    fit_config,
    load_fit,
    parse_fit,
    preflight,
)
from rayexpand.guide_files import CLASSIFIER, CLIP_HEAD, guide_folder, save_classifier, save_clip_head
from rayexpand.guides import ClipGuide, guide_hash, load_guide
from rayexpand.ingest import Feed, Rows, StudyList
from rayexpand.pretrain import PretrainFit
from rayexpand.priors import Progress, folder_hash
from rayexpand.prompt_lists import PromptsFit
from rayexpand.schema import SeedIndex
from rayexpand.seed_features import Block, Intake, SeedBatches, SeedFeatures, by_class, gathered

__all__ = ["ARTIFACTS", "HERE", "Engine", "FitConfig", "GuideFit", "PrototypesFit", "fit", "fit_config", "fit_for",
           "load_fit", "parse_fit", "with_artifacts"]

KIND = 1  # raised when the code below makes something else of the same configuration

# CLIP fine-tuned on a dataset: the usual low rate, for the weights are good already (ours).
CLIP_RECIPE: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.1, "smoothing": 0.0, "schedule": "cosine", "crop": "none"}


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
    with _threads(config.runtime.torch_threads):
        made: dict[str, Path] = {}
        if config.fit.pretrain is not None:
            made["prior"] = _fit_prior(config, config.fit.pretrain, index, progress)
            config = _with_prior(config, made["prior"])
        if config.fit.guide is not None:
            made["guide"] = _fit_guide(config, config.fit.guide, index, progress)
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


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)  # sums depend on it
    try:
        yield
    finally:
        torch.set_num_threads(before)


def data_facts(config: FitConfig, index: SeedIndex) -> dict[str, Any]:
    """What of the dataset an artifact depends on."""
    hasher = hashlib.sha256()
    for seed_id, label, fault in zip(*(index.table[name].to_pylist() for name in ("seed_id", "label", "fault")),
                                     strict=True):
        hasher.update(json.dumps([seed_id, label, fault]).encode())
    return {"config": config.data.model_dump(mode="json"), "ids_sha256": hasher.hexdigest(), "images": len(index),
            "classes": list(index.classes.key), "names": list(index.classes.name)}


# --------------------------------------------------------------------------------------------------------------- guides


def _fit_guide(config: FitConfig, made: GuideFit, index: SeedIndex, progress: Progress) -> Path:
    made_from: dict[str, Any] = {"version": KIND, "seed": config.seed, "data": data_facts(config, index)}
    if made.kind == CLIP_HEAD:
        guide = _load(config, index)
        if not isinstance(guide, ClipGuide):
            raise ConfigError(config.name, [f"guide.weights: {config.guide.weights} is a classifier; kind clip_head "
                                            "fine-tunes a CLIP guide, such as 'digits' or an open_clip folder"])
        usual = {} if "preset" in made.recipe else CLIP_RECIPE
        recipe = make_recipe({**usual, **made.recipe, "size": guide.size[0], "test_size": None})
        made_from |= {"recipe": recipe.model_dump(mode="json"),
                      "guide_sha256": guide_hash(config.guide.weights, config.guide.checkpoint, progress)}
        return publish(config.out, made.kind, made_from,
                       lambda folder: _tune_clip(config, recipe, guide, index, folder, progress))
    recipe = make_recipe(made.recipe)
    made_from["recipe"] = recipe.model_dump(mode="json")
    if recipe.checkpoint is not None:
        made_from["checkpoint_sha256"] = _file_hash(Path(recipe.checkpoint).expanduser())
    return publish(config.out, made.kind, made_from,
                   lambda folder: _train_classifier(config, made.kind, recipe, index, folder, progress))


def _train_classifier(config: FitConfig, kind: str, recipe: Recipe, index: SeedIndex, folder: Path,
                      progress: Progress) -> dict[str, Any]:
    from rayexpand.core.backbones import build_backbone
    from rayexpand.core.classifier import Classifier
    from rayexpand.priors.latent import choose_device

    if kind != CLASSIFIER:
        model = build_backbone(recipe, len(index.classes), config.seed)
        save_classifier(folder, model, recipe, index.classes.key)
        saw_others = "its weights come from recipe.checkpoint and may have seen other images than these"
        return {"note": saw_others} if kind == "pretrained" else {}
    feed, device = _feed(config, recipe, index), choose_device(config.device)
    classifier = Classifier(recipe, len(index.classes), config.seed, feed.total_steps, device=device,
                            class_counts=np.asarray(index.classes.count))
    loss = 0.0
    for batch in feed.batches(0, feed.total_steps):
        loss = classifier.update(batch)
        progress("training the guide", classifier.step, feed.total_steps)
    save_classifier(folder, classifier.module, recipe, index.classes.key)
    return {"device": device.type, "updates": feed.total_steps, "last_loss": loss}


def _tune_clip(config: FitConfig, recipe: Recipe, guide: ClipGuide, index: SeedIndex, folder: Path,
               progress: Progress) -> dict[str, Any]:
    """Fine-tunes image tower and head. The head starts as the class texts of unit length, so at the start it gives the
    zero-shot logits; the logit scale and the text tower stay."""
    import torch

    from rayexpand.core.classifier import loss_of, make_optimiser
    from rayexpand.core.mixing import smooth
    from rayexpand.core.recipe import lr_at

    feed = _feed(config, recipe, index)
    head = torch.nn.Parameter(guide.texts_KD.clone())
    tuned = torch.nn.ModuleDict({"visual": guide.model.visual})
    tuned.register_parameter("head", head)
    optimiser = make_optimiser(tuned.requires_grad_(True), recipe)
    loss, guide.texts_KD = torch.zeros(()), head
    for batch in feed.batches(0, feed.total_steps):
        x_BCHW = torch.from_numpy(batch.x_BHWC).to(guide.device).permute(0, 3, 1, 2) / 255
        y_BK = smooth(torch.from_numpy(batch.y_BK).to(guide.device), recipe.smoothing, recipe.smoothing_mode)
        tuned.train()
        optimiser.zero_grad(set_to_none=True)
        loss = loss_of(guide.logits(x_BCHW), y_BK, recipe.loss)
        loss.backward()
        loss = loss.detach()
        for group in optimiser.param_groups:
            group["lr"] = lr_at(recipe, batch.step, feed.total_steps)
        optimiser.step()
        progress("fine-tuning the guide", batch.step + 1, feed.total_steps)
    tuned.requires_grad_(False).eval()
    if not torch.isfinite(loss):
        raise UsageError(f"fine-tuning diverged: the loss is {float(loss)} at the end. Lower fit.guide.recipe.lr")
    source = str(guide_folder(config.guide.weights) or config.guide.weights)
    save_clip_head(folder, guide.model, head, source, index.classes.key)
    return {"device": guide.device.type, "updates": feed.total_steps, "last_loss": float(loss)}


def _feed(config: FitConfig, recipe: Recipe, index: SeedIndex) -> Feed:
    return Feed(StudyList.build([Rows(seeds=(index, config.data))]), recipe, config.seed)


def _load(config: FitConfig, index: SeedIndex) -> Any:
    return load_guide(config.guide.weights, config.guide.checkpoint, index.classes.name, device=config.device,
                      class_keys=index.classes.key)


def _file_hash(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
    job = pretrain.Job(made, config.seed, config.data, index, data_facts(config, index), config.out, config.device,
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
    guide = _load(config, index)
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
