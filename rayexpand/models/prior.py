"""Generators: where their weights are, what their configuration files say, and loading them.

Weights are named in one of four ways: `digits` (the embedded default, trained on first use; `digits-mae` and
`digits-unclip` likewise), a folder in diffusers' layout, `org/name@revision` on the Hugging Face hub, or a single file
with `config`; `parts`, `vae`, `loras` and `embeddings` name what is put in place of a part, or added. Only safetensors
are read and no code that comes with weights is ever run. Nothing here imports torch before a model is loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from rayexpand.contract.errors import ModelError
from rayexpand.contract.protocols import Progress
from rayexpand.models import mae_files, prior_files
from rayexpand.models.embedding_files import embedding_path
from rayexpand.models.folders import (
    DIGITS,
    DIGITS_MAE,
    DIGITS_UNCLIP,
    EMBEDDED,
    EMBEDDING_NOISE,
    HUB_NAME,
    INDEX,
    MAE_CONFIG,
    MAE_WEIGHTS,
    NOISE,
    PIXELS,
    UNCLIP_PIXELS,
    VARIANTS,
    WEIGHTS,
    ModelFiles,
    hub_snapshot,
    is_mae,
    no_folder,
)
from rayexpand.models.lora_files import lora_files
from rayexpand.models.prior_config import PriorModel
from rayexpand.models.prior_files import (
    PriorFacts,
    Settings,
    ends_in_noise,
    guidance_of,
    inspect_sources,
    noise_of,
    unusable,
)
from rayexpand.models.single_files import SUFFIX
from rayexpand.models.sources import ADDED, PriorSources, source_problems, sources_hash, staged_sources
from rayexpand.models.tiny.setting import Setting

Prior = TypeVar("Prior", bound=PriorModel)

_HUB_CONFIGS = (INDEX, NOISE, *(f"{part}/config.json" for part in WEIGHTS), EMBEDDING_NOISE, UNCLIP_PIXELS, MAE_CONFIG,
                PIXELS)
_HUB_SMALL = (*_HUB_CONFIGS, *(f"{words}/*.{end}" for words in ("tokenizer", "tokenizer_2") for end in ("json", "txt")))

_TINY_NOISE = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
               "beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": False}


def load_prior(prior: str | PriorModel, *, dtype: str = "auto", device: str = "auto", attention: str = "auto",
               channels_last: bool | str = "auto", compile: bool | str = "auto") -> Any:
    """A generator (StableDiffusionPrior, UnclipPrior or MaePrior), by its weights or with all that the section `prior`
    says of it, in eval mode with frozen weights.

    `dtype` auto is float32 on CPU and bfloat16 on CUDA (images are encoded in float32 always); `device` auto, cpu, cuda
    or cuda:N; `attention` auto (what diffusers chooses), sdpa (fused) or eager (plain matrix products).
    `channels_last` and `compile` (of the repeated blocks of the UNet) auto are on where they pay, on a GPU. Raises
    ModelError.
    """
    model = as_model(prior)
    sources = sources_of(model)
    how: dict[str, Any] = {"device": device, "attention": attention, "vae_dtype": model.vae_dtype}
    if is_mae(sources.weights):
        from rayexpand.models.mae import MaePrior

        mae_files.inspect_mae(sources.weights, model)
        return MaePrior.load(sources.weights, **how)
    facts = inspect_sources(sources, model)
    how |= {"dtype": dtype, "channels_last": channels_last, "compile": compile, "guidance": model.guidance}
    if facts.family == "unclip":
        from rayexpand.models.unclip import UnclipPrior

        return UnclipPrior.load(sources, facts.process, model.loras, model.embeddings, **how)
    from rayexpand.models.latent import StableDiffusionPrior

    return StableDiffusionPrior.load(sources, facts.process, model.loras, model.embeddings, **how)


def as_model(prior: str | PriorModel) -> PriorModel:
    return PriorModel(weights=prior) if isinstance(prior, str) else prior


def inspect_prior(prior: str | PriorModel) -> PriorFacts:
    """Facts from configuration files alone. On the hub only those files are fetched. Raises ModelError."""
    model = as_model(prior)
    if model.weights == DIGITS:
        return facts_to_come(Setting(), model)  # of which every default is the embedded digits'
    if model.weights == DIGITS_UNCLIP:
        return replace(facts_to_come(Setting(), model), family="unclip")
    if model.weights == DIGITS_MAE:
        return _digits_mae_facts(model)
    if is_mae(path := Path(model.weights).expanduser()):
        return mae_files.inspect_mae(path, model, missing_files(path))
    if has_more(model) or _is_staged(model.weights):
        return inspect_sources(sources_of(model), model)
    if (folder := _local_folder(model.weights)) is not None:
        return inspect_sources(PriorSources(folder), model, missing_files(folder))
    snapshot = hub_snapshot(model.weights, _HUB_CONFIGS, complete=_missing_configs)
    return (mae_files.inspect_mae(snapshot, model) if is_mae(snapshot) else
            inspect_sources(PriorSources(snapshot), model))


def missing_files(folder: Path, parts: Sequence[str] | None = None) -> list[str]:
    """What keeps a folder from being loaded, one line per file; `parts`: those of a pipeline whose weights it must
    hold, None for all. Raises ModelError for a folder of another kind."""
    return mae_files.missing_files(folder) if is_mae(folder) else prior_files.missing_files(folder, parts)


def _missing_configs(folder: Path) -> list[str]:
    return (mae_files if is_mae(folder) else prior_files).missing_configs(folder)


def _digits_mae_facts(model: PriorModel) -> PriorFacts:
    if problems := mae_files.named_in_vain(model):
        raise ModelError("\n  ".join([f"{DIGITS_MAE} cannot be used so:", *problems]))
    return PriorFacts(weights=DIGITS_MAE, image_size=16, vae_factor=4, unet_factor=1, latent_channels=64,
                      process=mae_files.NOTHING, train_timesteps=0, family="mae", text_width=0, guidance="none")


def facts_to_come(setting: Setting, model: PriorModel) -> PriorFacts:
    """Facts of a generator that is still to be trained to a setting. `model` says how it will be sampled. Raises
    ModelError."""
    unet, problems = setting.unet, list[str]()
    noise = {**_TINY_NOISE, "prediction_type": unet.prediction_type, "timestep_spacing": unet.spacing,
             "rescale_betas_zero_snr": unet.rescale_betas_zero_snr}
    process = noise_of(Settings(NOISE, noise, problems), model, published=True)
    facts = PriorFacts(weights=model.weights, image_size=setting.size, vae_factor=setting.vae.factor,
                       unet_factor=2 ** (len(unet.channels) - 1), latent_channels=setting.vae.latent_channels,
                       process=process, train_timesteps=1000, text_width=setting.guide.text_width,
                       guidance=guidance_of(model, False, problems), ends_in_noise=ends_in_noise(process, problems))
    if problems:
        raise ModelError("\n  ".join([f"{model.weights} cannot be used so:", *problems]))
    return facts


def check_size(facts: PriorFacts, size: int) -> None:
    """Raises ModelError unless square images of `size` pixels fit autoencoder and UNet, or the patches of a masked
    autoencoder."""
    if facts.family == "mae":
        if size != facts.image_size:
            raise ModelError(f"an image of {size} px does not fit {facts.weights}: each of its tokens stands for a "
                             f"patch of an image of {facts.image_size} px; set image.size to {facts.image_size}, or "
                             "leave it out")
        return
    unit = math.lcm(8, facts.vae_factor * facts.unet_factor)  # 8: what diffusers' own pipelines ask for
    if size < unit or size % unit:
        below, above = max(size // unit * unit, unit), (size // unit + 1) * unit
        near = f"{below} or {above}" if below != above else str(unit)
        raise ModelError(f"an image of {size} px does not fit {facts.weights}: its autoencoder shrinks by "
                         f"{facts.vae_factor} and its UNet by {facts.unet_factor}, so the side must be a multiple of "
                         f"{unit}; set image.size to {near} (trained at {facts.image_size})")


def prior_tokenizer(folder: Path, name: str = "tokenizer") -> Any:
    """A tokenizer of a generator's folder, without loading the generator. Raises ModelError."""
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder, subfolder=name, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder}/{name} cannot be loaded: {error}. Fetch or save the model again") from error


def prior_model(prior: str | PriorModel) -> ModelFiles:
    """The files of a generator."""
    model = as_model(prior)
    return ModelFiles(lambda: sources_of(model).files(), lambda: None if has_more(model) else present(model.weights),
                      lambda folder: sources_hash(staged_sources(folder)))


def sources_of(prior: str | PriorModel, progress: Progress | None = None) -> PriorSources:
    """Where each part of a generator lies, trained or downloaded where needed. Raises ModelError."""
    model = as_model(prior)
    path = Path(model.weights).expanduser()
    if _is_staged(model.weights):
        return staged_sources(path)
    if not has_more(model):
        return PriorSources(resolve(model.weights, progress))
    sources = PriorSources(path if path.exists() else resolve(model.weights, progress), _path(model.config),
                           {name: Path(file).expanduser() for name, file in model.parts.items()}, _path(model.vae),
                           added_files(model))
    if problems := source_problems(sources, model.process.model_dump()):
        raise ModelError("\n".join(problems))
    own = [part for part in sources.classes() if sources.part(part).weights == sources.folder / part]
    if problems := missing_files(sources.folder, own):
        raise unusable(sources.folder, problems)
    return sources


def has_more(model: PriorModel) -> bool:
    """Whether its files are not those of one folder."""
    named = (model.config, model.parts, model.vae, model.loras, model.embeddings)
    return any(named) or Path(model.weights).expanduser().is_file()


def added_files(model: PriorModel) -> dict[str, tuple[Path, ...]]:
    """Files of LoRAs and embeddings by their role. Raises ModelError with all that are none."""
    found, problems = dict[str, tuple[Path, ...]](), []
    roles = {f"{ADDED[0]}{i}": lambda one=one: lora_files(one) for i, one in enumerate(model.loras)}
    roles |= {f"{ADDED[1]}{i}": lambda one=one: [embedding_path(one)] for i, one in enumerate(model.embeddings)}
    for role, files in roles.items():
        try:
            found[role] = tuple(files())
        except ModelError as error:
            problems.append(f"{role}: {error}")
    if problems:
        raise ModelError("\n".join(problems))
    return found


def staged_prior(model: Prior, folder: Path) -> Prior:
    """A generator whose files lie in a folder under the names of their roles."""
    def here(role: str) -> str:
        return str(one if (one := folder / f"{role}{SUFFIX}").is_file() else folder / role)

    lists = {name: tuple(one.model_copy(update={"file": here(f"prior.{name}.{i}")})
                         for i, one in enumerate(getattr(model, name))) for name in ("loras", "embeddings")}
    return model.model_copy(update={"weights": str(folder), "config": None, "parts": {}, "vae": None, **lists})


def _path(said: str | None) -> Path | None:
    return None if said is None else Path(said).expanduser()


def _is_staged(weights: str) -> bool:
    path = Path(weights).expanduser()
    return path.is_dir() and staged_sources(path) != PriorSources(path)


def prior_hash(prior: str | PriorModel, progress: Progress | None = None) -> str:
    """Content hash of the generator's files; trains the embedded default or downloads first where needed."""
    return sources_hash(sources_of(prior, progress))


def resolve(weights: str, progress: Progress | None = None) -> Path:
    """Folder with everything needed to load `weights`: trained, downloaded, or as it is. Raises ModelError."""
    if weights in EMBEDDED:
        from rayexpand.models.tiny.embedded import trained

        return trained(weights, progress)
    folder = _local_folder(weights)
    if folder is None:
        return hub_snapshot(weights, _HUB_SMALL, complete=missing_files, more=hub_weights)
    if problems := missing_files(folder):
        raise (mae_files.unusable_mae if is_mae(folder) else unusable)(folder, problems)
    return folder


def present(weights: str) -> Path | None:
    """The folder of `weights` if it is on this machine under a name of its own; nothing is trained or downloaded."""
    if weights in EMBEDDED:
        from rayexpand.models.tiny.embedded import place

        folder = place(weights)
    else:
        folder = Path(weights).expanduser()
    return folder if folder.is_dir() else None


def is_present(model: PriorModel) -> bool:
    """Whether reading its weights trains and downloads nothing."""
    return present(model.weights) is not None or Path(model.weights).expanduser().is_file()


# ---------------------------------------------------------------------------------------------------------------- files


def hub_weights(listing: Collection[str]) -> list[str]:
    """The weight files of a repository that loading reads: of each model the variant that `weight_files` would choose,
    and of nothing else, such as other precisions and single-file copies of all of them."""
    if INDEX not in listing:
        return _variant_files(listing, MAE_WEIGHTS)
    return [name for part, stem in WEIGHTS.items() for name in _variant_files(listing, f"{part}/{stem}")]


def _variant_files(listing: Collection[str], stem: str) -> list[str]:
    for end in (f".{variant}" if variant else "" for variant in VARIANTS):
        if (whole := f"{stem}{end}.safetensors") in listing:
            return [whole]
        if (index := f"{stem}.safetensors.index{end}.json") in listing:
            name, of_variant = re.escape(stem), re.escape(end)
            shard = re.compile(rf"{name}({of_variant}-\d+-of-\d+|-\d+-of-\d+{of_variant})\.safetensors")
            return [index, *filter(shard.fullmatch, listing)]  # what the index names beside them is said to be missing
    return []


def _local_folder(weights: str) -> Path | None:
    """The folder, or None for a name on the hub. Raises ModelError for anything else."""
    path = Path(weights).expanduser()
    if path.is_dir():
        return path
    if HUB_NAME.fullmatch(weights):
        return None
    raise no_folder(weights, f"{', '.join(repr(name) for name in EMBEDDED)} (embedded), a folder in diffusers' "
                             "StableDiffusionPipeline layout")
