"""A small model folder of every family of generators: real class names, the scheduler json of the published model, and
random weights of 32 px images, 16 x 16 latents and texts of 16 tokens.

The weights are drawn so that every output depends on every input: an oracle that compares two samplers on them sees a
prompt, a size or a label that is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayexpand.contract.rng import generator, row_key
from rayexpand.models.folders import quiet_libraries
from rayexpand.models.tiny import architecture, digits

SIDE, LATENT = 32, 16  # pixels of an image and of its latent

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
          "trained_betas": None}
_OFFSET = {**_BETAS, "set_alpha_to_one": False, "steps_offset": 1, "skip_prk_steps": True, "clip_sample": False}
_EULER = {**_OFFSET, "interpolation_type": "linear", "prediction_type": "epsilon", "sample_max_value": 1.0,
          "use_karras_sigmas": False}  # that of SDXL; Euler does not read set_alpha_to_one and ends at the clean image
_EDM = {"num_train_timesteps": 1000, "rho": 7.0, "sigma_min": 0.002, "final_sigmas_type": "zero"}
_CLIP, _CLIP_PROJECTED = ("transformers", "CLIPTextModel"), ("transformers", "CLIPTextModelWithProjection")
_TOKENIZER = ("transformers", "CLIPTokenizer")
_T5, _T5_TOKENIZER = ("transformers", "T5EncoderModel"), ("transformers", "T5TokenizerFast")


@dataclass(frozen=True)
class Family:
    """What tells a fixture from Stable Diffusion 1.5."""

    scheduler: str
    noise: Mapping[str, Any]
    pipeline: str = "StableDiffusionPipeline"
    unet: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=lambda: {"scaling_factor": 0.18215})
    xl: bool = False  # two text encoders, pooled text and sizes
    refiner: bool = False  # the second of these encoders alone

    @property
    def index(self) -> dict[str, Any]:
        """Fields of model_index.json that are no parts."""
        if not self.xl:
            return {"requires_safety_checker": False}
        return {"force_zeros_for_empty_prompt": not self.refiner,
                **({"requires_aesthetics_score": True} if self.refiner else {})}


def _sdxl(scheduler: str, noise: Mapping[str, Any], **vae: Any) -> Family:
    return Family(scheduler, noise, "StableDiffusionXLPipeline", xl=True,
                  vae={"scaling_factor": 0.13025, "force_upcast": True, **vae})


FAMILIES: dict[str, Family] = {
    "sd": Family("PNDMScheduler", _OFFSET),
    "sd2v": Family("DDIMScheduler", {**_OFFSET, "prediction_type": "v_prediction"}),
    "sdzsnr": Family("DDIMScheduler", {**_OFFSET, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
                                       "timestep_spacing": "trailing"}),
    "sdturbo": Family("EulerDiscreteScheduler", {**_EULER, "timestep_spacing": "trailing"}),
    "lcm": Family("LCMScheduler", {**_BETAS, "clip_sample": False, "original_inference_steps": 50, "steps_offset": 0,
                                   "prediction_type": "epsilon", "rescale_betas_zero_snr": False,
                                   "set_alpha_to_one": True, "timestep_scaling": 10.0, "timestep_spacing": "leading"},
                  "LatentConsistencyModelPipeline", unet={"time_cond_proj_dim": 16}),
    "sdxl": _sdxl("EulerDiscreteScheduler", {**_EULER, "timestep_spacing": "leading"}),
    "sdxlturbo": _sdxl("EulerAncestralDiscreteScheduler", {**_EULER, "timestep_spacing": "trailing"}),
    "lightning": _sdxl("EulerDiscreteScheduler", {**_EULER, "timestep_spacing": "trailing"}),
    "hyper": _sdxl("TCDScheduler", {**_OFFSET, "original_inference_steps": 50, "prediction_type": "epsilon",
                                    "timestep_spacing": "leading"}),
    "cosxl": _sdxl("EDMEulerScheduler", {**_EDM, "sigma_max": 120.0, "sigma_data": 1.0, "sigma_schedule": "exponential",
                                         "prediction_type": "v_prediction"}),
    # Its file has no sigma_schedule: the default of the class counts.
    "playground": _sdxl("EDMDPMSolverMultistepScheduler",
                        {**_EDM, "sigma_max": 80.0, "sigma_data": 0.5, "algorithm_type": "dpmsolver++",
                         "euler_at_final": False, "lower_order_final": True, "prediction_type": "epsilon",
                         "solver_order": 2, "solver_type": "midpoint", "thresholding": False},
                        scaling_factor=0.5, latents_mean=[-1.6574, 1.886, -1.383, 2.5155],
                        latents_std=[8.4927, 5.9022, 6.5498, 5.2299]),
    # Those that are refused: their networks want inputs that image to image has not.
    "ip2p": Family("EulerAncestralDiscreteScheduler", {**_OFFSET, "prediction_type": "epsilon"},
                   "StableDiffusionInstructPix2PixPipeline", unet={"in_channels": 8}),
    "inpaint": Family("PNDMScheduler", _OFFSET, "StableDiffusionInpaintPipeline", unet={"in_channels": 9}),
    "refiner": Family("EulerDiscreteScheduler", {**_EULER, "timestep_spacing": "leading"},
                      "StableDiffusionXLImg2ImgPipeline", xl=True, refiner=True,
                      unet={"cross_attention_dim": 32, "projection_class_embeddings_input_dim": 5 * 8 + 24},
                      vae={"scaling_factor": 0.13025, "force_upcast": True}),
}

# Flows, of which only the json files are written: what refuses them by name needs no more.
FLOWS: dict[str, tuple[str, dict[str, tuple[str, str]], dict[str, Any], dict[str, Any]]] = {
    "sd3": ("StableDiffusion3Pipeline",
            {"text_encoder": _CLIP_PROJECTED, "text_encoder_2": _CLIP_PROJECTED, "text_encoder_3": _T5,
             "tokenizer": _TOKENIZER, "tokenizer_2": _TOKENIZER, "tokenizer_3": _T5_TOKENIZER,
             "transformer": ("diffusers", "SD3Transformer2DModel")},
            {"num_train_timesteps": 1000, "shift": 3.0},
            {"in_channels": 16, "joint_attention_dim": 48, "pooled_projection_dim": 40, "pos_embed_max_size": 24}),
    "flux": ("FluxPipeline",
             {"text_encoder": _CLIP, "text_encoder_2": _T5, "tokenizer": _TOKENIZER, "tokenizer_2": _T5_TOKENIZER,
              "transformer": ("diffusers", "FluxTransformer2DModel")},
             {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5,
              "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096},
             {"in_channels": 64, "joint_attention_dim": 48, "pooled_projection_dim": 16, "guidance_embeds": True}),
}


def build(name: str, folder: Path, seed: int = 0) -> Path:
    """Write the folder of a fixture by its name in FAMILIES or FLOWS."""
    if name in FLOWS:
        return _flow(name, folder)
    family = FAMILIES[name]
    parts = {"unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL"),
             **{part: _CLIP_PROJECTED if part.endswith("_2") else _CLIP for part in _encoders(family)},
             **{part.replace("text_encoder", "tokenizer"): _TOKENIZER for part in _encoders(family)},
             "scheduler": ("diffusers", family.scheduler)}
    absent = ("image_encoder", "feature_extractor", *(() if family.xl else ("safety_checker",)),
              *(("text_encoder", "tokenizer") if family.refiner else ()))
    with quiet_libraries():
        _unet(family, _stream(f"{name} unet", seed)).save_pretrained(folder / "unet")
        _vae(family, _stream(f"{name} vae", seed)).save_pretrained(folder / "vae")
        for part in _encoders(family):
            _texts(family, part, _stream(f"{name} {part}", seed), folder)
    _write(folder / "scheduler/scheduler_config.json", {"_class_name": family.scheduler, **family.noise})
    _write(folder / "model_index.json", {"_class_name": family.pipeline, "_diffusers_version": "0.42.1", **family.index,
                                         **parts, **dict.fromkeys(absent, (None, None))})
    return folder


def at_once(root: Path) -> Callable[[str], Path]:
    """A function of a name that writes its folder under `root` the first time it is asked."""
    def folder(name: str) -> Path:
        path = root / name
        return path if path.is_dir() else build(name, path)
    return folder


def _encoders(family: Family) -> tuple[str, ...]:
    return ("text_encoder_2",) if family.refiner else ("text_encoder", "text_encoder_2")[:1 + family.xl]


def _stream(part: str, seed: int) -> np.random.Generator:
    return generator(row_key(seed, "family", part, 0, 0, "weights"))


def _unet(family: Family, rng: np.random.Generator) -> Any:
    """SDXL: cross attention over both encoders (16 + 32), sizes of 8 numbers each and the projected text of 24."""
    xl = {"cross_attention_dim": 48, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
          "projection_class_embeddings_input_dim": 6 * 8 + 24, "use_linear_projection": True,
          "transformer_layers_per_block": (1, 2)} if family.xl else {}
    return architecture.build_unet(rng, **{"sample_size": LATENT, "block_out_channels": (16, 32), "norm_num_groups": 4,
                                           **xl, **family.unet})


def _vae(family: Family, rng: np.random.Generator) -> Any:
    return architecture.build_vae(rng, block_out_channels=(8, 16), norm_num_groups=4, sample_size=SIDE,
                                  mid_block_add_attention=True, **family.vae)


def _texts(family: Family, part: str, rng: np.random.Generator, folder: Path) -> None:
    """A tokenizer and its encoder. The second tokenizer of SDXL fills up with another token than the first."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    second = part.endswith("_2")
    tokenizer = digits.build_tokenizer()
    if second:
        tokenizer.pad_token = "!"
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16 if family.xl and not second else 32, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=architecture.CONTEXT,
        hidden_act="gelu" if second else "quick_gelu", projection_dim=24, bos_token_id=0,
        eos_token_id=architecture.EOS, pad_token_id=tokenizer.pad_token_id)
    model = (CLIPTextModelWithProjection if second else CLIPTextModel)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.3 * architecture.normals(rng, parameter.shape))
    model.save_pretrained(folder / part)
    tokenizer.save_pretrained(folder / part.replace("text_encoder", "tokenizer"))


def _flow(name: str, folder: Path) -> Path:
    pipeline, parts, noise, transformer = FLOWS[name]
    scheduler = "FlowMatchEulerDiscreteScheduler"
    _write(folder / "model_index.json", {
        "_class_name": pipeline, "_diffusers_version": "0.42.1", **parts, "scheduler": ("diffusers", scheduler),
        "vae": ("diffusers", "AutoencoderKL")})
    _write(folder / "scheduler/scheduler_config.json", {"_class_name": scheduler, **noise})
    _write(folder / "transformer/config.json", {"_class_name": parts["transformer"][1], **transformer})
    _write(folder / "vae/config.json", {
        "_class_name": "AutoencoderKL", "latent_channels": 16, "block_out_channels": [8, 16], "sample_size": SIDE,
        "scaling_factor": 1.5305 if name == "sd3" else 0.3611, "shift_factor": 0.0609 if name == "sd3" else 0.1159,
        "use_quant_conv": False, "use_post_quant_conv": False})
    for part, (_, kind) in parts.items():
        if part.startswith("text_encoder"):
            _write(folder / part / "config.json", {"architectures": [kind], "hidden_size": 32, "d_model": 48,
                                                   "vocab_size": 600, "max_position_embeddings": 16})
        if part.startswith("tokenizer"):
            _write(folder / part / "tokenizer_config.json", {"tokenizer_class": kind, "model_max_length": 16})
    return folder


def _write(file: Path, values: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=2) + "\n")
