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
from rayexpand.diffusion.process import LEAST_SIGNAL, Process, process_of
from rayexpand.models.folders import (
    EMBEDDING_NOISE,
    INDEX,
    MAE,
    NOISE,
    PICKLES,
    UNCLIP,
    UNCLIP_CLASSES,
    UNCLIP_PIXELS,
    WEIGHTS,
    configs_of,
    incomplete_message,
    parts_of,
    read_json,
    shard_of,
    tensor_shapes,
    tokenizers_of,
    weight_files,
)
from rayexpand.models.prior_config import PriorModel
from rayexpand.models.sources import PriorSources

CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
SECOND = {"text_encoder_2": "CLIPTextModelWithProjection"}  # of Stable Diffusion XL
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
COLOURS = 3
CONVERT = "load it once in diffusers where you trust it and call save_pretrained(folder, safe_serialization=True)"

_SUPPORTED = ("generators are Stable Diffusion 1.x, 2.x and XL and what was made of them: Turbo, LCM, Lightning, "
              f"Hyper, CosXL, Playground 2 ({', '.join(CLASSES.values())}; XL has a second text encoder, "
              f"{SECOND['text_encoder_2']}); for method gif also Stable unCLIP ({UNCLIP}) and masked autoencoders "
              f"({MAE})")
_LATER = {"StableDiffusion3": "Stable Diffusion 3", "Flux": "FLUX", "PixArt": "PixArt", "Sana": "SANA"}
_KARLO = ("Karlo, which paints pixels of 64 px through a text projection of its own and enlarges them by two more "
          "networks, none of which is read here. Use Stable unCLIP, whose decoder has the layout of Stable Diffusion")
_REFUSED = {"StableUnCLIPPipeline": "Stable unCLIP without an image encoder, which starts from texts; use its image "
                                    f"variation, {UNCLIP}",
            "UnCLIPPipeline": _KARLO, "UnCLIPImageVariationPipeline": _KARLO}
_FEW_STEP = ("LCMScheduler", "TCDScheduler")
_NOISE_LEVELS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")  # noise levels in place of timesteps
_SCHEDULERS = (  # those of diffusers whose noise is a beta schedule over timesteps
    "DDIMScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler",
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler",
    "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "UniPCMultistepScheduler", *_FEW_STEP, *_NOISE_LEVELS)
# Inputs of a UNet that nothing here gives it, and what such a UNet is.
_INPUTS = {"addition_embed_type": "a second text encoder and image sizes, as SDXL",
           "class_embed_type": "a class or noise level, as upscalers and unCLIP",
           "num_class_embeds": "a class, as upscalers", "encoder_hid_dim_type": "image features, as IP-Adapter",
           "encoder_hid_dim": "features of another encoder"}


GENERATORS = {"sd": "a latent diffusion model", "unclip": "a decoder of image embeddings (unCLIP)",
              "mae": "a masked autoencoder"}


@dataclass(frozen=True, slots=True)
class PriorFacts:
    """What configuration files say about a generator. Sizes in pixels of the image."""

    weights: str  # as given, with the commit hash in place of a branch or tag
    image_size: int  # side the generator was trained at
    vae_factor: int  # image pixels per latent pixel, along one side
    unet_factor: int  # by which the UNet halves the latent, along one side
    latent_channels: int
    process: Process
    train_timesteps: int
    family: str = "sd"  # "sd" (Stable Diffusion 1.x, 2.x), "sdxl", "unclip" or "mae" (a masked autoencoder)
    text_width: int = 768  # of the hidden states the network reads
    guidance: str = "cfg"  # "cfg", "embedded" or "none"
    steps_offset: int = 1  # first timestep of the leading grid
    few_step: str = ""  # what says that it was distilled to few steps
    turbo: bool = False  # whether its name says that it was distilled without guidance
    ends_in_noise: bool = False  # whether the last timestep holds no signal

    @property
    def prediction_type(self) -> str:
        return self.process.kind

    @property
    def generator(self) -> str:
        """What a method must say that it samples: "sd" for latent diffusion by prompts, "unclip" or "mae"."""
        return self.family if self.family in GENERATORS else "sd"


def missing_configs(folder: Path) -> list[str]:
    """Configuration files that are not there, one line each. Raises ModelError for a folder of another kind."""
    if other := _other_kind(folder):
        raise ModelError(f"{folder} {other}")
    return [f"{name} is missing" for name in configs_of(folder) if not (folder / name).is_file()]


def missing_files(folder: Path, parts: Sequence[str] | None = None) -> list[str]:
    """What keeps a folder from being loaded, one line per file; `parts`: those whose weights it must hold, None for
    all. Raises ModelError for a folder of another kind."""
    problems = missing_configs(folder)
    for tokenizer in tokenizers_of(folder):
        if not (folder / tokenizer / "tokenizer.json").is_file() and not all(
                (folder / tokenizer / name).is_file() for name in ("vocab.json", "merges.txt")):
            problems.append(f"{tokenizer}/tokenizer.json (or vocab.json and merges.txt) is missing")
        if not (folder / _words_of(tokenizer)).is_file():
            problems.append(f"{_words_of(tokenizer)} is missing; it says how many tokens a text may have")
    for part in parts_of(folder) if parts is None else parts:
        try:
            problems += _weight_problems(folder, part)
        except ModelError as error:
            problems.append(str(error))
    return problems


def inspect_sources(sources: PriorSources, prior: PriorModel, missing: Sequence[str] = ()) -> PriorFacts:
    """Facts of a generator. Raises ModelError with all that keeps it from being used, as far as configuration files and
    those beside them say; `missing`: lines that are known already."""
    problems, read, weights, folder = [*missing], {}, prior.weights, sources.folder
    wanted = {name: sources.json_file(name) for name in configs_of(folder)}
    for name, file in ((name, file) for name, file in wanted.items() if file.is_file()):
        try:
            read[name] = Settings(name, read_json(file), problems)
        except ModelError as error:
            problems.append(str(error))
    if len(read) < len(wanted):
        raise unusable(folder, problems)
    if other := _other_pipeline(read[INDEX].values):
        raise ModelError(f"{folder} {other}")
    unet, vae, text = (read[f"{part}/config.json"] for part in CLASSES)
    second = read.get("text_encoder_2/config.json")
    noise, index, image = read[NOISE], read[INDEX], read.get("image_encoder/config.json")
    channels = vae.whole("latent_channels", 4)
    widths = [one.whole("hidden_size", 512) for one in (text, second) if one is not None]
    _check_unet(unet, channels, sum(widths), second, image)
    _check_latents(vae, channels)
    lengths = [_check_tokenizer(folder, tokenizer, encoder, problems) for tokenizer, encoder in zip(
        ("tokenizer", "tokenizer_2"), (text, second), strict=True) if encoder is not None]
    if None not in lengths and len(set(lengths)) > 1:
        problems.append(f"{_words_of('tokenizer_2')}: model_max_length {lengths[1]} is not that of the first, "
                        f"{lengths[0]}, and the states of both encoders stand side by side; they are of two models")
    process = noise_of(noise, prior, published=second is None)
    unet_widths, vae_widths = (one.wholes("block_out_channels") for one in (unet, vae))
    if image is not None:
        problems += _unclip_problems(sources, read, unet_widths[0])
    problems += _wrong_shapes(sources, {
        "unet": {"conv_in.weight": (unet_widths[0], unet.whole("in_channels", 4))},
        "vae": {"decoder.conv_in.weight": (vae_widths[-1], channels)},
        **{part: {"embeddings.token_embedding.weight": (one.whole("vocab_size", 49408), one.whole("hidden_size", 512))}
           for part, one in (("text_encoder", text), ("text_encoder_2", second)) if one is not None}})
    guidance = guidance_of(prior, unet.values.get("time_cond_proj_dim") is not None, problems)
    facts = PriorFacts(
        weights=f"{weights.split('@')[0]}@{folder.name}" if folder.parent.name == "snapshots" else weights,
        image_size=_trained_size(unet, vae, 2 ** (len(vae_widths) - 1)), vae_factor=2 ** (len(vae_widths) - 1),
        unet_factor=2 ** (len(unet_widths) - 1), latent_channels=channels, process=process,
        train_timesteps=noise.whole("num_train_timesteps", 1000),
        family="unclip" if image is not None else "sd" if second is None else "sdxl",
        text_width=sum(widths), guidance=guidance,
        steps_offset=noise.whole("steps_offset", 0, 0), few_step=_few_step(unet, noise),
        turbo=any("turbo" in _own_name(one) for one in (weights, str(folder), index.values.get("_name_or_path"),
                                                        unet.values.get("_name_or_path"))),
        ends_in_noise=ends_in_noise(process, problems))
    if problems:
        raise unusable(folder, problems)
    return facts


def _words_of(tokenizer: str) -> str:
    return f"{tokenizer}/tokenizer_config.json"


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


def _check_unet(unet: Settings, channels: int, width: int, second: Settings | None, image: Settings | None) -> None:
    """`width`: of the hidden states of all text encoders; `second`: the configuration of XL's second one; `image`: of
    unCLIP's image encoder."""
    inputs = unet.whole("in_channels", 4)
    for name, what in _INPUTS.items():
        found = unet.values.get(name)
        if name == "addition_embed_type" and second is not None:
            _check_added(unet, second)
        elif name == "class_embed_type" and image is not None:
            _check_embedding(unet, image)
        elif found is not None:
            unet.refuse(f"{name} {found!r} says that the UNet needs {what}; we have none. Use the base model")
    if inputs == 2 * channels:
        unet.refuse(f"the UNet takes {inputs} channels, the latent and the seed image beside it, as InstructPix2Pix "
                    "and CosXL-edit: such a model starts from noise, follows three guidances and knows no strength, so "
                    "it is no image to image here. Use the base model")
    elif inputs == 2 * channels + 1:
        unet.refuse(f"the UNet takes {inputs} channels, as inpainting models: with nothing masked it does nothing that "
                    "its base model does not. Use the base model")
    elif inputs != channels:
        unet.refuse(f"the UNet takes {inputs} channels but the autoencoder makes {channels}; variants with more inputs "
                    "(depth, upscalers) are not supported, use the base model")
    if (outputs := unet.whole("out_channels", 4)) != channels:
        unet.refuse(f"out_channels {outputs} is not that of the latent ({channels}); models that also predict a "
                    "variance are not supported")
    found = unet.values.get("cross_attention_dim", 1280)
    if any(one != width for one in (found if isinstance(found, list) else [found])):
        of = "the hidden_size" if second is None else "the hidden_size of both text encoders together,"
        unet.refuse(f"cross_attention_dim {found} is not {of} {width} of text_encoder/config.json; UNet and "
                    "text encoder are of two models")


def _check_added(unet: Settings, second: Settings) -> None:
    """Whether sizes and the pooled text of XL have the width the UNet reads."""
    if (found := unet.values.get("addition_embed_type")) != "text_time":
        unet.refuse(f"addition_embed_type {found!r}: with two text encoders text_time is expected, as in Stable "
                    "Diffusion XL; use the base model")
        return
    each, pooled = unet.whole("addition_time_embed_dim", 256), second.whole("projection_dim", 1280)
    reads = unet.whole("projection_class_embeddings_input_dim", 2816)
    if reads == 5 * each + pooled:
        unet.refuse(f"projection_class_embeddings_input_dim {reads} is that of five numbers beside the text, as the "
                    "SDXL refiner, which continues another model's images. Use the base model")
    elif reads != 6 * each + pooled:
        unet.refuse(f"projection_class_embeddings_input_dim {reads} is not 6 x addition_time_embed_dim {each} + "
                    f"projection_dim {pooled} of text_encoder_2/config.json; UNet and text encoder are of two models")


def _check_embedding(unet: Settings, image: Settings) -> None:
    """Whether the UNet of unCLIP reads an image embedding and, as wide, the level of noise in it."""
    width, reads = image.whole("projection_dim", 512), unet.values.get("projection_class_embeddings_input_dim")
    if (found := unet.values.get("class_embed_type")) != "projection":
        unet.refuse(f"class_embed_type {found!r}: the decoder of unCLIP reads an image embedding as projection; this "
                    "one would paint without it")
    elif reads != 2 * width:
        unet.refuse(f"projection_class_embeddings_input_dim {reads!r} is not 2 x projection_dim {width} of "
                    "image_encoder/config.json; UNet and image encoder are of two models")


def _unclip_problems(sources: PriorSources, read: Mapping[str, Settings], first: int) -> list[str]:
    """What is wrong with the parts that Stable Diffusion has not; `first`: channels of the UNet's first level."""
    image, normalizer = read["image_encoder/config.json"], read["image_normalizer/config.json"]
    width, noise = image.whole("projection_dim", 512), read[EMBEDDING_NOISE]
    if (found := normalizer.whole("embedding_dim", 768)) != width:
        normalizer.refuse(f"embedding_dim {found} is not projection_dim {width} of image_encoder/config.json; they are "
                          "of two models")
    if (name := noise.values.get("_class_name")) not in _SCHEDULERS or name in _NOISE_LEVELS:
        noise.refuse(f"{name} cannot add noise to an embedding at a timestep; the scheduler of unCLIP is DDPMScheduler")
    pixel_numbers(read[UNCLIP_PIXELS])
    return _wrong_shapes(sources, {
        "unet": {"class_embedding.linear_1.weight": (4 * first, 2 * width)},
        "image_encoder": {"visual_projection.weight": (width, image.whole("hidden_size", 768))},
        "image_normalizer": {"mean": (1, width), "std": (1, width)}})


def pixel_numbers(pixels: Settings) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each colour, as preprocessor_config.json says; 0 and 1 where it does not, which
    is a problem."""
    made = []
    for name, otherwise in (("image_mean", 0.0), ("image_std", 1.0)):
        found = pixels.values.get(name)
        sound = isinstance(found, list) and len(found) == COLOURS and all(
            isinstance(one, (int, float)) and not isinstance(one, bool) and math.isfinite(one) for one in found)
        if not isinstance(found, list) or not sound or (name == "image_std" and min(found) <= 0):
            pixels.refuse(f"{name}: expected a number for each of {COLOURS} colours, got {found!r}")
            found = [otherwise] * COLOURS
        made.append([float(one) for one in found])
    return made[0], made[1]


def _check_latents(vae: Settings, channels: int) -> None:
    """latents_mean and latents_std, where there are any, are a number for each channel."""
    said = {name: vae.values.get(name) for name in ("latents_mean", "latents_std")}
    if all(one is None for one in said.values()):
        return
    for name, found in said.items():
        if not isinstance(found, list) or len(found) != channels or not all(
                isinstance(one, (int, float)) and not isinstance(one, bool) and math.isfinite(one) for one in found):
            vae.refuse(f"{name}: expected a number for each of the {channels} channels of the latent, got {found!r}")


def _check_tokenizer(folder: Path, tokenizer: str, text: Settings, problems: list[str]) -> int | None:
    """Whether texts and words that the tokenizer makes are those of the text encoder; tokens of a text, where that is
    known."""
    if not (folder / _words_of(tokenizer)).is_file():
        return None  # not downloaded yet
    try:
        words = Settings(_words_of(tokenizer), read_json(folder / _words_of(tokenizer)), problems)
        listed = _vocabulary(folder / tokenizer)
    except ModelError as error:
        problems.append(str(error))
        return None
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
    return longest if isinstance(longest, int) else None


def _vocabulary(tokenizer: Path) -> int:
    """Words of the tokenizer without those added later. Raises ModelError."""
    if (tokenizer / "tokenizer.json").is_file():
        file = tokenizer / "tokenizer.json"
        model = read_json(file).get("model")
        listed = model.get("vocab") if isinstance(model, dict) else None
    else:
        file = tokenizer / "vocab.json"
        listed = read_json(file) if file.is_file() else {}
    if not isinstance(listed, dict):
        raise ModelError(f"{file} holds no vocabulary; fetch or save the model again")
    return len(listed)


def guidance_of(prior: PriorModel, embedded: bool, problems: list[str]) -> str:
    """The mode of guidance, of a network with the scale as an input (`embedded`) or without."""
    if prior.guidance == "embedded" and not embedded:
        problems.append("prior.guidance: embedded needs a network with the scale as an input (time_cond_proj_dim of "
                        "unet/config.json), and this one has none; use cfg or none")
    elif embedded and prior.guidance in ("cfg", "none"):
        problems.append(f"prior.guidance: {prior.guidance} leaves out an input of this network, the scale of guidance "
                        "(time_cond_proj_dim of unet/config.json); use auto or embedded")
    return "embedded" if embedded else "none" if prior.guidance == "none" else "cfg"


def noise_of(noise: Settings, prior: PriorModel, *, published: bool) -> Process:
    """The noise process that scheduler_config.json and `prior.process` say."""
    said = prior.process.prediction_type or noise.values.get("prediction_type", "epsilon")
    if said not in PREDICTION_TYPES:
        noise.refuse(f"prediction_type '{said}' is not supported; use a model that predicts one of "
                     f"{', '.join(PREDICTION_TYPES)}")
    if (name := noise.values.get("_class_name")) not in _SCHEDULERS:
        noise.refuse(f"{name} is no noise process that this network can be sampled with; known are beta schedules and "
                     "EDM's noise levels")
    overrides = prior.process.model_dump()
    named = [one for one in ("sigma_min", "sigma_max", "sigma_data") if overrides[one] is not None]
    if named and name not in _NOISE_LEVELS:
        noise.problems.append(f"prior.process.{named[0]}: {name} has timesteps and no such noise level; take it out")
    if overrides["shift"] is not None:
        noise.problems.append(f"prior.process.shift: is of flows, and {name} is none; take it out")
    if overrides["rescale_betas_zero_snr"] is not None and name in _NOISE_LEVELS:
        noise.problems.append(f"prior.process.rescale_betas_zero_snr: {name} has no betas; take it out")
    known = said if said in PREDICTION_TYPES else "epsilon"
    return process_of({**noise.values, "prediction_type": known}, {**overrides, "prediction_type": known},
                      published=published)


def _few_step(unet: Settings, noise: Settings) -> str:
    if (found := unet.values.get("time_cond_proj_dim")) is not None:
        return f"unet/config.json: time_cond_proj_dim {found} says that guidance is an input of the UNet"
    if (name := noise.values.get("_class_name")) in _FEW_STEP:
        return f"{NOISE}: {name} samples in few steps, each from new noise"
    return ""


def ends_in_noise(process: Process, problems: list[str]) -> bool:
    """Whether the last timestep holds no signal."""
    return process.frame == "vp" and _last_signal(Settings(NOISE, process.config, problems)) < LEAST_SIGNAL


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


def _wrong_shapes(sources: PriorSources, wanted: Mapping[str, Mapping[str, tuple[int, int]]]) -> list[str]:
    """Where a tensor (by the end of its name) of a component that is here has another shape than its configuration
    says: weights of another model."""
    problems = []
    for part, shapes in wanted.items():
        try:
            if (place := sources.part(part)).weights.is_file():
                continue  # its names are others; header_check.py converts them
            files = [file for file in place.files() if file.suffix == ".safetensors"]
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
        return ("is a LoRA, not a generator; name its file in prior.loras, and in prior.weights the model that it was "
                "trained on")
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
            return (f"holds a single-file checkpoint, {single[0]}, not a folder in diffusers' layout; name that file "
                    "in prior.weights, and in prior.config a folder with the configuration files of its family")
        if not files:
            return "is empty; give a folder in diffusers' StableDiffusionPipeline layout"
    return ""


def _other_pipeline(index: Mapping[str, Any]) -> str:
    """What a pipeline is that is not ours, by its model_index.json; "" for Stable Diffusion."""
    parts = {name: one[1] for name, one in index.items() if isinstance(one, list) and len(one) == 2 and one[1]}
    name = str(index.get("_class_name"))
    if name in _REFUSED:
        return f"is a {name}: this is {_REFUSED[name]}"
    second = {part: one for part, one in parts.items() if part in SECOND}
    images = {part: one for part, one in parts.items() if part in UNCLIP_CLASSES}
    if {part: parts.get(part) for part in CLASSES} == CLASSES and second in ({}, SECOND) and (
            name != UNCLIP or images == UNCLIP_CLASSES):
        return ""
    if later := [what for start, what in _LATER.items() if name.startswith(start)]:
        return f"is a {name}: {later[0]} is not supported yet; {_SUPPORTED}"
    if "text_encoder_2" in parts and "text_encoder" not in parts and "unet" in parts:
        return (f"is a {name} without a first text encoder, as the SDXL refiner, which continues another model's "
                "images. Use the base model")
    shown = {name: one for name, one in parts.items()
             if name in CLASSES or name.startswith(("text_encoder", "transformer", "prior", "image_"))}
    return (f"is a {index.get('_class_name')} with "
            f"{', '.join(f'{name} {one}' for name, one in shown.items()) or 'no part that we know'}; {_SUPPORTED}")


def unusable(folder: Path, problems: Sequence[str]) -> ModelError:
    """The error of a folder with these lines."""
    return ModelError(incomplete_message(folder, list(dict.fromkeys(problems))))
