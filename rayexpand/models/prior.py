"""Generators: where their weights are, what their configuration files say, and loading them.

Weights are named in one of three ways: `digits` (the embedded default, trained on first use), a folder in diffusers'
StableDiffusionPipeline layout, or `org/name@revision` on the Hugging Face hub. Only safetensors are read and no code
that comes with weights is ever run. Nothing here imports torch before a model is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayexpand.contract.errors import ModelError
from rayexpand.contract.protocols import Progress
from rayexpand.models.folders import (
    CONFIGS,
    DIGITS,
    HUB_NAME,
    PICKLES,
    WEIGHTS,
    ModelFiles,
    cache_root,
    folder_hash,
    folder_model,
    hub_snapshot,
    incomplete_message,
    read_json,
    weight_files,
)

if TYPE_CHECKING:
    from rayexpand.models.latent import StableDiffusionPrior

CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
PREDICTION_TYPES = ("epsilon", "v_prediction")

_HUB_FILES = (*CONFIGS, "tokenizer/*.json", "tokenizer/*.txt", "*/*.safetensors.index.json",
              *(f"{part}/{stem}{end}.safetensors" for part, stem in WEIGHTS.items() for end in ("", "-*-of-*")))
_CONVERT = "load it once in diffusers where you trust it and call save_pretrained(folder, safe_serialization=True)"


@dataclass(frozen=True, slots=True)
class PriorFacts:
    """What configuration files say about a generator. Sizes in pixels of the image."""

    weights: str  # as given, with the commit hash in place of a branch or tag
    image_size: int  # side the generator was trained at
    vae_factor: int  # image pixels per latent pixel, along one side
    unet_factor: int  # by which the UNet halves the latent, along one side
    latent_channels: int
    prediction_type: str  # "epsilon" or "v_prediction"
    train_timesteps: int


DIGITS_FACTS = PriorFacts(weights=DIGITS, image_size=16, vae_factor=2, unet_factor=2, latent_channels=4,
                          prediction_type="v_prediction", train_timesteps=1000)


def load_prior(weights: str, *, dtype: str = "auto", device: str = "auto", attention: str = "auto",
               channels_last: bool = False, compile: bool = False) -> StableDiffusionPrior:
    """The generator named by `weights`, in eval mode with frozen weights.

    `dtype` auto is float32 on CPU and bfloat16 on CUDA (the autoencoder is float32 always); `device` auto, cpu, cuda
    or cuda:N; `attention` auto (what diffusers chooses), sdpa (fused) or eager (plain matrix products). `compile` is
    for the UNet and pays on a GPU only. Raises ModelError.
    """
    folder = resolve(weights)
    _inspect(folder, weights)
    from rayexpand.models.latent import StableDiffusionPrior

    return StableDiffusionPrior.load(folder, dtype=dtype, device=device, attention=attention,
                                     channels_last=channels_last, compile=compile)


def inspect_prior(weights: str) -> PriorFacts:
    """Facts from configuration files alone. On the hub only those files are fetched. Raises ModelError."""
    if weights == DIGITS:
        return DIGITS_FACTS
    folder = _local_folder(weights)
    if folder is None:
        return _inspect(hub_snapshot(weights, CONFIGS, complete=_missing_configs), weights)
    if problems := _missing_files(folder):
        raise ModelError(incomplete_message(folder, problems))
    return _inspect(folder, weights)


def check_size(facts: PriorFacts, size: int) -> None:
    """Raises ModelError unless square images of `size` pixels fit autoencoder and UNet."""
    unit = math.lcm(8, facts.vae_factor * facts.unet_factor)  # 8: what diffusers' own pipelines ask for
    if size < unit or size % unit:
        below, above = max(size // unit * unit, unit), (size // unit + 1) * unit
        near = f"{below} or {above}" if below != above else str(unit)
        raise ModelError(f"an image of {size} px does not fit {facts.weights}: its autoencoder shrinks by "
                         f"{facts.vae_factor} and its UNet by {facts.unet_factor}, so the side must be a multiple of "
                         f"{unit}; set image.size to {near} (trained at {facts.image_size})")


def prior_model(weights: str) -> ModelFiles:
    """The files of a generator."""
    return replace(folder_model(Path(weights)), find=lambda: folder_model(resolve(weights)).find(),
                   present=lambda: present(weights))


def prior_hash(weights: str, progress: Progress | None = None) -> str:
    """Content hash of the generator's files; trains the embedded default or downloads first where needed."""
    return folder_hash(resolve(weights, progress))


def resolve(weights: str, progress: Progress | None = None) -> Path:
    """Folder with everything needed to load `weights`: trained, downloaded, or as it is. Raises ModelError."""
    if weights == DIGITS:
        from rayexpand.models.tiny import digits

        return digits.ensure(progress) / "pipeline"
    folder = _local_folder(weights)
    if folder is None:
        return hub_snapshot(weights, _HUB_FILES, complete=_missing_files)
    if problems := _missing_files(folder):
        raise ModelError(incomplete_message(folder, problems))
    return folder


def present(weights: str) -> Path | None:
    """The folder of `weights` if it is on this machine under a name of its own; nothing is trained or downloaded."""
    if weights == DIGITS:
        from rayexpand.models.tiny import digits

        folder = cache_root() / digits.cache_name() / "pipeline"
    else:
        folder = Path(weights).expanduser()
    return folder if folder.is_dir() else None


# ---------------------------------------------------------------------------------------------------------------- files


def _local_folder(weights: str) -> Path | None:
    """The folder, or None for a name on the hub. Raises ModelError for anything else."""
    path = Path(weights).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        kind = "a pickle, which can run code when opened" if path.suffix in PICKLES else "a single file"
        raise ModelError(f"{path} is {kind}; a folder in diffusers' StableDiffusionPipeline layout is "
                         f"needed: {_CONVERT}")
    if HUB_NAME.fullmatch(weights):
        return None
    raise ModelError(f"there is no folder {path}; give 'digits' (the embedded default), a folder in diffusers' "
                     "StableDiffusionPipeline layout, or org/name@revision")


def _missing_configs(folder: Path) -> list[str]:
    return [f"{name} is missing" for name in CONFIGS if not (folder / name).is_file()]


def _missing_files(folder: Path) -> list[str]:
    """What keeps a folder from being loaded, one line per file."""
    problems = _missing_configs(folder)
    tokenizer = folder / "tokenizer"
    if not (tokenizer / "tokenizer.json").is_file() and not all(
            (tokenizer / name).is_file() for name in ("vocab.json", "merges.txt")):
        problems.append("tokenizer/tokenizer.json (or vocab.json and merges.txt) is missing")
    for part, stem in WEIGHTS.items():
        names = weight_files(folder, part)[1]
        pickles = sorted(f.name for f in (folder / part).glob("*") if f.suffix in PICKLES)
        if not names and pickles:
            problems.append(f"{part}/{pickles[0]} is a pickle, which can run code when opened, and there is no "
                            f"{part}/{stem}.safetensors: {_CONVERT}")
        elif not names:
            problems.append(f"{part}/{stem}.safetensors is missing")
        problems += [f"{name} is missing" for name in names if not (folder / name).is_file()]
    return problems


def _inspect(folder: Path, weights: str) -> PriorFacts:
    """Facts of a complete folder. Raises ModelError for another kind of pipeline."""
    index = read_json(folder / "model_index.json")
    found = {part: (index.get(part) or [None, None])[1] for part in CLASSES}
    if found != CLASSES or index.get("text_encoder_2"):
        raise ModelError(f"{folder} is a {index.get('_class_name')} with "
                         f"{', '.join(f'{part} {name}' for part, name in found.items())}; only Stable Diffusion 1.x "
                         f"and 2.x are supported ({', '.join(CLASSES.values())}, one text encoder)")
    unet, vae = read_json(folder / "unet/config.json"), read_json(folder / "vae/config.json")
    noise = read_json(folder / "scheduler/scheduler_config.json")
    prediction = noise.get("prediction_type", "epsilon")
    if prediction not in PREDICTION_TYPES:
        raise ModelError(f"{folder}/scheduler/scheduler_config.json: prediction_type '{prediction}' is not supported; "
                         f"use a model that predicts one of {', '.join(PREDICTION_TYPES)}")
    channels = vae.get("latent_channels", 4)
    if unet.get("in_channels", 4) != channels:
        raise ModelError(f"{folder}: the UNet takes {unet['in_channels']} channels but the autoencoder makes "
                         f"{channels}; inpainting and image-editing variants need inputs we do not have, use the base "
                         "model")
    vae_factor = 2 ** (len(vae["block_out_channels"]) - 1)
    revision = f"{weights.split('@')[0]}@{folder.name}" if folder.parent.name == "snapshots" else weights
    return PriorFacts(weights=revision, image_size=_trained_size(unet, vae, vae_factor), vae_factor=vae_factor,
                      unet_factor=2 ** (len(unet["block_out_channels"]) - 1), latent_channels=channels,
                      prediction_type=prediction, train_timesteps=noise.get("num_train_timesteps", 1000))


def _trained_size(unet: dict[str, Any], vae: dict[str, Any], vae_factor: int) -> int:
    side = unet.get("sample_size")
    if side is None:
        return int(vae.get("sample_size", 512))
    return int(max(side) if isinstance(side, list) else side) * vae_factor
