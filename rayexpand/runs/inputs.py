"""Artifacts: what `rayexpand fit` makes from a dataset, as folders that are found again by what they were made from.

    <out>/prototypes-1f0c9a3e/artifact.json             what it was made from, and what that cost
                              prototypes.safetensors
    <out>/classifier-07d2b4aa/guide.json, ...           a guide (guide_files.py), with its artifact.json
    <out>/adapter-5be1c07d/   adapter.json, ...         an adapter (priors/adapters.py); and captions, class features
                                                        and image features (seed_columns.py)

A folder is made under another name and renamed when it is whole: a killed fit leaves nothing that looks finished. What
a run depends on is the content of an artifact, not where it lies.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

import pyarrow.compute as pc

from rayexpand.artifacts.store import read_facts
from rayexpand.contract.errors import ModelError
from rayexpand.contract.schema import SeedIndex
from rayexpand.data.captions_features import (
    CAPTIONS,
    CLASS_FEATURES,
    FILES,
    IMAGE_FEATURES,
    columns_hash,
    columns_problem,
    feature_facts,
    open_image_features,
    read_class_features,
)
from rayexpand.diffusion.prototypes import Prototypes, load_prototypes
from rayexpand.models.adapters import PARTS, TOKENS, AdapterFacts, read_adapter
from rayexpand.models.folders import folder_hash, loaded_files
from rayexpand.models.guide_files import check_guide, class_difference, class_problem, guide_classes, present_guide
from rayexpand.models.guides import guide_hash
from rayexpand.models.prior import present
from rayexpand.runs.config import RunConfig

PROTOTYPES = "prototypes.safetensors"
LOADED = ("prototypes", "adapter", CLASS_FEATURES, IMAGE_FEATURES)  # by samplers, on every node
KINDS = (*LOADED, CAPTIONS)

log = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------------- of a run's config


def artifact_folder(config: RunConfig, kind: str) -> Path:
    """Where the configuration says an artifact is. Raises ModelError."""
    if (named := getattr(config.artifacts, kind)) is None:
        raise ModelError(f"artifacts.{kind}: {_unnamed(config, kind)}")
    return Path(named).expanduser()


def artifact_hash(folder: Path, kind: str) -> str:
    """Content hash of an artifact. Raises ModelError."""
    if kind == "prototypes":
        return prototypes_hash(folder)
    if kind == "adapter":
        read_adapter(folder)
        return folder_hash(folder)
    return columns_hash(folder, kind)


def artifact_files(folder: Path, kind: str) -> list[str]:
    """Names of the files of an artifact that its content hash covers."""
    if kind == "prototypes":
        return [PROTOTYPES]
    return loaded_files(folder) if kind == "adapter" else list(FILES[kind])


def artifact_hashes(config: RunConfig) -> dict[str, str]:
    """Content hashes of the artifacts that samplers load. Captions are none of them: the plan holds them, so a run
    goes on without. Raises ModelError."""
    needs = config.method.needs()
    return {kind: artifact_hash(artifact_folder(config, kind), kind) for kind in LOADED if kind in needs}


def captions_sha256(config: RunConfig) -> str | None:
    """Content hash of the captions of a run, None where it has none or they are not there (any more)."""
    if CAPTIONS not in config.method.needs() or config.artifacts.captions is None:
        return None
    with contextlib.suppress(ModelError):
        return artifact_hash(artifact_folder(config, CAPTIONS), CAPTIONS)
    return None


def prototypes_hash(folder: Path) -> str:
    """Content hash of a folder of prototypes. Raises ModelError."""
    if not (folder / PROTOTYPES).is_file():
        raise ModelError(f"artifacts.prototypes: {folder} has no {PROTOTYPES}; give a folder that `rayexpand fit` made")
    return folder_hash(folder)


def prototypes_of(config: RunConfig, class_keys: Sequence[str], guide: str | None = None) -> Prototypes:
    """The prototypes of a run, for its guide (content hash, if known) and classes. Raises ModelError."""
    if guide is None:
        guide = guide_hash(config.guide.weights, config.guide.checkpoint)
    return load_prototypes(artifact_folder(config, "prototypes") / PROTOTYPES, guide_hash=guide, class_keys=class_keys)


def features_of(config: RunConfig, class_keys: Sequence[str]) -> dict[str, Any]:
    """Class and image features of a run by their field of Tools, those it needs. Raises ModelError."""
    import torch

    needs, found = config.method.needs(), dict[str, Any]()
    if CLASS_FEATURES in needs:
        features_KD = read_class_features(artifact_folder(config, CLASS_FEATURES), class_keys)
        found[CLASS_FEATURES] = torch.from_numpy(features_KD)
    if IMAGE_FEATURES in needs:
        found[IMAGE_FEATURES] = open_image_features(artifact_folder(config, IMAGE_FEATURES))
    return found


def check_artifacts(config: RunConfig, *, planned: bool = False) -> list[str]:
    """What is wrong with guide and artifacts of a run as far as files on this machine say, one line each; nothing is
    loaded, trained or downloaded, and no dataset is listed. `planned`: the plan is there, and holds the captions."""
    needs = config.method.needs()
    problems = []
    if "guide" in needs:
        problems += [f"guide.weights: {one}" for one in check_guide(config.guide.weights, config.guide.checkpoint)]
    guide_is_sound = not problems
    for kind in KINDS:
        if kind not in needs:
            problems += [f"artifacts.{kind}: {_unused(config.method, kind)}"] if getattr(
                config.artifacts, kind) is not None else []
        elif getattr(config.artifacts, kind) is None:
            problems.append(f"artifacts.{kind}: {_unnamed(config, kind)}")
        elif kind == "prototypes":
            problems += _prototypes_problems(config, guide_is_sound=guide_is_sound)
        elif kind == "adapter":
            problems += [f"artifacts.adapter: {one}" for one in _adapter_problems(config)]
        elif kind == CAPTIONS and planned:
            continue
        elif problem := columns_problem(artifact_folder(config, kind), kind):
            problems.append(f"artifacts.{kind}: {problem}")
    return problems


def check_base(config: RunConfig, prior_sha256: str) -> None:
    """Raises ModelError where the adapter of a run was trained on another model than the one with this hash."""
    folder = artifact_folder(config, "adapter")
    if problem := _base_problem(config, folder, read_adapter(folder), prior_sha256):
        raise ModelError(f"artifacts.adapter: {problem}")


def check_seeds(config: RunConfig, index: SeedIndex) -> list[str]:
    """Where artifacts lack so many seeds of the dataset that the run would fail more rows than its limit, one line
    each. Below that, the rows of such seeds are refused one by one. Raises ModelError."""
    if IMAGE_FEATURES not in config.method.needs():
        return []
    ids = open_image_features(folder := artifact_folder(config, IMAGE_FEATURES)).ids
    sound = index.table["seed_id"].filter(pc.equal(index.table["fault"], ""))
    absent = sound.filter(pc.invert(pc.is_in(sound, value_set=ids)))
    if len(absent) <= config.limits.max_failed * len(index):
        return []
    return [f"artifacts.image_features: {folder} has none of {len(absent):,} of {len(index):,} seeds "
            f"({', '.join(absent[:3].to_pylist())}, ...); make them of this very dataset with `rayexpand fit`"]


def _unnamed(config: RunConfig, kind: str) -> str:
    """What to do where an artifact is needed and none is named."""
    if kind == "prototypes":
        return (f"{config.method.name} needs prototypes of the training images and none are named; make them with "
                "`rayexpand fit` and this same file, and set artifacts.prototypes to the folder it prints")
    what = {"adapter": "a fine-tuned adapter of its prior and none is", CAPTIONS: "captions of the seeds and none are",
            CLASS_FEATURES: "image features of each class and none are",
            IMAGE_FEATURES: "features of each seed image and none are"}[kind]
    return (f"{config.method.name} needs {what} named; make them with `rayexpand fit` and a file with fit: {{{kind}: "
            f"...}}, and set artifacts.{kind} to the folder it prints")


def _unused(method: Any, kind: str) -> str:
    """What to do where an artifact is named that the method as it is set does not read."""
    variant = str(getattr(method, "variant", ""))
    reason, remedy = {
        "prototypes": ("compares samples with no prototypes", "take a method that does, such as distdiff"),
        "adapter": ("samples from the weights as they are", "set method.finetuned: true" if hasattr(
            method, "finetuned") else f"choose {variant.replace('real_', 'diff_')}" if variant.startswith("real_") else
            "write {token} into the prompt, or choose a method with one"),
        CAPTIONS: ("has no {caption} in its prompt", "write {caption} into the prompt"),
        CLASS_FEATURES: ("has no visual token of each class", "set method.visual_token: class_mean"),
        IMAGE_FEATURES: ("has no visual token of each image", "set method.visual_token: instance")}[kind]
    name = f"{method.name} {variant}".rstrip()
    return f"has no effect on {name}, which {reason}; take it out, or {remedy}"


def _prototypes_problems(config: RunConfig, *, guide_is_sound: bool) -> list[str]:
    folder = artifact_folder(config, "prototypes")
    if not (folder / PROTOTYPES).is_file():
        return [f"artifacts.prototypes: {folder} has no {PROTOTYPES}; make it with `rayexpand fit` and this same file, "
                "or give a folder that it made"]
    made_with = read_facts(folder).get("made_from", {}).get("guide_sha256")
    here = present_guide(config.guide.weights)
    if not made_with or here is None or not guide_is_sound or (own := folder_hash(here)) == made_with:
        return []
    return [f"artifacts.prototypes: {folder} holds features of guide {made_with[:12]}, but guide.weights "
            f"{config.guide.weights} is guide {own[:12]}; features of two guides cannot be compared: name the guide "
            "they were made with, or make them again with `rayexpand fit` and this same file"]


def _adapter_problems(config: RunConfig) -> list[str]:
    folder = artifact_folder(config, "adapter")
    try:
        facts = read_adapter(folder)
    except ModelError as error:
        return [str(error)]
    problems = []
    here = present(config.prior.weights)
    if here is not None and (problem := _base_problem(config, folder, facts, folder_hash(here))):
        problems.append(problem)
    problems += adapter_fits(config.method, facts.strategy, facts.visual_token, str(folder))
    problems += [one for kind in (CLASS_FEATURES, IMAGE_FEATURES) if (one := _encoder_problem(config, kind, facts))]
    if facts.has_tokens and facts.has_lora and not _asks_for_tokens(config.method):
        log.warning("artifacts.adapter: %s has class tokens, but no prompt of %s has {token}, so they are not used; it "
                    "was trained with the prompt %r", folder, config.method.name, facts.prompt)
    return problems


def adapter_fits(method: Any, strategy: str, visual_token: str, adapter: str) -> list[str]:
    """Where a method does not sample as an adapter of this strategy and visual token was trained, one line each.
    `adapter`: what to call it."""
    problems = []
    if (own := getattr(method, "visual_token", "none")) != visual_token:
        problems.append(f"{adapter} is trained with visual_token {visual_token}, but method.visual_token is {own}; "
                        f"what was not trained cannot be read at sampling: set method.visual_token to {visual_token}, "
                        f"or fine-tune with {own}")
    asks, parts = _asks_for_tokens(method), PARTS[strategy]
    if asks and TOKENS not in parts:
        problems.append(f"the prompt has {{token}}, but {adapter} (strategy {strategy}) has no class tokens; use "
                        "{name} as in training, or an adapter with tokens (ti, ti_db)")
    if parts == (TOKENS,) and not asks:
        problems.append(f"{adapter} (strategy {strategy}) has class tokens and nothing else, and no prompt of "
                        f"{method.name} has {{token}}, so samples would be those of the model as it is; write "
                        "{token} into method.prompt, or take an adapter with LoRA (db, ti_db)")
    return problems


def _asks_for_tokens(method: Any) -> bool:
    return any("token" in (key for _, key, _, _ in Formatter().parse(one)) for one in _texts(method.model_dump())
               if "{token}" in one)


def _texts(value: Any) -> Iterator[str]:
    """All strings in nested lists and mappings, such as lists of prompts by class."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _texts(one)


def _encoder_problem(config: RunConfig, kind: str, facts: AdapterFacts) -> str:
    """Where the visual token would be of another image encoder than the adapter was trained with."""
    if kind not in config.method.needs() or getattr(config.artifacts, kind) is None or not facts.encoder_sha256:
        return ""
    try:
        own = str(feature_facts(folder := artifact_folder(config, kind), kind)["encoder_sha256"])
    except ModelError:
        return ""  # listed with that artifact
    if own == facts.encoder_sha256:
        return ""
    return (f"was trained with visual tokens of image encoder {facts.encoder_sha256[:12]}, but artifacts.{kind} "
            f"{folder} holds features of encoder {own[:12]}; make these with the same guide.weights, or fine-tune "
            "with them")


def _base_problem(config: RunConfig, folder: Path, facts: AdapterFacts, prior_sha256: str) -> str:
    if facts.base_sha256 == prior_sha256:
        return ""
    return (f"{folder} was trained on base model {facts.base_sha256[:12]}, but prior.weights {config.prior.weights} is "
            f"model {prior_sha256[:12]}, whose weights it does not fit; name the base model in prior.weights, or "
            "fine-tune this one with `rayexpand fit`")


def names_classes(config: RunConfig) -> bool:
    """Whether guide or artifacts say for which classes they were made, so that a list of those is worth making."""
    return bool(_declared(config))


def check_classes(config: RunConfig, class_keys: Sequence[str]) -> list[str]:
    """Where guide or artifacts were made for other classes than the dataset's, one line each."""
    problems = []
    for field, (folder, own) in _declared(config).items():
        if field == "guide.weights":
            problems += [f"{field}: {problem}"] if (problem := class_problem(folder, class_keys)) else []
        elif difference := class_difference(own, class_keys):
            problems.append(f"{field}: {folder} was made for other classes than the dataset has: {difference}. Make "
                            "them on this dataset with `rayexpand fit` and this same file")
    return problems


def _declared(config: RunConfig) -> dict[str, tuple[Path, Sequence[str]]]:
    """(folder, class keys) by the field that names it, for what declares its classes."""
    needs, found = config.method.needs(), dict[str, tuple[Path, Sequence[str]]]()
    with contextlib.suppress(ModelError):
        if "guide" in needs and (folder := present_guide(config.guide.weights)) and (own := guide_classes(folder)):
            found["guide.weights"] = (folder, own)
    for kind, read in _CLASSES.items():
        if kind in needs and getattr(config.artifacts, kind) is not None:
            with contextlib.suppress(ModelError):
                if listed := read(named := artifact_folder(config, kind)):
                    found[f"artifacts.{kind}"] = (named, listed)
    return found


_CLASSES: dict[str, Callable[[Path], Sequence[str]]] = {
    "prototypes": lambda folder: read_facts(folder).get("made_from", {}).get("data", {}).get("classes", ()),
    "adapter": lambda folder: read_adapter(folder).classes,
    CLASS_FEATURES: lambda folder: feature_facts(folder, CLASS_FEATURES).get("classes", ())}
