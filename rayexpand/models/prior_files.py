"""What the files of a generator's folder say, and what keeps it from being one: json files and headers of safetensors.

Nothing here loads a weight, asks for a device or imports torch. A fact that sampling does not follow is a refusal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayexpand.artifacts.adapter import ADAPTER
from rayexpand.contract.errors import ModelError
from rayexpand.models.folders import (
    CONFIGS,
    PICKLES,
    WEIGHTS,
    incomplete_message,
    read_json,
    shard_of,
    tensor_shapes,
    weight_files,
)

CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
PREDICTION_TYPES = ("epsilon", "v_prediction")
CONVERT = "load it once in diffusers where you trust it and call save_pretrained(folder, safe_serialization=True)"
LEAST_SIGNAL = 1e-6  # alpha-bar below which a noise prediction has no clean image

NOISE, TOKENIZER = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"
_SUPPORTED = f"only Stable Diffusion 1.x and 2.x are supported ({', '.join(CLASSES.values())}, one text encoder)"
_FEW_STEP = ("LCMScheduler", "TCDScheduler")
_SCHEDULERS = (  # those of diffusers whose noise is a beta schedule over timesteps
    "DDIMScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler",
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler",
    "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "UniPCMultistepScheduler", *_FEW_STEP)
# Inputs of a UNet that nothing here gives it, and what such a UNet is.
_INPUTS = {"addition_embed_type": "a second text encoder and image sizes, as SDXL and its refiner",
           "class_embed_type": "a class or noise level, as upscalers and unCLIP",
           "num_class_embeds": "a class, as upscalers", "encoder_hid_dim_type": "image features, as IP-Adapter",
           "encoder_hid_dim": "features of another encoder"}


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
    spacing: str = "leading"  # timestep_spacing of the scheduler, leading where it says none
    steps_offset: int = 1  # first timestep of the leading grid
    few_step: str = ""  # what says that it was distilled to few steps in a way nothing here follows
    turbo: bool = False  # whether its name says that it was distilled without guidance
    ends_in_noise: bool = False  # whether the last timestep holds no signal


def missing_configs(folder: Path) -> list[str]:
    """Configuration files that are not there, one line each. Raises ModelError for a folder of another kind."""
    if other := _other_kind(folder):
        raise ModelError(f"{folder} {other}")
    return [f"{name} is missing" for name in CONFIGS if not (folder / name).is_file()]


def missing_files(folder: Path) -> list[str]:
    """What keeps a folder from being loaded, one line per file. Raises ModelError for a folder of another kind."""
    problems = missing_configs(folder)
    tokenizer = folder / "tokenizer"
    if not (tokenizer / "tokenizer.json").is_file() and not all(
            (tokenizer / name).is_file() for name in ("vocab.json", "merges.txt")):
        problems.append("tokenizer/tokenizer.json (or vocab.json and merges.txt) is missing")
    if not (folder / TOKENIZER).is_file():
        problems.append(f"{TOKENIZER} is missing; it says how many tokens a text may have")
    for part in WEIGHTS:
        try:
            problems += _weight_problems(folder, part)
        except ModelError as error:
            problems.append(str(error))
    return problems


def inspect_folder(folder: Path, weights: str, missing: Sequence[str] = ()) -> PriorFacts:
    """Facts of a folder. Raises ModelError with all that keeps it from being used, as far as configuration files and
    those beside them say; `missing`: lines that are known already."""
    problems, read = [*missing], {}
    for name in (one for one in CONFIGS if (folder / one).is_file()):
        try:
            read[name] = Settings(name, read_json(folder / name), problems)
        except ModelError as error:
            problems.append(str(error))
    if len(read) < len(CONFIGS):
        raise unusable(folder, problems)
    if other := _other_pipeline(read["model_index.json"].values):
        raise ModelError(f"{folder} {other}")
    unet, vae, text = (read[f"{part}/config.json"] for part in CLASSES)
    noise, index = read[NOISE], read["model_index.json"]
    channels = vae.whole("latent_channels", 4)
    _check_unet(unet, channels, text.whole("hidden_size", 512))
    for name in ("latents_mean", "latents_std"):
        if vae.values.get(name) is not None:
            vae.refuse(f"{name}: latents are normalised by scaling_factor here and by nothing else; use another "
                       "autoencoder")
    _check_tokenizer(folder, text, problems)
    prediction = _check_noise(noise)
    unet_widths, vae_widths = (one.wholes("block_out_channels") for one in (unet, vae))
    problems += _wrong_shapes(folder, {
        "unet": {"conv_in.weight": (unet_widths[0], channels)},
        "vae": {"decoder.conv_in.weight": (vae_widths[-1], channels)},
        "text_encoder": {"embeddings.token_embedding.weight": (text.whole("vocab_size", 49408),
                                                                 text.whole("hidden_size", 512))}})
    facts = PriorFacts(
        weights=f"{weights.split('@')[0]}@{folder.name}" if folder.parent.name == "snapshots" else weights,
        image_size=_trained_size(unet, vae, 2 ** (len(vae_widths) - 1)), vae_factor=2 ** (len(vae_widths) - 1),
        unet_factor=2 ** (len(unet_widths) - 1), latent_channels=channels, prediction_type=prediction,
        train_timesteps=noise.whole("num_train_timesteps", 1000),
        spacing=str(noise.values.get("timestep_spacing", "leading")), steps_offset=noise.whole("steps_offset", 0, 0),
        few_step=_few_step(unet, noise),
        turbo=any("turbo" in _own_name(one) for one in (weights, str(folder), index.values.get("_name_or_path"),
                                                        unet.values.get("_name_or_path"))),
        ends_in_noise=_last_signal(noise) < LEAST_SIGNAL)
    if problems:
        raise unusable(folder, problems)
    return facts


def _own_name(path: object) -> str:
    """The last part of a path or of a name on the hub, without the folders it lies in."""
    parts = [part for part in str(path or "").lower().partition("@")[0].split("/") if part]
    return parts[-3] if "snapshots" in parts[-2:-1] and len(parts) > 2 else parts[-1] if parts else ""


@dataclass(frozen=True, slots=True)
class Settings:
    """One configuration file, whose odd values become lines of `problems`."""

    file: str
    values: Mapping[str, Any]
    problems: list[str]

    def refuse(self, text: str) -> None:
        self.problems.append(f"{self.file}: {text}")

    def whole(self, name: str, default: int, least: int = 1) -> int:
        """A whole number, the default where the file does not say one."""
        found = self.values.get(name, default)
        if isinstance(found, bool) or not isinstance(found, int) or found < least:
            self.refuse(f"{name}: expected a whole number from {least} on, got {found!r}")
            return default
        return found

    def real(self, name: str, default: float) -> float:
        found = self.values.get(name, default)
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
            self.refuse(f"{name}: expected a number, got {found!r}")
            return default
        return float(found)

    def wholes(self, name: str) -> list[int]:
        """A list of whole numbers that must be there."""
        found = self.values.get(name)
        if not isinstance(found, list) or not found or not all(isinstance(one, int) for one in found):
            self.refuse(f"{name}: expected a list of whole numbers, got {found!r}")
            return [0]
        return found


def _check_unet(unet: Settings, channels: int, width: int) -> None:
    for name, what in _INPUTS.items():
        if (found := unet.values.get(name)) is not None:
            unet.refuse(f"{name} {found!r} says that the UNet needs {what}; we have none. Use the base model")
    if (inputs := unet.whole("in_channels", 4)) != channels:
        unet.refuse(f"the UNet takes {inputs} channels but the autoencoder makes {channels}; inpainting and "
                    "image-editing variants need inputs we do not have, use the base model")
    if (outputs := unet.whole("out_channels", 4)) != channels:
        unet.refuse(f"out_channels {outputs} is not that of the latent ({channels}); models that also predict a "
                    "variance are not supported")
    found = unet.values.get("cross_attention_dim", 1280)
    if any(one != width for one in (found if isinstance(found, list) else [found])):
        unet.refuse(f"cross_attention_dim {found} is not the hidden_size {width} of text_encoder/config.json; UNet and "
                    "text encoder are of two models")


def _check_tokenizer(folder: Path, text: Settings, problems: list[str]) -> None:
    """Whether texts and words that the tokenizer makes are those of the text encoder."""
    if not (folder / TOKENIZER).is_file():
        return  # not downloaded yet
    try:
        words = Settings(TOKENIZER, read_json(folder / TOKENIZER), problems)
        listed = _vocabulary(folder)
    except ModelError as error:
        problems.append(str(error))
        return
    longest, places = words.values.get("model_max_length"), text.whole("max_position_embeddings", 77)
    if isinstance(longest, bool) or not isinstance(longest, int) or longest < 3:
        words.refuse(f"model_max_length: expected the number of tokens of a text (77 of Stable Diffusion), got "
                     f"{longest!r}")
    elif longest > places:
        words.refuse(f"model_max_length {longest} is more than the {places} places of the text encoder "
                     "(max_position_embeddings); they are of two models")
    if listed > (known := text.whole("vocab_size", 49408)):
        text.refuse(f"the tokenizer has {listed:,} words and the text encoder vocab_size {known}; they are of two "
                    "models")


def _vocabulary(folder: Path) -> int:
    """Words of the tokenizer without those added later. Raises ModelError."""
    if (folder / "tokenizer/tokenizer.json").is_file():
        file = folder / "tokenizer/tokenizer.json"
        model = read_json(file).get("model")
        listed = model.get("vocab") if isinstance(model, dict) else None
    else:
        file = folder / "tokenizer/vocab.json"
        listed = read_json(file) if file.is_file() else {}
    if not isinstance(listed, dict):
        raise ModelError(f"{file} holds no vocabulary; fetch or save the model again")
    return len(listed)


def _check_noise(noise: Settings) -> str:
    """The prediction type."""
    prediction = noise.values.get("prediction_type", "epsilon")
    if prediction not in PREDICTION_TYPES:
        noise.refuse(f"prediction_type '{prediction}' is not supported; use a model that predicts one of "
                     f"{', '.join(PREDICTION_TYPES)}")
    if (name := noise.values.get("_class_name")) not in _SCHEDULERS:
        noise.refuse(f"{name} is no noise process over a beta schedule; only diffusion models such as Stable Diffusion "
                     "1.x and 2.x can be sampled")
    return str(prediction)


def _few_step(unet: Settings, noise: Settings) -> str:
    if (found := unet.values.get("time_cond_proj_dim")) is not None:
        return f"unet/config.json: time_cond_proj_dim {found} says that guidance is an input of the UNet"
    if (name := noise.values.get("_class_name")) in _FEW_STEP:
        return f"{NOISE}: {name} samples in few steps, each from new noise"
    return ""


def _last_signal(noise: Settings) -> float:
    """alpha-bar at the last timestep, of the schedules of Stable Diffusion; 1 for another one."""
    if noise.values.get("rescale_betas_zero_snr"):
        return 0.0
    first, last = noise.real("beta_start", 0.0001), noise.real("beta_end", 0.02)
    kind, count = noise.values.get("beta_schedule", "linear"), noise.whole("num_train_timesteps", 1000)
    if noise.values.get("trained_betas") is not None or kind not in ("linear", "scaled_linear") or first < 0:
        return 1.0
    betas = (np.linspace(first, last, count) if kind == "linear"
             else np.linspace(first**0.5, max(last, 0) ** 0.5, count) ** 2)
    return float(np.prod(1 - betas))


def _trained_size(unet: Settings, vae: Settings, vae_factor: int) -> int:
    side = unet.values.get("sample_size")
    if side is None:
        return vae.whole("sample_size", 512)
    if isinstance(side, list) and side and all(isinstance(one, int) for one in side):
        return max(side) * vae_factor
    return unet.whole("sample_size", 64) * vae_factor


# ---------------------------------------------------------------------------------------------------------------- files


def _weight_problems(folder: Path, part: str) -> list[str]:
    """What is wrong with the weights of one component. Raises ModelError."""
    names = weight_files(folder, part)[1]
    if not names:
        return [_no_weights(folder, part)]
    if absent := [f"{name} is missing" for name in names if not (folder / name).is_file()]:
        return absent
    index = folder / names[0] if names[0].endswith(".json") else None
    there = {name: tensor_shapes(folder / name) for name in names if name.endswith(".safetensors")}
    listed = shard_of(index) if index else {}
    lacking = [name for name, file in listed.items() if name not in there[f"{part}/{file}"]]
    return [f"{part}/{listed[lacking[0]]} lacks {len(lacking)} tensors that its index says are there, such as "
            f"{lacking[0]}; fetch or save it again"] if lacking else []


def _wrong_shapes(folder: Path, wanted: Mapping[str, Mapping[str, tuple[int, int]]]) -> list[str]:
    """Where a tensor (by the end of its name) of a component that is here has another shape than its configuration
    says: weights of another model."""
    problems = []
    for part, shapes in wanted.items():
        try:
            files = [folder / name for name in weight_files(folder, part)[1] if name.endswith(".safetensors")]
            there = {name: shape for file in files if file.is_file() for name, shape in tensor_shapes(file).items()}
        except ModelError as error:
            problems.append(str(error))
            continue
        for end, shape in shapes.items():
            problems += [f"{part}: {name} is {list(found)}, and {part}/config.json asks for {list(shape)} there; its "
                         "weights are those of another model" for name, found in there.items()
                         if name.endswith(end) and found[:2] != shape]
    return problems


def _no_weights(folder: Path, part: str) -> str:
    files = sorted((folder / part).glob("*"))
    if others := [file.name for file in files if file.suffix == ".safetensors"]:
        return (f"{part} holds only {', '.join(others[:3])}; {WEIGHTS[part]}.safetensors is read, or its variants fp16 "
                "and bf16: rename the file that you mean")
    if pickles := [file.name for file in files if file.suffix in PICKLES]:
        return (f"{part}/{pickles[0]} is a pickle, which can run code when opened, and there is no "
                f"{part}/{WEIGHTS[part]}.safetensors: {CONVERT}")
    return f"{part}/{WEIGHTS[part]}.safetensors is missing"


def _other_kind(folder: Path) -> str:
    """What a folder is that is no pipeline at all, "" for one that may be."""
    def has(*names: str) -> bool:
        return any((folder / name).is_file() for name in names)

    if has("model_index.json"):
        return _other_pipeline(read_json(folder / "model_index.json"))
    if has(ADAPTER):
        return ("is an adapter that `rayexpand fit` made, not a generator; name it in artifacts.adapter, and in "
                "prior.weights the model that it was trained on")
    if has("pytorch_lora_weights.safetensors", "adapter_config.json", "adapter_model.safetensors"):
        return ("is a LoRA, not a generator; merge it into its base model in diffusers (load_lora_weights, fuse_lora, "
                "save_pretrained) and name that folder")
    if has("open_clip_config.json", "guide.json"):
        return "is a guide, not a generator; name it in guide.weights"
    if (folder / "snapshots").is_dir():
        commits = sorted(one.name for one in (folder / "snapshots").iterdir())
        return (f"is a folder of the Hugging Face cache; name the model as org/name, or the folder below snapshots "
                f"({', '.join(commits) or 'there is none'})")
    if has("config.json"):
        said = read_json(folder / "config.json")
        if said.get("_class_name"):
            return f"is one part of a pipeline, {said['_class_name']}; name the folder above it"
        return (f"is a transformers model ({said.get('model_type', 'of no type')}), not a generator; {_SUPPORTED}")
    if not any((folder / part).exists() for part in ("unet", "vae", "text_encoder", "scheduler", "tokenizer")):
        files = sorted(one.name for one in folder.iterdir()) if folder.is_dir() else []
        if single := [name for name in files if name.endswith(".safetensors")]:
            return (f"holds a single-file checkpoint, {single[0]}, not a folder in diffusers' layout; convert it with "
                    "StableDiffusionPipeline.from_single_file(...).save_pretrained(folder)")
        if not files:
            return "is empty; give a folder in diffusers' StableDiffusionPipeline layout"
    return ""


def _other_pipeline(index: Mapping[str, Any]) -> str:
    """What a pipeline is that is not ours, by its model_index.json; "" for Stable Diffusion."""
    parts = {name: one[1] for name, one in index.items() if isinstance(one, list) and len(one) == 2 and one[1]}
    if {part: parts.get(part) for part in CLASSES} == CLASSES and "text_encoder_2" not in parts:
        return ""
    shown = {name: one for name, one in parts.items()
             if name in CLASSES or name.startswith(("text_encoder", "transformer", "prior"))}
    return (f"is a {index.get('_class_name')} with "
            f"{', '.join(f'{name} {one}' for name, one in shown.items()) or 'no part that we know'}; {_SUPPORTED}")


def unusable(folder: Path, problems: Sequence[str]) -> ModelError:
    """The error of a folder with these lines."""
    return ModelError(incomplete_message(folder, list(dict.fromkeys(problems))))
