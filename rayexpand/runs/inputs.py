"""The models and artifacts of a run: where they are, what is wrong with them, their content, loading them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from rayexpand.artifacts import KINDS
from rayexpand.artifacts.adapter import asks_for_tokens, base_problem, read_adapter, reads_text
from rayexpand.artifacts.columns import CAPTIONS, IMAGE_FEATURES, open_image_features
from rayexpand.contract.errors import ModelError, RayexpandError
from rayexpand.contract.protocols import Method
from rayexpand.contract.rng import RowRng
from rayexpand.contract.schema import ClassTable, SeedIndex
from rayexpand.data import seeds
from rayexpand.models.folders import DIGITS, DIGITS_UNCLIP, folder_hash
from rayexpand.models.guide_files import (
    CLASS_PROMPT,
    CLASSIFIER,
    check_guide,
    class_difference,
    class_problem,
    guide_classes,
    kind_of,
    present_guide,
)
from rayexpand.models.guides import guide_hash
from rayexpand.models.image_towers import encoder_space, guide_space
from rayexpand.models.prior import has_more, missing_files, present, prior_hash, sources_of
from rayexpand.runs.config import GuideConfig, RunConfig


@dataclass(frozen=True)
class ConfiguredInputs:
    """What artifact kinds may ask of a run (artifacts.kinds.RunInputs). `guide`, `judge`: their content hashes, where
    known, and `text_width` that of the hidden states of its generator."""

    config: RunConfig
    guide: str | None = None
    text_width: int | None = None
    judge: str | None = None

    @property
    def method(self) -> Method:
        return self.config.method

    @property
    def prior_weights(self) -> str:
        return self.config.prior.weights

    @property
    def guide_weights(self) -> str:
        return self.config.guide.weights

    @cached_property
    def prior_sha256(self) -> str | None:
        prior = self.config.prior
        with contextlib.suppress(ModelError):  # whoever asks for the prior says so
            if has_more(prior):
                return prior_hash(prior) if present(prior.weights) or Path(prior.weights).is_file() else None
            here = present(prior.weights)
            return None if here is None or missing_files(here) else folder_hash(here)
        return None

    @cached_property
    def guide_sha256(self) -> str | None:
        return self.guide if self.guide is not None else _present_hash(self.config.guide)

    @property
    def judge_weights(self) -> str | None:
        return None if self.config.accept is None else self.config.accept.guide.weights

    @cached_property
    def judge_sha256(self) -> str | None:
        if self.judge is not None or self.config.accept is None:
            return self.judge
        return _present_hash(self.config.accept.guide)

    @property
    def comparison(self) -> str | None:
        return None if self.config.accept is None else self.config.accept.comparison

    def folder(self, kind: str) -> Path | None:
        named = self.config.artifacts.get(kind)
        return None if named is None else Path(named).expanduser()


def _present_hash(guide: GuideConfig) -> str | None:
    here = present_guide(guide.weights)
    return None if here is None or check_guide(guide.weights, guide.checkpoint) else folder_hash(here)


def artifact_folder(config: RunConfig, kind: str) -> Path:
    """Where the configuration says an artifact is. Raises ModelError."""
    if (folder := ConfiguredInputs(config).folder(kind)) is None:
        raise ModelError(f"artifacts.{kind}: {KINDS[kind].unnamed(_who_needs(config, kind))}")
    return folder


def _who_needs(config: RunConfig, kind: str) -> str:
    return config.method.name if kind in config.method.needs() else "accept"


def artifact_hashes(config: RunConfig) -> dict[str, str]:
    """Content hashes of the artifacts that samplers load. Planned ones are none of them: the plan holds what a
    run needs of them, so it goes on without. Raises ModelError."""
    return {name: kind.sha256(artifact_folder(config, name)) for name, kind in KINDS.items()
            if name in config.needs and not kind.planned}


def captions_sha256(config: RunConfig) -> str | None:
    """Content hash of the captions of a run, None where it has none or they are not there (any more)."""
    if CAPTIONS not in config.needs or config.artifacts.get(CAPTIONS) is None:
        return None
    with contextlib.suppress(ModelError):
        return KINDS[CAPTIONS].sha256(artifact_folder(config, CAPTIONS))
    return None


def load_artifacts(config: RunConfig, class_keys: Sequence[str], guide: str | None = None) -> dict[str, Any]:
    """What samplers are given of each artifact, by the field of Tools. `guide`: its content hash, where known. Raises
    ModelError."""
    if guide is None and "prototypes" in config.needs:
        guide = guide_hash(config.guide.weights, config.guide.checkpoint)
    inputs = ConfiguredInputs(config, guide)
    return {name: kind.load(artifact_folder(config, name), inputs, class_keys) for name, kind in KINDS.items()
            if name in config.needs and not kind.planned and name != "adapter"}  # which is part of the prior


def check_artifacts(config: RunConfig, *, planned: bool = False, text_width: int | None = None) -> list[str]:
    """What is wrong with guide and artifacts of a run as far as files on this machine say, one line each; nothing is
    loaded, trained or downloaded, and no dataset is listed. `planned`: the plan is there, and holds the captions;
    `text_width`: of the hidden states that the generator reads, where known."""
    problems = []
    if "guide" in config.needs:
        problems += [f"guide.weights: {one}" for one in check_guide(config.guide.weights, config.guide.checkpoint)]
        problems += _guide_text_problems(config) if not problems else []
    problems += _judge_problems(config)
    inputs = ConfiguredInputs(config, text_width=text_width)
    for name, kind in KINDS.items():
        folder = inputs.folder(name)
        if name not in config.needs:
            problems += [f"artifacts.{name}: {no_effect(config.method, name)}"] if folder is not None else []
        elif folder is None:
            problems.append(f"artifacts.{name}: {kind.unnamed(_who_needs(config, name))}")
        elif not (kind.planned and planned):
            problems += [f"artifacts.{name}: {problem}" for problem in kind.problems(folder, inputs)]
    return problems


def _judge_problems(config: RunConfig) -> list[str]:
    """What is wrong with the section `accept`, one line each."""
    if (accept := config.accept) is None:
        return []
    guide, here = accept.guide, present_guide(accept.guide.weights)
    problems = [f"accept.guide.weights: {one}" for one in check_guide(guide.weights, guide.checkpoint)]
    if not problems and here is not None:
        own = guide_classes(here)
        if accept.comparison == "prompt" and kind_of(here) == CLASSIFIER:
            problems.append(f"accept.to: {guide.weights} is a classifier and reads no prompt; name a CLIP guide, or "
                            "set accept.to: class")
        if accept.wanted is not None and (own is None or accept.wanted not in own):
            problems.append(f"accept.wanted: {guide.weights} has no class {accept.wanted!r}" + (
                f", but {', '.join(own[:5])}" if own else ": it is a CLIP guide, which has none of its own")
                + "; correct it, or leave it out for the class of the sample")
    if accept.comparison == "prompt" and asks_for_tokens(config.method):
        problems.append("accept.to: the prompt has {token}, a word that no guide knows; write {name}, or set "
                        "accept.to: class")
    if accept.comparison == "prompt" and not _has_prompt(config.method):
        problems.append(f"accept.to: {config.method.name}, as it is set here, has no prompt to compare with; set "
                        "accept.to: class")
    if accept.attempts > 1 and getattr(config.method, "sample", True) is False:
        problems.append("accept.attempts: with method.sample: false every attempt at a row is the same image; set "
                        "attempts: 1, or method.sample: true")
    if accept.comparison == "seed" and (targets := getattr(config.method, "targets", "reference")) != "reference":
        problems.append(f"accept.to: {config.method.name} with targets {targets} makes samples of other classes than "
                        "their seed images have, so being like these says nothing; set accept.to: class")
    if accept.attempts > 1 and config.method.group(2) > 1:
        problems.append(f"accept.attempts: copies of a seed share a call in {config.method.name}, so one of them alone "
                        "cannot be drawn again; set attempts: 1")
    return problems


def _has_prompt(method: Method) -> bool:
    """A method without a field for it may still write one into its draws."""
    return reads_text(method) or bool(method.draw("", 0, 0, 0, ClassTable.of(["a", "b"]), RowRng(0, "", "", 0)).prompt)


def _guide_text_problems(config: RunConfig) -> list[str]:
    """Where a guide that has its classes already is asked about them."""
    here, asked = present_guide(config.guide.weights), getattr(config.method, "guide_text", CLASS_PROMPT)
    if asked == CLASS_PROMPT or here is None or guide_classes(here) is None:
        return []
    return [f"method.guide_text: guide {here} has a head of its own for its classes and is asked nothing; take it out, "
            "or name a CLIP guide"]


def check_space(config: RunConfig, *, present_only: bool = False) -> list[str]:
    """Why a guide cannot score the latents of a decoder of image embeddings, which it does without an image.
    `present_only`: nothing is trained or downloaded for the answer."""
    if getattr(config.method, "generator", "sd") != "unclip" or not {"prior", "guide"} <= config.needs or (
            (config.prior.weights, config.guide.weights) == (DIGITS_UNCLIP, DIGITS)):
        return []
    prior, guide = config.prior.weights, config.guide
    if present_only and not ((here := present(prior)) and not missing_files(here) and (
            guide.checkpoint or present_guide(guide.weights))):
        return []
    try:
        painted, seen = encoder_space(sources_of(config.prior).folder), guide_space(guide.weights, guide.checkpoint)
    except ModelError as error:
        return [f"guide.weights: {error}; the guide of {prior} must be its own image encoder"]
    return [] if painted == seen else [
        f"guide.weights: {guide.weights} sees images otherwise than the image encoder of {prior} ({seen}, {painted}), "
        "whose embeddings it would score without looking at an image. Name that encoder in open_clip's layout"]


def no_effect(method: Method, kind: str) -> str:
    """Why a method as it is set does not read an artifact, and what to do."""
    reason, remedy = KINDS[kind].unused(method)
    name = f"{method.name} {getattr(method, 'variant', '')}".rstrip()
    return f"has no effect on {name}, which {reason}; take it out, or {remedy}"


def check_judge(config: RunConfig, judge_sha256: str) -> None:
    """Raises ModelError where an artifact that the judge compares with was made by another guide than the one with this
    hash."""
    inputs = ConfiguredInputs(config, judge=judge_sha256)
    for name in sorted(config.needs & {"image_features", "thresholds"}):
        if problems := KINDS[name].problems(artifact_folder(config, name), inputs):
            raise ModelError(f"artifacts.{name}: {problems[0]}")


def check_base(config: RunConfig, prior_sha256: str) -> None:
    """Raises ModelError where the adapter of a run was trained on another model than the one with this hash."""
    folder = artifact_folder(config, "adapter")
    if problem := base_problem(folder, read_adapter(folder), ConfiguredInputs(config), prior_sha256):
        raise ModelError(f"artifacts.adapter: {problem}")


def check_seeds(config: RunConfig, index: SeedIndex) -> list[str]:
    """Where artifacts lack so many seeds of the dataset that the run would fail more rows than its limit, one line
    each. Below that, the rows of such seeds are refused one by one. Raises ModelError."""
    if IMAGE_FEATURES not in config.needs:
        return []
    ids = open_image_features(folder := artifact_folder(config, IMAGE_FEATURES)).ids
    sound = index.table["seed_id"].filter(pc.equal(index.table["fault"], ""))
    absent = sound.filter(pc.invert(pc.is_in(sound, value_set=ids)))
    if len(absent) <= config.limits.max_failed * len(index):
        return []
    return [f"artifacts.image_features: {folder} has none of {len(absent):,} of {len(index):,} seeds "
            f"({', '.join(absent[:3].to_pylist())}, ...); make them of this very dataset with `rayexpand fit`"]


def names_classes(config: RunConfig) -> bool:
    """Whether guide or artifacts say for which classes they were made, so that a list of those is worth making."""
    return bool(_declared(config))


def check_classes(config: RunConfig, class_keys: Sequence[str]) -> list[str]:
    """Where guide or artifacts were made for other classes than the dataset's, one line each."""
    problems = []
    for field, (folder, own) in _declared(config).items():
        if field.endswith("guide.weights"):
            problems += [f"{field}: {problem}"] if (problem := class_problem(folder, class_keys)) else []
        elif difference := class_difference(own, class_keys):
            problems.append(f"{field}: {folder} was made for other classes than the dataset has: {difference}. Make "
                            "them on this dataset with `rayexpand fit` and this same file")
    return problems


def _declared(config: RunConfig) -> dict[str, tuple[Path, Sequence[str]]]:
    """(folder, class keys) by the field that names it, for what declares its classes."""
    found, inputs = dict[str, tuple[Path, Sequence[str]]](), ConfiguredInputs(config)
    with contextlib.suppress(ModelError):
        if "guide" in config.needs and (here := present_guide(config.guide.weights)) and (own := guide_classes(here)):
            found["guide.weights"] = (here, own)
    with contextlib.suppress(ModelError):
        judge = None if config.accept is None or config.accept.wanted else config.accept.guide
        if judge and (here := present_guide(judge.weights)) and (own := guide_classes(here)):
            found["accept.guide.weights"] = (here, own)
    for name, kind in KINDS.items():
        if name in config.needs and (folder := inputs.folder(name)) is not None:
            with contextlib.suppress(ModelError):
                if listed := kind.classes(folder):
                    found[f"artifacts.{name}"] = (folder, listed)
    return found


def changed_seeds(config: RunConfig, planned: SeedIndex) -> str:
    """What the dataset has gained and lost since a run was planned, in words; "" where nothing, or where it is not
    there any more."""
    try:
        now = set(seeds.build_index(config.data).seed_ids)
    except RayexpandError:
        return ""
    then = set(planned.seed_ids)
    if now == then:
        return ""
    return (f"the dataset has {len(now - then):,} seeds more and {len(then - now):,} fewer than when this run was "
            "planned, and a run keeps its plan; for a run with them give another `name`, or say grow: true where "
            "some are new and none is gone")
