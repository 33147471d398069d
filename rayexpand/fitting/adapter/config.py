"""The `adapter` section of a fit file: fine-tune the generator on the dataset, and what can be wrong with that.

    fit:
      adapter:
        recipe: {preset: diffmix, steps: 35000}     # fields of fitting/adapter/recipe.py
        resolution: 512
        workers: 8                                  # Ray Train workers; 0: this process

`recipe` decides the numbers, and so do resolution, crops, flips, latents and the number of workers (sums in another
order). The rest says how it runs and may change between two attempts at one fine-tuning.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from rayexpand.artifacts.columns import (
    CAPTIONS,
    CLASS_FEATURES,
    IMAGE_FEATURES,
    columns_problem,
    features_width,
    width_problem,
)
from rayexpand.contract.class_tokens import add_class_tokens
from rayexpand.contract.errors import ModelError
from rayexpand.contract.prompts import CLASS_WORDS, placeholders
from rayexpand.contract.schema import ClassTable
from rayexpand.contract.settings import Section, mistakes
from rayexpand.diffusion.sampling import Solver
from rayexpand.fitting.adapter.latents import LatentsConfig, Views
from rayexpand.fitting.adapter.recipe import FinetuneConfig, make_finetune
from rayexpand.models.folders import DIGITS, tokenizers_of
from rayexpand.models.prior import check_size, inspect_prior, present, prior_tokenizer
from rayexpand.models.prior_files import GENERATORS, PriorFacts


class BaseConfig(Section):
    weights: str = Field(DIGITS, description="generator to fine-tune: 'digits' (embedded default), a diffusers folder, "
                         "or org/name@revision")


class SheetConfig(Section):
    classes: int = Field(4, ge=1, description="rows: the first classes by label")
    images: int = Field(4, ge=1, description="columns: fixed noises")
    steps: int = Field(10, ge=1, description="solver steps")
    guidance_scale: float = Field(2.0, ge=0, description="classifier-free guidance scale, 1 = none")
    solver: Solver = "ddim"


class AdapterFit(Section):
    recipe: dict[str, Any] = Field({}, description="preset and fields of the fine-tuning")
    resolution: int | None = Field(None, ge=8, description="side of the training images, pixels; null: the generator's "
                                   "own")
    crops: int = Field(1, ge=1, description="crops kept of each image that is not square")
    flips: bool = Field(True, description="each crop also mirrored (both papers); false where left and right matter")
    latents: LatentsConfig = LatentsConfig()
    captions: str | None = Field(None, description="folder of captions, where the prompt holds {caption}; null: those "
                                 "this file makes")
    features: str | None = Field(None, description="folder of class or image features, for recipe.visual_token; null: "
                                 "those this file makes")

    workers: int = Field(0, ge=0, description="Ray Train workers that share each batch; 0: train in this process")
    cpus_per_worker: float = Field(1.0, ge=0, description="CPUs each reserves, with its loaders")
    gpus_per_worker: float | None = Field(None, ge=0, description="GPUs each reserves; null: 1 where the cluster has "
                                          "GPUs, else 0")
    loaders: int = Field(1, ge=1, description="processes beside each worker that read latents")
    checkpoint_every: int = Field(5000, ge=1, description="optimiser steps (Diff-Mix: 5000)")
    log_every: int = Field(10, ge=1, description="optimiser steps of one point of the curves")
    sheet: SheetConfig | None = Field(SheetConfig(), description="a picture of samples with each checkpoint; null: "
                                      "none")
    tensorboard: bool = Field(True, description="curves as TensorBoard events beside the adapter")

    @field_validator("recipe")
    @classmethod
    def _is_a_recipe(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        try:
            make_finetune(recipe)
        except ValidationError as error:
            lines = mistakes(error, FinetuneConfig, "")
            raise ValueError("; ".join(line.removeprefix(": ") for line in lines)) from error
        return recipe

    @property
    def finetune(self) -> FinetuneConfig:
        return make_finetune(self.recipe)

    @property
    def captions_kind(self) -> str | None:
        """CAPTIONS where the prompt asks for them."""
        return CAPTIONS if "caption" in placeholders(self.finetune.template) else None

    @property
    def features_kind(self) -> str | None:
        """Artifact that holds the visual tokens; None without any."""
        return {"none": None, "class_mean": CLASS_FEATURES, "instance": IMAGE_FEATURES}[self.finetune.visual_token]

    def views(self, facts: PriorFacts, seed: int) -> Views:
        return Views(self.resolution or facts.image_size, self.crops, self.flips, self.latents.batch,
                     self.latents.dtype, seed)


def adapter_problems(made: AdapterFit, weights: str | None, device: str, here: Mapping[str, int | None], *,
                     on_ray: bool) -> list[str]:
    """What is wrong with the section as far as files on this machine say, one line each. `weights` None: of a generator
    that the same file makes; `here`: kinds of artifacts that it makes, with the width of features where that is known;
    `on_ray`: whether `workers` are used."""
    recipe = made.finetune
    problems = _share_problems(made, recipe, on_ray=on_ray) + _artifact_problems(made, recipe, here)
    if recipe.precision == "fp16" and device == "cpu":
        problems.append("fit.adapter.recipe.precision: fp16 needs CUDA, and device is cpu; use fp32 or bf16")
    return problems if weights is None else problems + _base_problems(made, recipe, weights, here)


def _base_problems(made: AdapterFit, recipe: FinetuneConfig, weights: str, here: Mapping[str, int | None],
                   ) -> list[str]:
    try:
        facts = inspect_prior(weights)
    except ModelError as error:
        return [f"prior.weights: {error}"]
    if facts.generator == "mae":
        return [f"prior.weights: {weights} is {GENERATORS['mae']}, which has no prompts to fine-tune and redraws "
                "images of other domains as they are; name a Stable Diffusion model, or Stable unCLIP"]
    problems = _untrainable(facts, recipe) + (_told_problems(made, weights) if facts.generator == "unclip" else [])
    try:
        check_size(facts, made.resolution or facts.image_size)
    except ModelError as error:
        text = str(error).replace("image.size", "fit.adapter.resolution")
        problems.append(f"fit.adapter.resolution: {text}")
    if recipe.has_tokens:
        problems += _token_problems(recipe.init_token, weights)
    problems += _width_problems(made, facts, here)
    if made.sheet is not None and made.sheet.steps > facts.train_timesteps:
        problems.append(f"fit.adapter.sheet.steps: {made.sheet.steps} steps, but the generator knows "
                        f"{facts.train_timesteps} timesteps")
    if made.sheet is not None and facts.ends_in_noise and facts.process.kind == "epsilon":
        problems.append("fit.adapter.sheet: this generator's scheduler ends in pure noise (rescale_betas_zero_snr, or "
                        "betas that reach 1), so no sample can be drawn from its last timestep here; set sheet: null, "
                        "or take weights trained without it")
    return problems


def _told_problems(made: AdapterFit, weights: str) -> list[str]:
    """What means nothing to a decoder that is told image embeddings and no texts, one line each."""
    recipe, what = made.finetune, f"{weights} is {GENERATORS['unclip']}, which"
    problems = []
    if recipe.strategy != "full":
        problems.append(f"fit.adapter.recipe.strategy: {what} has no prompts for class tokens and takes no adapter; "
                        "set strategy: full, which trains its UNet and makes a generator")
    if recipe.prompt is not None:
        problems.append(f"fit.adapter.recipe.prompt: {what} reads no prompt; take it out")
    if recipe.has_visual:
        problems.append(f"fit.adapter.recipe.visual_token: {what} is told the embedding of each image as it is; take "
                        "it out")
    return problems


def _untrainable(facts: PriorFacts, recipe: FinetuneConfig) -> list[str]:
    """Why nothing here trains such a generator, one line each."""
    name, process = facts.weights, facts.process
    problems = []
    if facts.few_step or facts.turbo:
        found = facts.few_step or "turbo, by its name"
        problems.append(f"prior.weights: {name} was distilled to few steps ({found}), and nothing here is trained so; "
                        "use the model it was distilled from")
    if process.frame == "edm":
        problems.append(f"prior.weights: {name} has noise levels ({process.scheduler}), and training here draws "
                        "timesteps; fine-tune a model with a schedule of betas, as Stable Diffusion XL")
    elif process.kind not in ("epsilon", "v_prediction"):
        problems.append(f"prior.weights: {name} predicts {process.kind}, and the loss here is that of epsilon or "
                        "v_prediction; fine-tune a model that predicts one of them")
    if facts.family == "sdxl" and recipe.strategy == "full":
        problems.append(f"fit.adapter.recipe.strategy: full trains every weight of UNet and text encoder, of Stable "
                        f"Diffusion 1.x and 2.x only, and {name} has two text encoders; use db or ti_db")
    return problems


def _width_problems(made: AdapterFit, facts: PriorFacts, here: Mapping[str, int | None]) -> list[str]:
    """Where image features have not the width of the hidden states whose slot they take, as far as that is known."""
    if (kind := made.features_kind) is None:
        return []
    width, of = here.get(kind), f"fit.{kind}"
    if made.features is not None:
        of = f"fit.adapter.features: {made.features}"
        try:
            width = features_width(Path(made.features).expanduser(), kind)
        except ModelError:
            return []  # listed as such
    problem = "" if width is None else width_problem(width, facts.text_width)
    return [f"{of} {problem}"] if problem else []


def _share_problems(made: AdapterFit, recipe: FinetuneConfig, *, on_ray: bool) -> list[str]:
    world = max(1, made.workers) if on_ray else 1
    parts = world * recipe.accumulate
    if recipe.batch % parts == 0:
        if not recipe.mmd_images or recipe.batch // parts % recipe.mmd_images == 0:
            return []
        return [f"fit.adapter.recipe.mmd_images: {recipe.batch // parts} images ({recipe.batch} over {world} workers, "
                f"accumulate {recipe.accumulate}) cannot be cut into terms of {recipe.mmd_images}; use fewer workers, "
                "or accumulate less"]
    return [f"fit.adapter.recipe.batch: {recipe.batch} images cannot be cut into {parts} equal slices ({world} "
            f"workers, accumulate {recipe.accumulate}); use a multiple of {parts}"]


def _artifact_problems(made: AdapterFit, recipe: FinetuneConfig, here: Container[str]) -> list[str]:
    problems = []
    wanted = [("captions", made.captions_kind, made.captions, "{caption} in recipe.prompt"),
              ("features", made.features_kind, made.features, f"recipe.visual_token {recipe.visual_token}")]
    for field, kind, folder, reason in wanted:
        if kind is None and folder is not None:
            problems.append(f"fit.adapter.{field}: has no effect without " + (
                reason if field == "captions" else "recipe.visual_token class_mean or instance"))
        elif kind is not None and folder is not None and (
                problem := columns_problem(Path(folder).expanduser(), kind)):
            problems.append(f"fit.adapter.{field}: {problem}")
        elif kind is not None and folder is None and kind not in here:
            problems.append(f"fit.adapter.{field}: is missing, and {reason} needs {kind.replace('_', ' ')}; name a "
                            f"folder, or add `{kind}:` to `fit` of this file")
    return problems


def _token_problems(token: int | str | None, weights: str) -> list[str]:
    """Why class tokens cannot start as this word, or not follow the words of each vocabulary, one line each; none where
    the generator is not on this machine yet."""
    problems = []
    for tokenizer in _tokenizers(weights):
        if problem := _start_problem(token, tokenizer):
            problems.append(f"fit.adapter.recipe.init_token: {problem}")
        try:
            add_class_tokens(tokenizer, 1)
        except ModelError as error:
            problems.append(f"prior.weights: {weights}: {error}")
    return list(dict.fromkeys(problems))


def _start_problem(token: int | str | None, tokenizer: Any) -> str:
    if token is None:
        return ""
    if isinstance(token, int):
        return "" if 0 <= token < len(tokenizer) else (
            f"{token} is no id of this generator's vocabulary of {len(tokenizer)} words; give a word of it, or null "
            "for the mean of all rows")
    if len(ids := tokenizer(token, add_special_tokens=False).input_ids) == 1:
        return ""
    return (f"{token!r} is {len(ids)} tokens in this generator's vocabulary; give a word that is one token, an id, or "
            "null for the mean of all rows")


def _tokenizers(weights: str) -> list[Any]:
    """New ones of a generator's folder; none where it is not on this machine yet."""
    if weights == DIGITS:
        from rayexpand.models.tiny.digits import build_tokenizer

        return [build_tokenizer()]
    folder = present(weights)
    if folder is None or not (Path(folder) / "tokenizer").is_dir():
        return []
    return [prior_tokenizer(folder, name) for name in tokenizers_of(folder)]


def word_problems(made: AdapterFit, classes: ClassTable) -> list[str]:
    """Words the training prompt asks for and the class table does not have, one line each."""
    problems = []
    template = made.finetune.template
    for word in (one for one in CLASS_WORDS if one in placeholders(template)):
        blank = [classes.key[k] for k in range(len(classes)) if not getattr(classes, word)[k].strip()]
        if blank:
            problems.append(f"fit.adapter.recipe.prompt: {template!r} asks for {{{word}}}, which {len(blank)} of "
                            f"{len(classes)} classes do not have, such as {blank[0]!r}; add a {word} to the file "
                            "data.classes, or write the word itself into the prompt")
    return problems
