"""Fitting: what guided methods need and a dataset has not, a guide trained on it and prototypes of its classes.

fit_plan.py says what to fit. Everything becomes an artifact (artifacts.py), found again by what it was made from, so
the same command a second time makes nothing.
"""

# N images, B rows, K classes, D features

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayexpand import prompt_lists, seeds
from rayexpand.artifacts import PROTOTYPES, point, publish
from rayexpand.config import GuideConfig, RunConfig
from rayexpand.core.prototypes import ClassPrototypes, fit_class, join, save_prototypes
from rayexpand.core.recipe import Recipe, make_recipe
from rayexpand.errors import ConfigError, UsageError
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
from rayexpand.priors import Progress, folder_hash
from rayexpand.prompt_lists import PromptsFit
from rayexpand.schema import SeedIndex
from rayexpand.seed_features import Block, SeedFeatures

__all__ = ["ARTIFACTS", "HERE", "Engine", "FitConfig", "GuideFit", "PrototypesFit", "fit", "fit_config", "fit_for",
           "load_fit", "parse_fit", "with_artifacts"]

KIND = 1  # raised when the code below makes something else of the same configuration

# CLIP fine-tuned on a dataset: the usual low rate, for the weights are good already (ours).
CLIP_RECIPE: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.1, "smoothing": 0.0, "schedule": "cosine", "crop": "none"}


@dataclass(frozen=True)
class Engine:
    """Where prototypes are computed; the numbers do not depend on it.

    `blocks(config, guide hash, index, costs)` gives the features of all images, in any order, and leaves device, CPU
    and GPU seconds of other processes in `costs`; `classes(features of each class, groups)` their prototypes in order.
    """

    blocks: Callable[[FitConfig, str, SeedIndex, dict[str, Any]], Iterator[Block]]
    classes: Callable[[Iterable[np.ndarray], int], Iterator[ClassPrototypes]]


def fit_for(config: RunConfig, progress: Progress, guide: GuideFit | None = None, *, groups: int = 3,
            out: str = ARTIFACTS) -> dict[str, Path]:
    """Makes what the method of a run needs, in this process, unless it is there: folders by role, `guide` (only where
    one was asked for) and `prototypes`. See `with_artifacts`."""
    wanted = fit_config(config, guide, groups=groups, out=out)
    return {} if wanted is None else fit(wanted, progress)


def with_artifacts(config: RunConfig, made: Mapping[str, Path]) -> RunConfig:
    """The run with the guide and prototypes that `fit_for` made."""
    update: dict[str, Any] = {}
    if "guide" in made:
        update["guide"] = GuideConfig(weights=str(made["guide"]))
    if "prototypes" in made:
        update["artifacts"] = config.artifacts.model_copy(update={"prototypes": str(made["prototypes"])})
    return config.model_copy(update=update)


def fit(config: FitConfig, progress: Progress, engine: Engine | None = None) -> dict[str, Path]:
    """Makes what `config` asks for, unless it is there already: folders by role, `guide` and `prototypes`.

    `engine` says where prototypes are computed; None: in this process. Raises ConfigError (all problems),
    SeedDataError, ModelError, StorageError, and UsageError for images or features that cannot be used.
    """
    if problems := preflight(config, device_here=engine is None or bool(config.fit.guide or config.fit.prompts)):
        raise ConfigError(config.name, problems)
    with _threads(config.runtime.torch_threads):
        index = seeds.build_index(config.data)
        made: dict[str, Path] = {}
        if config.fit.guide is not None:
            made["guide"] = _fit_guide(config, config.fit.guide, index, progress)
            config = config.model_copy(update={"guide": GuideConfig(weights=str(made["guide"]))})
        if config.fit.prototypes is not None:
            made["prototypes"] = _fit_prototypes(config, config.fit.prototypes, index, progress, engine or HERE)
        if config.fit.prompts is not None:
            made["prompts"] = _fit_prompts(config, config.fit.prompts, index, progress)
    for role, folder in made.items():
        point(config.out, f"{config.name}-{role}", folder)
    return made


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
    classifier = Classifier(recipe, len(index.classes), config.seed, feed.total_steps, device=device)
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
        features_ND, sound_N, refused = _gathered(engine.blocks(config, guide, index, costs), len(index), scratch,
                                                  progress)
        classes = []
        for done, one in enumerate(engine.classes(_by_class(features_ND, sound_N, index), made.groups), 1):
            classes.append(one)
            progress("grouping classes", done, len(index.classes))
        del features_ND
        scratch.unlink()
        save_prototypes(join(classes, guide, index.classes.key), folder / PROTOTYPES)
        return {**costs, "guide": config.guide.model_dump(mode="json"), "refused": len(refused),
                "refused_examples": dict(list(refused.items())[:20])}

    return publish(config.out, "prototypes", made_from, make)


def _gathered(blocks: Iterable[Block], count: int, scratch: Path,
              progress: Progress) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """((count, D) float32 on disk: 10.7 GB for 1.3 million images of 2,048 features; which rows hold any; reasons)."""
    features_ND = None
    sound_N, refused = np.zeros(count, bool), dict[str, str]()
    for block in blocks:
        if features_ND is None:
            features_ND = np.memmap(scratch, np.float32, "w+", shape=(count, block.features_ND.shape[1]))
        features_ND[block.rows] = block.features_ND
        sound_N[block.rows] = True
        refused |= block.refused
        progress("features", int(sound_N.sum()) + len(refused), count)
    assert features_ND is not None, "a seed index has rows"
    return features_ND, sound_N, refused


def _by_class(features_ND: np.ndarray, sound_N: np.ndarray, index: SeedIndex) -> Iterator[np.ndarray]:
    """Features of each class in label order. Raises UsageError for a class without, or with features not finite."""
    labels = np.where(sound_N, index.labels, -1)
    order = np.argsort(labels, kind="stable")
    bounds = np.searchsorted(labels[order], np.arange(len(index.classes) + 1))
    for key, start, stop in zip(index.classes.key, bounds[:-1], bounds[1:], strict=True):
        if start == stop:
            raise UsageError(f"class {key!r} has no image that can be read, so it has no prototype; give it at least "
                             "one, or leave the class out of the dataset")
        found_ND = np.asarray(features_ND[order[start:stop]])
        if bad := int((~np.isfinite(found_ND).all(axis=1)).sum()):
            raise UsageError(f"the guide gives features that are no numbers for {bad} of {len(found_ND)} images of "
                             f"class {key!r}; try device: cpu, or another guide")
        yield found_ND


def _fit_prompts(config: FitConfig, made: PromptsFit, index: SeedIndex, progress: Progress) -> Path:
    classes = index.classes
    made_from = {"version": prompt_lists.VERSION, "seed": config.seed, "classes": list(classes.key),
                 "names": [list(classes.name), list(classes.metaclass), list(classes.noun)],
                 "generator_sha256": folder_hash(Path(made.generator).expanduser()),
                 **made.model_dump(exclude={"generator"})}
    return publish(config.out, "prompts", made_from, lambda folder: prompt_lists.write_prompts(
        made, classes, config.seed, config.device, folder, progress))


def blocks_here(config: FitConfig, guide_sha256: str, index: SeedIndex, costs: dict[str, Any]) -> Iterator[Block]:
    """Features of all images, computed in this process."""
    started = time.perf_counter()
    guide = _load(config, index)
    assert config.fit.prototypes is not None
    features = SeedFeatures(index, config.data, guide, config.fit.prototypes.batch, config.runtime.io_threads)
    try:
        yield from features(range(len(index)))
    finally:
        features.close()
        costs |= {"device": guide.device.type,
                  "gpu_seconds": (time.perf_counter() - started) * (guide.device.type == "cuda")}


def classes_here(parts: Iterable[np.ndarray], groups: int) -> Iterator[ClassPrototypes]:
    """Prototypes of the features of each class, in this process."""
    return (fit_class(features_ND, groups) for features_ND in parts)


HERE = Engine(blocks_here, classes_here)
